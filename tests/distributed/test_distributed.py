"""Tests of 2 and 4 processes against one, with torchrun and gloo on the CPU and NCCL where there are as many GPUs; and
of what needs no process group.
"""

import re
import subprocess
import sys

import pytest
import torch

import drpo_kernels as dk
import problems
from drpo_kernels.distributed import global_normalizer, reduce_loss, reduce_metrics, sequence_coefficients
from drpo_kernels.evidence import EVIDENCE_METRICS
from drpo_kernels.metrics import METRICS
from drpo_kernels.reductions import REDUCE
from launcher import INTERPRETER_FAILS, ROOT, WHY, assert_cases_pass, torchrun


def assert_equal_one(processes, tmp_path, *arguments):
    report = tmp_path / "report.json"
    interpret = "0" if "nccl" in arguments else "1"
    result = torchrun(processes, "distributed_worker.py", str(report), *arguments, TRITON_INTERPRET=interpret)
    assert_cases_pass(report, *result, at_least=30)


@pytest.mark.skipif(INTERPRETER_FAILS, reason=WHY)
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_equal_one(processes, tmp_path):
    assert_equal_one(processes, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [2, 4])
def test_gpus_equal_one(processes, tmp_path):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    assert_equal_one(processes, tmp_path, "nccl")


# ---------------------------------------------------------------------------------------------------------------
# without a process group


def test_single_process_accumulation():
    """Before torch.distributed is initialised the functions see a group of one, and accumulate alone."""
    whole = problems.full_problem(1, (6, 5), dtype=torch.float64)
    single, want = problems.run(whole, dk.DRPO(), "torch")
    masks = list(whole.mask.split(2))
    normalizer = global_normalizer(masks)
    assert normalizer.dtype == torch.float64 and normalizer.dim() == 0
    assert normalizer.item() == whole.mask.sum().item()
    total, losses, metrics = 0, [], []
    for rows in torch.arange(6).split(2):
        tensors = {n: getattr(whole, n)[rows] for n in ("hidden", "targets", "old_logprobs", "advantages", "mask")}
        shaped = {k: v[rows] for k, v in whole.options.items() if isinstance(v, torch.Tensor)}
        part = problems.replace(whole, **tensors, options=whole.options | shaped)
        out, grads = problems.run(part, dk.DRPO(), "torch", normalizer=normalizer)
        total, losses, metrics = total + grads["weight"], [*losses, out.loss], [*metrics, out.metrics]
    assert problems.relative(total, want["weight"]) <= 1e-12
    assert reduce_loss(losses).item() == pytest.approx(single.loss.item(), rel=1e-12)
    for name, value in reduce_metrics(metrics).items():
        if name in problems.OF_NEIGHBOURS:
            continue
        assert value.item() == pytest.approx(single.metrics[name].item(), rel=1e-12, abs=1e-12), name


def test_normalizers():
    """The values were worked out by hand: 5 valid tokens in 3 non-empty sequences, and one old log-prob that is NaN."""
    masks = [torch.tensor([[1, 1, 0], [0, 0, 0]]), torch.tensor([[True, True, False], [False, False, True]])]
    old = [torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, torch.nan]])]
    assert global_normalizer(masks).item() == 5
    assert global_normalizer(masks, old_logprobs=old).item() == 4
    assert global_normalizer(masks, "seq-mean-token-sum").item() == 3
    assert global_normalizer(masks, "seq-mean-token-mean", old_logprobs=old).item() == 2
    assert global_normalizer(masks, "token-sum").item() == 1
    assert global_normalizer(masks, loss_divisor=2).item() == 2.5
    packed = global_normalizer(masks[1].view(-1), "seq-mean-token-mean", cu_seqlens=torch.tensor([0, 1, 3, 5, 6]))
    assert packed.item() == 3
    for nothing in ([], torch.zeros(2, 3), [torch.zeros(0, 4)]):
        assert global_normalizer(nothing, "seq-mean-token-mean").item() == 1
        assert global_normalizer(nothing).item() == 1


def test_sequence_coefficients_of_whole_sequences():
    """In a context group of one, the coefficients are those of the named reductions."""
    whole = problems.full_problem(2, dtype=torch.float64).with_options(horizon=7.0)
    for reduction in problems.REDUCTIONS:
        want = problems.call(whole.with_options(reduction=reduction), dk.DRPO(), "torch")
        coefficients = sequence_coefficients(whole.mask, reduction, context_group=None, horizon=7.0)
        got = problems.call(whole.with_options(reduction=coefficients), dk.DRPO(), "torch")
        assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-12), reduction
    assert sequence_coefficients([], "token-mean", context_group=None) == []


def test_every_metric_says_how_it_reduces():
    problem = problems.random_problem(3)
    metrics = problems.call(problem, dk.PPO(), "torch").metrics
    every = METRICS | EVIDENCE_METRICS
    assert list(metrics) == [f"drpo/{name}" for name in every]
    for name, (how, count) in every.items():
        assert how in REDUCE and METRICS[count] == ("sum", count), name
    moving = problem.mask & (problem.advantages != 0)
    assert metrics["drpo/tokens"].item() == problem.mask.sum().item()
    assert metrics["drpo/computed"].item() == metrics["drpo/weighted"].item() == moving.sum().item()


def test_errors():
    mask, metrics = torch.ones(2, 3), problems.call(problems.random_problem(4), dk.DRPO(), "torch").metrics
    group = {"context_group": None}
    for error, message, function in (
        (ValueError, "reduction must be one of", lambda: global_normalizer(mask, "mean")),
        (ValueError, "gradients must be 'mean' or 'sum', got 'avg'", lambda: global_normalizer(mask, gradients="avg")),
        (ValueError, "loss_divisor must be positive", lambda: global_normalizer(mask, loss_divisor=0)),
        (TypeError, "masks must be a tensor, got float", lambda: global_normalizer([1.0])),
        (ValueError, "cu_seqlens must be given with", lambda: global_normalizer(mask[0], "seq-mean-token-mean")),
        (ValueError, "old_logprobs must be given for each of the 1 masks, got 2",
         lambda: global_normalizer(mask, old_logprobs=[mask, mask])),
        (ValueError, "old_logprobs must be shaped like", lambda: global_normalizer(mask, old_logprobs=mask[:1])),
        (ValueError, "horizon must be given", lambda: sequence_coefficients(mask, "seq-mean-token-sum-norm", **group)),
        (ValueError, "sequence_ids and sequence_counts must be given together",
         lambda: sequence_coefficients(mask, "token-mean", sequence_counts=2, **group)),
        (ValueError, "sequence_ids must be shaped like",
         lambda: sequence_coefficients(mask, "token-mean", sequence_ids=torch.arange(2), sequence_counts=2, **group)),
        (ValueError, "sequence_ids must be given with", lambda: sequence_coefficients(mask[0], "token-mean", **group)),
        (TypeError, "metrics must be out.metrics", lambda: reduce_metrics([metrics, 1.0])),
        (ValueError, "drpo/tokens",
         lambda: reduce_metrics({k: v for k, v in metrics.items() if k != "drpo/tokens"})),
        (ValueError, "reward", lambda: reduce_metrics(metrics | {"reward": torch.zeros(())})),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            function()


WITHOUT_DISTRIBUTED = """
import torch, torch.distributed as dist
for name in set(dir(dist)) - {"is_available"}:
    if not name.startswith("__"):
        delattr(dist, name)
dist.is_available = lambda: False
import drpo_kernels as dk
from drpo_kernels.distributed import VocabShard, global_normalizer, reduce_loss
weight, hidden = torch.randn(5, 4), torch.randn(3, 4)
targets = torch.tensor([0, 1, 4])
normalizer = global_normalizer(torch.ones(3))
out = dk.linear_policy_loss(hidden, weight, targets, torch.zeros(3), torch.ones(3), normalizer=normalizer,
                            vocab_shard=VocabShard.gather(weight))
assert reduce_loss(out.loss).isfinite()
"""


def test_a_pytorch_without_distributed():
    """Some builds of PyTorch have nothing of `torch.distributed` but `is_available()`."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_DISTRIBUTED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_runs():
    """The snippets of docs/distributed.md run in order, in a group of one."""
    page = ROOT / "docs" / "distributed.md"
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(snippets) == 4
    problem = problems.random_problem(5, bias=True)
    head = torch.nn.Linear(12, 37, bias=False)
    batch = {name: getattr(problem, name) for name in ("hidden", "targets", "old_logprobs", "advantages", "mask")}
    namespace = batch | {
        "weight": head.weight, "bias": problem.bias, "vocab_size": 37, "head": head,
        "tp_group": None, "dp_group": None, "cp_group": None, "dp_cp_group": None,
        "micro_batches": [batch, batch], "backbone": lambda batch: batch["hidden"],
    }  # fmt: skip
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)
    assert namespace["metrics"]["drpo/tokens"].item() == 2 * problem.mask.sum().item()
    assert namespace["loss"].isfinite()
