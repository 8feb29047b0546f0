"""Cases of data parallelism, accumulation, context parallelism and metrics, for test_distributed.py.

However a batch is split, its numbers are those of the whole batch on one process. They are in float64, where equal
means within 1e-12.
"""

import torch
import torch.distributed as dist

import drpo_kernels as dk
import problems
from distributed_harness import agree, case, local_head
from drpo_kernels.distributed import (
    VocabShard,
    global_normalizer,
    reduce_loss,
    reduce_metrics,
    sequence_coefficients,
)
from problems import SMALL_WORKSPACE, full_problem, random_problem, replace

PER_TOKEN = ("hidden", "targets", "old_logprobs", "advantages", "mask")


def rows_of(problem, index):
    """Return the problem of the selected rows, or of [.., L] slices, with the tensors among its options cut in the same
    way.
    """
    tensors = {name: getattr(problem, name)[index] for name in PER_TOKEN}
    shaped = {k: v[index] for k, v in problem.options.items() if isinstance(v, torch.Tensor) and v.dim()}
    return replace(problem, **tensors, options=problem.options | shaped)


def big_batch(seed, dtype, shape=(9, 8)):
    """Return a batch with every kind of row, a sequence without a token, and old log-probs that are not log-probs."""
    problem = full_problem(seed, shape, 6, 19, dtype)
    old = problem.old_logprobs.clone()
    old[4, ::3], old[5, 1::4] = torch.nan, -torch.inf
    return replace(problem, old_logprobs=old)


def parameters(world, parts, objective, each=None, **options):
    """Return (summed gradients of the head by name, or None; losses; metrics) of this rank's micro-batches."""
    totals, losses, metrics = None, [], []
    for part, own in zip(parts, each or [{}] * len(parts), strict=True):
        out, grads = problems.run(part, objective, "torch", world.device, **options, **own)
        grads = {name: grads[name] for name in ("weight", "bias")}
        totals = grads if totals is None else {name: totals[name] + grads[name] for name in grads}
        losses.append(out.loss)
        metrics.append(out.metrics)
    return totals, losses, metrics


def wrapped(world, totals, like, average, divisor=1, group=None):
    """Return the gradients that a wrapper leaves in the parameters, summed or averaged over ranks. A rank that had
    nothing to do gives zeros.
    """
    size = dist.get_world_size(group) if average else 1
    result = {}
    for name in ("weight", "bias"):
        result[name] = torch.zeros_like(like[name]) if totals is None else totals[name] / divisor
        dist.all_reduce(result[name], group=group)
        result[name] /= size
    return result


def assert_metrics(found, want, bound):
    # a rank without a batch does not know that others have a reference
    want = {name: value for name, value in want.items() if name in found or name != "drpo/ref_kl"}
    for name, value in want.items():
        if name in problems.OF_NEIGHBOURS:
            continue
        assert abs(found[name].item() - value.item()) <= bound * (1 + abs(value.item())), (name, found[name], value)
    assert list(found) == list(want)


@case("fp64", dtype=torch.float64, bound=1e-12)
@case("fp32", dtype=torch.float32, bound=1e-5)
def data_parallel(world, dtype, bound):
    """A batch is split at random into ranks and micro-batches, of which some are empty, with every reduction."""
    objective = dk.DRPO(delta=0.2)
    for seed, reduction in enumerate(problems.REDUCTIONS):
        whole = big_batch(seed, dtype).with_options(reduction=reduction, horizon=11.0)
        g = problems.generator(40 + seed)
        owner = torch.randint(world.size, (9,), generator=g)
        if seed % 2:
            owner[owner == 1] = 0  # rank 1 has nothing to do
        micro = torch.randint(3, (9,), generator=g)
        parts = [rows_of(whole, (owner == world.rank) & (micro == m)) for m in range(3)]
        parts = [p for m, p in enumerate(parts) if len(p.targets) or m == seed % 3]  # one micro-batch has no rows
        parts = [] if not (owner == world.rank).any() else parts
        average, divisor = seed % 2 == 0, 3 if seed % 3 == 0 else 1
        how = {"gradients": "mean" if average else "sum", "loss_divisor": divisor}
        masks, old = world.own(p.mask for p in parts), world.own(p.old_logprobs for p in parts)
        normalizer = global_normalizer(masks, reduction, old_logprobs=old, device=world.device, **how)
        totals, losses, metrics = parameters(world, parts, objective, normalizer=normalizer)
        single, grads = problems.run(whole, objective, "torch", world.device)
        found = wrapped(world, totals, grads, average, divisor)
        loss = reduce_loss(losses, device=world.device, **how)
        reduced = reduce_metrics(metrics, device=world.device)
        agree(found, grads, bound, label=f"{reduction}: gradient")
        assert abs(loss.item() - single.loss.item()) <= bound * (1 + abs(single.loss.item())), (loss, single.loss)
        assert_metrics(reduced, single.metrics, bound)


@case()
def data_parallel_packed(world):
    """Packed micro-batches have different lengths, and their sequences are counted by cu_seqlens."""
    whole = big_batch(7, torch.float64).with_options(reduction="seq-mean-token-mean")
    objective = dk.PPO()
    _, want = problems.run(whole, objective, "torch", world.device)
    rows = [slice(start, None, 2 * world.size) for start in (world.rank, world.rank + world.size)]
    parts = [problems.packed(rows_of(whole, some)) for some in rows]
    normalizer = global_normalizer(
        world.own(p.mask for p in parts), "seq-mean-token-mean",
        cu_seqlens=world.own(p.options["cu_seqlens"] for p in parts),
        old_logprobs=world.own(p.old_logprobs for p in parts),
    )  # fmt: skip
    totals, _, _ = parameters(world, parts, objective, normalizer=normalizer)
    agree(wrapped(world, totals, want, average=True), want, 1e-12)


def context_parallel_batch(world, seed, reduction):
    whole = big_batch(seed, torch.float64, (6, 8)).with_options(reduction=reduction, horizon=11.0)
    single, grads = problems.run(whole, dk.DRPO(delta=0.2), "torch", world.device)
    return whole, single, grads


@case()
def context_parallel(world):
    """Each rank has [B, L / n] slices of every sequence, in two micro-batches. 4 ranks are 2 slices by 2 replicas."""
    slices = 2
    groups = [dist.new_group(list(range(i, i + slices))) for i in range(0, world.size, slices)]
    context, replica = groups[world.rank // slices], world.rank // slices
    for seed, reduction in enumerate(problems.REDUCTIONS):
        whole, single, grads = context_parallel_batch(world, seed, reduction)
        mine = rows_of(whole, slice(replica, None, world.size // slices))
        width = 8 // slices
        mine = rows_of(mine, (slice(None), slice(world.rank % slices * width, (world.rank % slices + 1) * width)))
        parts = [rows_of(mine, slice(None, 1)), rows_of(mine, slice(1, None))]
        average, divisor = seed % 2 == 0, 2 if seed % 3 == 0 else 1
        how = {"gradients": "mean" if average else "sum", "loss_divisor": divisor}
        coefficients = sequence_coefficients(
            world.own(p.mask for p in parts), reduction, context_group=context, horizon=11.0,
            old_logprobs=world.own(p.old_logprobs for p in parts), **how,
        )  # fmt: skip
        each = [{"reduction": c} for c in coefficients]
        totals, losses, metrics = parameters(world, parts, dk.DRPO(delta=0.2), each=each)
        agree(wrapped(world, totals, grads, average, divisor), grads, 1e-12, label=f"{reduction}: gradient")
        loss = reduce_loss(losses, **how)
        assert abs(loss.item() - single.loss.item()) <= 1e-12 * (1 + abs(single.loss.item())), reduction
        assert_metrics(reduce_metrics(metrics), single.metrics, 1e-12)


@case()
def context_parallel_striped(world):
    """Rank r holds the tokens r, r + n, ... of a packed batch, whose sequences are known by their ids."""
    whole, single, grads = context_parallel_batch(world, 3, "seq-mean-token-mean")
    ids = torch.arange(6).repeat_interleave(8)
    flat = problems.packed(whole)
    mine = rows_of(replace(flat, options=flat.options | {"cu_seqlens": None}), slice(world.rank, None, world.size))
    coefficients = sequence_coefficients(
        mine.mask.to(world.device), "seq-mean-token-mean", context_group=None,
        old_logprobs=mine.old_logprobs.to(world.device), sequence_counts=6,
        sequence_ids=ids[world.rank :: world.size].to(world.device),
    )  # fmt: skip
    totals, losses, _ = parameters(world, [mine], dk.DRPO(delta=0.2), reduction=coefficients)
    agree(wrapped(world, totals, grads, average=True), grads, 1e-12)
    assert abs(reduce_loss(losses[0]).item() - single.loss.item()) <= 1e-12


@case()
def both(world):
    """The head is split over 2 ranks, and there are 2 replicas of it."""
    if world.size != 4:
        return
    heads = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    copies = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    head, copy, replica = heads[world.rank // 2], copies[world.rank % 2], world.rank // 2
    whole = big_batch(12, torch.float64)
    single, want = problems.run(whole, dk.DRPO(delta=0.2), "torch", world.device)
    shard = VocabShard.gather(torch.split(whole.weight, (7, 12))[world.rank % 2].to(world.device), head)
    mine = rows_of(local_head(whole, shard), slice(replica * 3, 3 if replica == 0 else None))
    normalizer = global_normalizer(*world.own([mine.mask]), group=copy, old_logprobs=mine.old_logprobs.to(world.device))
    totals, losses, metrics = parameters(
        world, [mine], dk.DRPO(delta=0.2), normalizer=normalizer, vocab_shard=shard, workspace_bytes=SMALL_WORKSPACE
    )
    rows = slice(shard.start, shard.start + shard.sizes[shard.rank])
    agree(wrapped(world, totals, None, average=True, group=copy), {n: want[n][rows] for n in totals}, 1e-12)
    assert abs(reduce_loss(losses, copy).item() - single.loss.item()) <= 1e-12
    assert_metrics(reduce_metrics(metrics, copy), single.metrics, 1e-12)


@case()
def metrics_of_few(world):
    """If only one rank has rows, the means, minima and maxima are that rank's, and a NaN reaches everyone."""
    problem = random_problem(13)
    out = problems.call(problem, dk.DRPO(), "torch", world.device)
    assert out.metrics["drpo/weight_min"] > 0.5, "a zero would not be seen"
    nothing = problems.call(replace(problem, mask=torch.zeros(4, 6)), dk.DRPO(), "torch", world.device)
    last = world.rank == world.size - 1
    assert_metrics(reduce_metrics(out.metrics if last else nothing.metrics), out.metrics, 1e-6)
    assert_metrics(reduce_metrics([out.metrics] if last else [], device=world.device), out.metrics, 1e-6)
    bad = out.metrics | {"drpo/weight_max": torch.full((), torch.nan, device=world.device)}
    assert reduce_metrics(bad if last else out.metrics)["drpo/weight_max"].isnan()
