"""What examples/smollm_arithmetic.py shows of a run: tables, a comparison with other losses, picture and record."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table
from torch import Tensor
from transformers.utils import logging as transformers_logging

from benchmarks.harness.peers import TRL_CHUNK
from benchmarks.harness.provenance import provenance
from drpo_kernels import Objective, Tokens, linear_policy_loss
from drpo_kernels.demo.measure import median_times, peak_extra_bytes
from drpo_kernels.demo.plots import BLUE, GREEN, INK, MUTED, ORANGE, label_axes
from drpo_kernels.tokens import Sequences

# Bounds on the distance of two gradients, relative and in norm. Float32 rounding over a few hundred tokens stays below
# the first. Under bf16 autocast the other losses round their logits to 16 bits, which costs percents.
TOLERANCE, BF16_TOLERANCE = 1e-4, 0.2
VIOLET = "#7c3aed"
# The metrics that are kept of each optimizer step: TRL's names, and under drpo/ those of `linear_policy_loss`. A token
# is "weighted" if its advantage is not 0, so 1 - weighted / tokens is the share of tokens with A = 0.
METRICS = (
    "step", "reward", "frac_reward_zero_std", "completions/mean_length", "loss", "grad_norm", "entropy",
    "drpo/prob_shift_mean", "drpo/weight_mean", "drpo/weight_min", "drpo/weight_max", "drpo/beyond_trust_region",
    "drpo/tokens", "drpo/weighted", "step_time",
)  # fmt: skip


class Clock:
    """The seconds of each part of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 1), now

    def total(self) -> float:
        return time.perf_counter() - self._start


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return f"{found.get('cpu_name') or 'a CPU'}, {torch.get_num_threads()} threads"


def be_quiet() -> None:
    """Leave the screen to the progress bar and the tables: no notes on renamed options, no bars of other libraries.

    What this package says of a run's metrics (`drpo_kernels.diagnose`) is still printed.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)


# --- before and after -------------------------------------------------------------------------------------------------


def accuracy_table(before: dict[str, Any], after: dict[str, Any], problems: int) -> Table:
    table = Table(
        title=f"{problems} held-out sums: share of right answers",
        caption="Exact: the number and nothing else, as in the reward.\nLenient: the right number first, whatever "
        "follows.\nWhat lenient gains is arithmetic; the rest is form.",
        caption_justify="left",
    )
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="right" if column else "left")
    titles = {"exact": "greedy, exact", "lenient": "greedy, lenient", "reward": "sampled at temperature 1, exact"}
    for key, title in titles.items():
        gain = f"{100 * (after[key] - before[key]):+.0f} points"
        table.add_row(title, f"{before[key]:.0%}", f"{after[key]:.0%}", gain)
    return table


def numbers(evaluation: dict[str, Any]) -> dict[str, float]:
    """An evaluation without its texts."""
    return {name: value for name, value in evaluation.items() if name != "texts"}


def transcripts(prompts: Sequence[str], before: dict[str, Any], after: dict[str, Any], rows: int = 6) -> Table:
    """The first held-out sums with their greedy completions; " ..." marks one that did not end by itself."""
    table = Table(title="Greedy completions of the same held-out sums")
    for column in ("prompt ends in", "before", "after"):
        table.add_column(column)
    for prompt, *texts in list(zip(prompts, before["texts"], after["texts"], strict=True))[:rows]:
        table.add_row(prompt, *(repr(text.strip())[1:-1] for text in texts))
    return table


# --- the same batch through three losses ------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The N completion tokens of a rollout, packed: hidden [N, H], weight [V, H], all others [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    cu_seqlens: Tensor  # [S + 1], where each completion begins and ends
    objective: Objective


class Compared(NamedTuple):
    """One loss on the batch. The gradients' distances are relative to `linear_policy_loss`'s, in norm."""

    name: str
    trained_head: bool
    seconds: float
    peak_bytes: int
    distances: tuple[float, ...]  # of the gradient of hidden and, with a trained head, of the head
    agrees: bool  # within the tolerance


@torch.no_grad()
def batch_of(model: Any, inputs: dict[str, Tensor], objective: Objective) -> Batch:
    """A batch of TRL's trainer, with hidden states of the trained model."""
    mask = inputs["completion_mask"].bool()
    ids, attention = (
        torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
    )
    hidden = model.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    lengths = mask.sum(1).tolist()
    return Batch(
        hidden[:, -mask.shape[1] - 1 : -1][mask],  # position i predicts token i + 1
        model.lm_head.weight,
        inputs["completion_ids"][mask],
        inputs["old_per_token_logps"][mask],
        inputs["advantages"][:, None].expand(mask.shape)[mask],
        torch.tensor(list(accumulate(lengths, initial=0)), device=mask.device),
        objective,
    )


def fused(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """What `DRPOTrainer` calls, with its settings: rows with A = 0 get the forward that TRL's metrics need."""
    return linear_policy_loss(
        hidden, weight, batch.targets, batch.old_logprobs, batch.advantages, objective=batch.objective,
        cu_seqlens=batch.cu_seqlens, compact="mask",
    ).loss  # fmt: skip


def eager(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """All the logits [N, V] at once, their log-softmax at the targets, the objective's formula, autograd.

    It is written with logsumexp: on a CPU, `log_softmax` of 49,152 float32 logits is off by up to 1e-4, 10 times more.
    """
    logits = (hidden @ weight.T).float()
    return _mean_loss(batch, logits.gather(-1, batch.targets[:, None])[:, 0] - logits.logsumexp(-1))


def trl_head(batch: Batch, hidden: Tensor, weight: Tensor) -> Tensor:
    """TRL's head, called on the completions' tokens alone, and the objective's formula on its log-probs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = (hidden, weight, None, batch.targets, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return _mean_loss(batch, ChunkedLogProbFunction.apply(*arguments)[0])


def _mean_loss(batch: Batch, logprobs: Tensor) -> Tensor:
    valid = torch.ones_like(batch.targets, dtype=torch.bool)
    sequences = Sequences(batch.targets.shape, batch.cu_seqlens)
    tokens = Tokens(logprobs, batch.old_logprobs, batch.advantages, valid=valid, sequences=sequences)
    return batch.objective.token_loss(tokens).mean()


LOSSES = {"linear_policy_loss": fused, "eager PyTorch": eager, "TRL's fused head": trl_head}


def compare_losses(batch: Batch, bf16: bool, repeats: int) -> list[Compared]:
    """Time, memory and gradients of forward and backward, with the head frozen as in the run, and with it trained."""
    device, results = batch.hidden.device, []
    for trained_head in (False, True):
        runs = [_forward_backward(batch, loss, trained_head, bf16) for loss in LOSSES.values()]
        expected, *_ = gradients = [run() for run in runs]
        distances = [tuple(map(_distance, found, expected)) for found in gradients]
        peaks = [peak_extra_bytes(run, device) for run in runs]
        seconds = median_times(runs, device, repeats)
        for name, *measured, apart in zip(LOSSES, seconds, peaks, distances, strict=True):
            agrees = max(apart) < (BF16_TOLERANCE if bf16 else TOLERANCE)
            results.append(Compared(name, trained_head, *measured, apart, agrees))
    return results


def _forward_backward(batch: Batch, loss: Callable, trained_head: bool, bf16: bool) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        hidden = batch.hidden.detach().requires_grad_()
        weight = batch.weight.detach().requires_grad_(trained_head)
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
            value = loss(batch, hidden, weight)
        return torch.autograd.grad(value, [hidden, weight] if trained_head else [hidden])

    return run


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def comparison_table(batch: Batch, compared: Sequence[Compared]) -> Table:
    (tokens, width), vocabulary = batch.hidden.shape, len(batch.weight)
    table = Table(
        title=f"{batch.objective} on a batch of the run, forward and backward",
        caption=f"{tokens} tokens, {int((batch.advantages != 0).sum())} of them with an advantage; width {width}, "
        f"vocabulary {vocabulary:,}.\nPeak extra memory includes the gradients.\nGradients: |theirs - ours| / |ours| "
        "of hidden states and of the head.",
        caption_justify="left",
    )
    for column in ("head", "loss", "time", "peak extra memory", "gradients"):
        table.add_column(column, justify="left" if column in ("head", "loss") else "right")
    for found in compared:
        if found.name == next(iter(LOSSES)) and found.trained_head:
            table.add_section()
        apart = ", ".join(f"{distance:.0e}" for distance in found.distances)
        table.add_row(
            "trained" if found.trained_head else "frozen", found.name, f"{1e3 * found.seconds:.0f} ms",
            f"{found.peak_bytes / 2**20:.0f} MiB", "-" if found.name == next(iter(LOSSES)) else apart,
        )  # fmt: skip
    return table


# --- the record and the picture ---------------------------------------------------------------------------------------


def header(command: str, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The first line of a record: the settings, and the device, versions, commit, command and date of the run."""
    return {"benchmark": "smollm", "settings": settings, **provenance(command, torch.device(device))}


def write_history(
    path: Path, first: dict[str, Any], history: Sequence[dict[str, float]], results: dict[str, Any]
) -> None:
    """One JSON object a line: the header, then each optimizer step, then the results."""
    steps = [
        {name: float(f"{step[name]:.6g}") if name != "step" else step[name] for name in METRICS if name in step}
        for step in history
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (first, *steps, results)))


def plot_run(
    history: Sequence[dict[str, float]], updates: int, before: dict, after: dict, title: str, path: Path
) -> None:
    """Reward, entropy, |π - μ| and w over the optimizer steps.

    The first update of a rollout has π = μ, so that |π - μ| = 0 and w = 1: only the later ones are drawn.
    """
    figure = Figure(figsize=(9.6, 6.2), dpi=100, layout="constrained")
    (reward, entropy), (shift, weight) = figure.subplots(2, 2, sharex=True)
    later = [step for step in history if (step["step"] - 1) % updates]
    rollouts = [step for step in history if "reward" in step]

    def series(steps: Sequence[dict[str, float]], name: str) -> np.ndarray:
        return np.array([step[name] for step in steps])

    style = {"linewidth": 2, "marker": "o", "markersize": 3.5}
    ends = [0, history[-1]["step"]]
    reward.plot(series(rollouts, "step"), series(rollouts, "reward"), color=BLUE, label="rollouts, sampled", **style)
    for name, fill, size in (("lenient", "white", 9), ("exact", INK, 5)):
        values = [before[name], after[name]]
        reward.plot(ends, values, "D", color=INK, markerfacecolor=fill, markersize=size, zorder=4, clip_on=False,
                    label=f"held-out sums, greedy, {name}")  # fmt: skip
    reward.set_ylim(0, 1)
    reward.legend(frameon=False, loc="upper left", fontsize=9)
    label_axes(reward, "Reward", "share of right answers")

    entropy.plot(series(history, "step"), series(history, "entropy"), color=ORANGE, **style)
    entropy.set_ylim(bottom=0)
    label_axes(entropy, "Entropy", "nats per token")

    shift.plot(series(later, "step"), series(later, "drpo/prob_shift_mean"), color=GREEN, **style)
    shift.set_ylim(bottom=0)
    label_axes(shift, "Mean |π - μ|, later updates of a rollout", "probability")

    low, mean, high = (series(later, f"drpo/weight_{name}") for name in ("min", "mean", "max"))
    weight.axhline(1, color=MUTED, linewidth=0.8)
    weight.fill_between(series(later, "step"), low, high, color=VIOLET, alpha=0.15, linewidth=0, label="least to most")
    weight.plot(series(later, "step"), mean, color=VIOLET, label="mean over tokens", **style)
    weight.set_ylim(min(low) - 0.1, 1.35 * max(high))  # room for the legend
    weight.legend(frameon=False, loc="upper left", fontsize=9, ncols=2)
    label_axes(weight, "Gradient weight w, later updates of a rollout", "w (the gradient is -A r w)")
    for axes in (shift, weight):
        axes.set_xlabel("optimizer step", color=MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
