"""`python -m benchmarks.trainers` times a step of TRL's GRPOTrainer and of DRPOTrainer with the same loss, on the CPU.

Both trainers get the same weights and the same batch, and `objective=PPO()` is TRL's own formula: losses and gradients
are compared first, then times interleaved in this process, then the peak memory of each in a process of its own. The
step is `_compute_loss` and its backward, backbone and metrics included; generation is the same code in both.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch

from benchmarks.harness import cli, memory
from benchmarks.harness.blocks import Block, origin
from benchmarks.harness.provenance import ROOT, provenance
from benchmarks.harness.records import Record, write
from benchmarks.harness.tables import NOTHING, milliseconds, table, times
from benchmarks.harness.timing import interleaved_seconds

RESULTS = ROOT / "bench_results" / "trainers.jsonl"
TRAINERS = ("GRPOTrainer", "DRPOTrainer")
AGREEMENT = 2e-5  # relative; the log-probs of two correct fp32 heads differ by about 1e-6


@dataclass(frozen=True)
class Size:
    """A batch of padded prompts and completions, and the backbone around the head."""

    batch: int
    prompt: int
    completion: int
    hidden: int
    vocab: int
    layers: int = 2


FULL, QUICK = Size(8, 32, 256, 512, 32_768), Size(4, 4, 6, 32, 64)


def make_trainer(name: str, size: Size):
    """Return a trainer on seeded weights; its dataset and tokenizer are placeholders that no step reads."""
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import GRPOConfig, GRPOTrainer

    from drpo_kernels import PPO
    from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer

    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "x": 2}, unk_token="<pad>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    policy = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=2 * size.hidden,
            num_hidden_layers=size.layers, num_attention_heads=4, num_key_value_heads=2, head_dim=size.hidden // 4,
            pad_token_id=0, eos_token_id=1, tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    trainer, config, objective = (GRPOTrainer, GRPOConfig, {})
    if name == "DRPOTrainer":
        trainer, config, objective = DRPOTrainer, DRPOConfig, {"objective": PPO()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = config(
            folder, per_device_train_batch_size=size.batch, num_generations=size.batch, report_to="none", use_cpu=True,
            bf16=False, max_completion_length=size.completion, disable_tqdm=True, **objective,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": ["x"] * 8})
        made = trainer(policy, lambda completions, **_: [0.0] * len(completions), args, data, None, tokenizer)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def make_batch(size: Size) -> dict[str, torch.Tensor]:
    """Return completions of a quarter of the length to all of it, with old log-probs of a slightly stale policy."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.linspace(size.completion / 4, size.completion, size.batch).long()
    mask = (torch.arange(size.completion) < lengths[:, None]).long()
    flat = -torch.log(torch.tensor(float(size.vocab)))
    shape = (size.batch, size.completion)
    return {
        "prompt_ids": torch.randint(2, size.vocab, (size.batch, size.prompt), generator=g),
        "prompt_mask": torch.ones(size.batch, size.prompt, dtype=torch.long),
        "completion_ids": torch.randint(2, size.vocab, shape, generator=g),
        "completion_mask": mask,
        "advantages": torch.randn(size.batch, generator=g),
        "old_per_token_logps": flat + 0.1 * torch.randn(shape, generator=g),
        "num_items_in_batch": mask.sum(),
    }


def step_of(name: str, size: Size) -> Callable[[], tuple[float, torch.Tensor]]:
    """Return a function that runs one step and returns the loss and the gradient of the head."""
    trainer, batch = make_trainer(name, size), make_batch(size)
    head = trainer.model.get_output_embeddings().weight

    def step() -> tuple[float, torch.Tensor]:
        trainer.model.zero_grad(set_to_none=True)
        loss = trainer._compute_loss(trainer.model, dict(batch))
        loss.backward()
        return loss.item(), head.grad

    return step


def peak_bytes(name: str, size: Size) -> int | None:
    """Return the peak memory of one step beyond the memory before it, gradients of every parameter included."""
    step_of(name, QUICK)()  # this loads libraries and starts thread pools
    torch.ones(512, 512) @ torch.ones(512, 512)
    return memory.peak_of(step_of(name, size))


def measure(size: Size, rounds: int) -> list[Record]:
    """Return a record per trainer. This raises AssertionError where the two do not compute the same."""
    steps = {name: step_of(name, size) for name in TRAINERS}
    (their_loss, theirs), (our_loss, ours) = (step() for step in steps.values())
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if error > AGREEMENT or abs(our_loss - their_loss) > AGREEMENT * abs(their_loss):
        raise AssertionError(f"losses {our_loss} and {their_loss}, head gradients {error} apart: nothing is timed")
    seconds = interleaved_seconds(steps, rounds)
    medians = {name: statistics.median(samples) for name, samples in seconds.items()}
    peaks = {}
    for name in TRAINERS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(peak_bytes, name, size).result()
    return [
        {
            "benchmark": "trainers", "size": asdict(size), "dtype": "float32", "trainer": name, "gradient_error": error,
            "seconds": [round(sample, 6) for sample in seconds[name]], "median_s": medians[name],
            "min_s": min(seconds[name]), "max_s": max(seconds[name]),
            "time_ratio": medians[name] / medians["GRPOTrainer"], "peak_extra_bytes": peaks[name],
        }
        for name in TRAINERS
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("benchmarks.trainers", __doc__)
    cli.add_quick(parser, "a tiny batch")
    cli.add_out(parser, RESULTS)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each trainer (default 7)")
    options = parser.parse_args(argv)
    size, rounds = (QUICK, 2) if options.quick else (FULL, options.rounds)
    source = provenance(cli.command(parser, options))
    records = [{**record, **source} for record in measure(size, rounds)]
    out = cli.results(options, RESULTS)
    if out is not None:
        write(out, records)
    print(render(records))
    return 0


def render(records: Sequence[Record]) -> str:
    """Return the Markdown of a comparison of trainers."""
    size = records[0]["size"]
    rows = []
    for record in records:
        peak = record["peak_extra_bytes"]
        peak = NOTHING if peak is None else f"{peak / 2**20:.0f}"
        rows.append((record["trainer"], milliseconds(record), times(record["time_ratio"]), peak))
    return "\n".join([
        "One training step on a batch of {batch} × ({prompt} + {completion}) tokens, a {layers}-layer Qwen3 with "
        "H={hidden} and V={vocab},".format(**size),
        f"{records[0]['dtype']}, the loss and its backward through the whole model:",
        "",
        table(("trainer", "median ms (min to max)", "relative to GRPOTrainer", "peak extra MiB"), rows),
        "",
        origin(records[:1], len(records[0]["seconds"])),
    ])  # fmt: skip


BLOCKS = (Block("trainers", "trainers", "trainers.jsonl", "docs/integrations/trl.md", render),)


if __name__ == "__main__":
    sys.exit(main())
