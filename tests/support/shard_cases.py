"""Cases of a head that is split by vocabulary, for test_distributed.py: every rank has the numbers of one process."""

from dataclasses import dataclass

import torch

import drpo_kernels as dk
import problems
from distributed_harness import CASES, agree, case, local_head
from drpo_kernels.distributed import VocabShard
from problems import SMALL_WORKSPACE, SPECS, full_problem, random_problem, relative, replace

# The rows of the head on each of n ranks. "padded" has 37 real rows, of which the last rank has none.
SPLITS = {
    2: {"even": (20, 20), "uneven": (4, 33), "padded": (37, 9)},
    4: {"even": (10, 10, 10, 10), "uneven": (1, 20, 3, 13), "padded": (16, 16, 10, 10)},
}
REAL = 37


@dataclass(frozen=True)
class Squared(dk.Objective):
    """This objective of a user has no Triton twin, and rows without an advantage count in it."""

    def token_loss(self, tokens):
        return tokens.ratio_minus_one.square() - tokens.advantages * tokens.ratio


def squared(x):
    return (x.ratio - 1) ** 2 - x.adv * x.ratio


def split_problem(world, problem, split):
    """Return (the problem with this rank's rows of the head, its shard)."""
    weight = torch.split(problem.weight, SPLITS[world.size][split])[world.rank]
    shard = VocabShard.gather(weight.to(world.device))
    assert shard.sizes == SPLITS[world.size][split]
    return local_head(problem, shard), shard


def cpu(tensors):
    return {name: None if x is None else x.detach().cpu() for name, x in tensors.items()}


def whole_gradients(world, grads):
    """Join the gradients of every rank's rows of the head. That of hidden must be bitwise the same on all ranks."""
    every = world.everyone(cpu(grads))
    if "hidden" in grads:
        assert all(torch.equal(rank["hidden"], every[0]["hidden"]) for rank in every), "ranks differ in dX"
    joined = {name: torch.cat([rank[name] for rank in every]) for name in grads if name != "hidden"}
    return joined | {name: every[0][name] for name in grads if name == "hidden"}


# Each dtype has the gradients' largest distance from one process, and from float64. In 16 bits they are rounded once
# more, and a last bit that differs costs up to 2^-9.
# bit that differs costs up to 2^-9.
BOUNDS = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 5e-5),
    torch.bfloat16: (4e-3, 4e-3),
    torch.float16: (1e-3, 4e-3),
}


def poisoned(problem):
    """Put NaN and targets outside the vocabulary into the masked positions."""
    off = ~problem.mask
    hidden = problem.hidden.masked_fill(off[..., None], torch.nan)
    rest = {name: getattr(problem, name).masked_fill(off, torch.nan) for name in ("old_logprobs", "advantages")}
    return replace(problem, hidden=hidden, targets=problem.targets.masked_fill(off, -100), **rest)


def run_wanted(problem, objective, backend, device, frozen, **extra):
    """Return (output, gradients) of a call in which the leaves named in `frozen` require no gradient."""
    leaves = {k: v.detach().to(device).requires_grad_(k not in frozen) for k, v in problem.leaves().items()}
    out = problems.call(problem, objective, backend, device, leaves, **extra)
    wanted = [name for name in leaves if name not in frozen]
    grads = torch.autograd.grad(out.loss * 3.7, [leaves[name] for name in wanted])
    return out, dict(zip(wanted, grads, strict=True))


@case("drpo", spec="drpo-active", split="uneven", workspace_bytes=SMALL_WORKSPACE)
@case("default-workspace", spec="ppo", split="even")
@case("padded", spec="dppo-kl", split="padded", compact="mask", workspace_bytes=SMALL_WORKSPACE)
@case("every-row", spec="cispo", split="uneven", compact="none", poison=True, workspace_bytes=SMALL_WORKSPACE)
@case("poisoned", spec="ppo-dual", split="even", poison=True, workspace_bytes=SMALL_WORKSPACE)
@case("gspo", spec="gspo", split="padded", workspace_bytes=SMALL_WORKSPACE)
@case("user", spec=(squared, {}), split="uneven", workspace_bytes=SMALL_WORKSPACE)
@case("bare", spec="drpo-default", split="uneven", make=random_problem, workspace_bytes=SMALL_WORKSPACE)
@case("float64", spec="drpo-active", split="padded", dtype=torch.float64, workspace_bytes=2 * SMALL_WORKSPACE)
@case("bf16", spec="drpo-active", split="uneven", dtype=torch.bfloat16, workspace_bytes=SMALL_WORKSPACE)
@case("bf16-chunked", spec="spo", split="padded", dtype=torch.bfloat16, shape=(8, 6), workspace_bytes=SMALL_WORKSPACE)
@case("fp16", spec="ppo", split="padded", dtype=torch.float16, workspace_bytes=SMALL_WORKSPACE)
@case("frozen-head", spec="drpo-active", split="uneven", frozen=("weight", "bias"), workspace_bytes=SMALL_WORKSPACE)
@case("frozen-hidden", spec="drpo-active", split="padded", frozen=("hidden",), workspace_bytes=SMALL_WORKSPACE)
@case("triton", spec="drpo-active", split="padded", backend="triton", shape=(2, 3), workspace_bytes=SMALL_WORKSPACE)
@case("triton-bare", spec="ppo", split="uneven", backend="triton", shape=(2, 3), make=random_problem)
@case("triton-bf16", spec="drpo-active", split="even", backend="triton", shape=(2, 3), dtype=torch.bfloat16)
@case("triton-gspo", spec="gspo", split="even", backend="triton", shape=(2, 3))
def policy(
    world, spec, split, backend="torch", shape=(4, 6), dtype=torch.float32, make=full_problem, frozen=(), poison=False,
    **extra,
):  # fmt: skip
    """The loss, log-probs, entropy, metrics and all gradients are those of one process."""
    total = sum(SPLITS[world.size][split])
    padding = {"vocab_size": REAL} if total > REAL else {}
    clean = make(len(split) + shape[0], shape, 12, total, dtype, **padding)
    problem = poisoned(clean) if poison else clean
    spec = SPECS[spec] if isinstance(spec, str) else spec
    objective = Squared() if spec[0] is squared else problems.build(spec)
    mine, shard = split_problem(world, problem, split)
    out, grads = run_wanted(mine, objective, backend, world.device, frozen, vocab_shard=shard, **extra)
    everyone = world.everyone(cpu(out._asdict() | {"metrics": None}))
    grads = whole_gradients(world, grads)
    if world.rank:
        return
    for name in ("loss", "logprobs", "entropy", "computed"):
        values = [rank[name].nan_to_num(1) for rank in everyone]  # rows that were left out have NaN
        assert all(torch.equal(value, values[0]) for value in values), f"ranks differ in {name}"
    single, single_grads = run_wanted(problem, objective, backend, world.device, frozen, **extra)
    exact, exact_grads = problems.solve(clean, spec, 3.7)
    bound, exact_bound = BOUNDS[dtype]
    agree(grads, single_grads, bound, exact_grads, exact_bound)
    if dtype.itemsize == 2 and "hidden" in grads:
        same = (grads["hidden"] == single_grads["hidden"].cpu()).double().mean().item()
        assert same >= 0.98, f"{same:.0%} of dX are equal: rounded before it is summed"
    assert torch.equal(out.computed, single.computed)
    closeness = 1e-12 if dtype == torch.float64 else 1e-5
    scale = exact.scale.item()
    assert abs(out.loss.item() - single.loss.item()) <= closeness * scale, (out.loss, single.loss)
    for name in ("logprobs", "entropy"):
        error = (getattr(out, name) - getattr(single, name))[out.computed].abs().max().item()
        assert error <= closeness, f"{name}: {error:.1e} from one process"
    for name, value in single.metrics.items():
        assert abs(out.metrics[name] - value) <= 10 * closeness * (1 + value.abs()), name


@case("torch", split="uneven")
@case("padded", split="padded")
@case("share", split="even", partial_hidden_gradient=True)
def kept_ids(world, split, partial_hidden_gradient=False):
    """The sampler's ids are of the whole head, and every rank holds some of them."""
    total = sum(SPLITS[world.size][split])
    problem = full_problem(9, (4, 6), 12, total, **({"vocab_size": REAL} if total > REAL else {}))
    ids = torch.randint(-3, REAL, (4, 6, 8), generator=problems.generator(10))
    ids[..., 5] = problem.targets
    problem = problem.with_options(kept_ids=ids)
    mine, shard = split_problem(world, problem, split)
    shard = replace(shard, partial_hidden_gradient=partial_hidden_gradient)
    leaves = {name: value.detach().to(world.device).requires_grad_() for name, value in mine.leaves().items()}
    problems.call(mine, dk.DRPO(delta=0.15), "torch", world.device, leaves, vocab_shard=shard).loss.backward()
    if partial_hidden_gradient:
        leaves["hidden"].grad = sum(world.everyone(leaves["hidden"].grad.cpu())).to(world.device)
    found = whole_gradients(world, {name: x.grad for name, x in leaves.items()})
    whole = {name: value.detach().requires_grad_() for name, value in problem.leaves().items()}
    problems.call(problem, dk.DRPO(delta=0.15), "torch", torch.device("cpu"), whole).loss.backward()
    agree(found, {name: x.grad for name, x in whole.items()}, BOUNDS[torch.float32][0])


@case("main-grad", split="uneven")
@case("main-grad-padded", split="padded")
def main_grad(world, split):
    """Every rank adds the gradient of its own rows to its own buffer."""
    total = sum(SPLITS[world.size][split])
    problem = full_problem(8, (4, 6), 12, total, **({"vocab_size": REAL} if total > REAL else {}))
    mine, shard = split_problem(world, problem, split)
    leaves = {name: value.detach().to(world.device).requires_grad_() for name, value in mine.leaves().items()}
    buffer = torch.zeros_like(leaves["weight"])
    options = {"vocab_shard": shard, "main_grad": buffer, "loss_scale": 3.7, "workspace_bytes": SMALL_WORKSPACE}
    loss = problems.call(mine, dk.DRPO(delta=0.15), "torch", world.device, leaves, **options).loss
    (3.7 * loss).backward()
    assert leaves["weight"].grad is None
    found = whole_gradients(world, {name: x.grad for name, x in leaves.items()} | {"weight": buffer})
    if not world.rank:
        _, exact = problems.solve(problem, SPECS["drpo-active"], 3.7)
        assert all(relative(found[name], want) <= BOUNDS[torch.float32][1] for name, want in exact.items())


@case("torch", split="padded", shape=(4, 6))
@case("uneven", split="uneven", shape=(4, 6))
@case("triton", split="uneven", backend="triton", shape=(2, 3))
def logprobs(world, split, shape, backend="torch"):
    """The recompute path has targets in every shard, and its backward runs twice."""
    total = sum(SPLITS[world.size][split])
    problem = random_problem(6, shape, 12, total, bias=True)
    real = min(REAL, total)
    problem = replace(problem, targets=torch.linspace(0, real - 1, problem.targets.numel()).round().long().view(shape))
    mine, shard = split_problem(world, problem, split)
    slopes = torch.randn(2, *shape, generator=problems.generator(7)).to(world.device)

    def run(problem, mask, **options):
        leaves = {k: v.detach().to(world.device).requires_grad_() for k, v in problem.leaves().items()}
        result = dk.linear_token_logprobs(
            leaves["hidden"], leaves["weight"], problem.targets.to(world.device), bias=leaves["bias"], mask=mask,
            softcap=9.0, vocab_size=real, backend=backend, workspace_bytes=SMALL_WORKSPACE, **options,
        )  # fmt: skip
        values = (slopes[0] * result[0]).sum(), (slopes[0] * result[0] + slopes[1] * result[1]).sum()
        grads = [torch.autograd.grad(value, list(leaves.values()), retain_graph=True) for value in values]
        return torch.stack(result), [dict(zip(leaves, g, strict=True)) for g in grads]

    for mask in (None, problem.mask.to(world.device)):
        result, grads = run(mine, mask, vocab_shard=shard)
        grads = [whole_gradients(world, g) for g in grads]
        single, single_grads = run(problem, mask)
        assert (result - single).abs().max().item() <= 1e-5
        for found, want in zip(grads, single_grads, strict=True):
            agree(found, want, 1e-5)


@case()
def certain(world):
    """Where p_y is within 1e-7 of 1, the gradient s · (1 - p_y) keeps its digits."""
    problem = random_problem(8, (4, 6), 12, 40)
    aim = problem.weight[problem.targets]
    problem = replace(problem, hidden=26.0 * aim / aim.square().sum(-1, keepdim=True), old_logprobs=None)
    exact, exact_grads = problems.solve(problem, SPECS["pg"])
    problem = problem.with_options(compact="mask")
    mine, shard = split_problem(world, problem, "even")
    out, grads = problems.run(mine, problems.build(SPECS["pg"]), "torch", world.device, vocab_shard=shard)
    grads = whole_gradients(world, grads)
    rows = out.computed.cpu()
    assert exact.logprobs[rows].max().item() > -1e-7
    error = (out.logprobs.cpu().double() / exact.logprobs - 1)[rows].abs().max().item()
    assert error <= 1e-4, f"log p close to 0: relative error {error:.1e}"
    agree(grads, exact_grads, 1e-4)


@case()
def partial_hidden_gradient(world):
    """Each rank returns its share of dX, for a gather whose backward adds the shares."""
    problem = random_problem(13, (4, 6), 12, sum(SPLITS[world.size]["uneven"]))
    mine, shard = split_problem(world, problem, "uneven")
    shard = VocabShard(shard.group, shard.sizes, partial_hidden_gradient=True)
    options = {"workspace_bytes": SMALL_WORKSPACE}
    _, grads = problems.run(mine, dk.DRPO(), "torch", world.device, vocab_shard=shard, **options)
    shares = [rank["hidden"] for rank in world.everyone(cpu(grads))]
    _, single = problems.run(problem, dk.DRPO(), "torch", world.device, **options)
    agree({"hidden": sum(shares)}, single, BOUNDS[torch.float32][0])
    assert relative(shares[0], single["hidden"]) > 0.1


@case()
def forward_only(world):
    problem = full_problem(9, vocab=sum(SPLITS[world.size]["uneven"]))
    mine, shard = split_problem(world, problem, "uneven")
    with torch.no_grad():
        out = problems.call(mine, dk.DRPO(), "torch", world.device, vocab_shard=shard, workspace_bytes=SMALL_WORKSPACE)
        single = problems.call(problem, dk.DRPO(), "torch", world.device)
    assert not out.loss.requires_grad
    assert (out.logprobs - single.logprobs).abs().max().item() <= 1e-5
    assert abs(out.loss.item() - single.loss.item()) <= 1e-5 * abs(single.loss.item())


@case()
def bad_target(world):
    """With the checks off, a target in no shard or in a padding row makes its row NaN, and the others stay right."""
    problem = random_problem(10, (2, 3), 12, sum(SPLITS[world.size]["padded"]), vocab_size=REAL)
    problem = replace(problem, mask=None)
    targets = problem.targets.clone()
    targets[0, 1], targets[1, 0], targets[1, 2] = -100, REAL + 1, 10**6
    mine, shard = split_problem(world, replace(problem, targets=targets), "padded")
    out, _ = problems.run(mine, dk.DRPO(), "torch", world.device, validate=False, compact="none", vocab_shard=shard)
    single = problems.call(problem, dk.DRPO(), "torch", world.device, compact="none")
    assert out.logprobs.isnan().tolist() == [[False, True, False], [True, False, True]]
    assert out.loss.isnan()
    good = ~out.logprobs.isnan()
    assert (out.logprobs - single.logprobs)[good].abs().max().item() <= 1e-5
    try:
        problems.call(mine, dk.DRPO(), "torch", world.device, vocab_shard=shard)
    except ValueError as error:
        assert f"targets must be in [0, {REAL})" in str(error)  # noqa: PT017
    else:
        raise AssertionError("targets beyond the vocabulary were accepted")


@case()
def wrong_shard(world):
    """The rank that is wrong refuses its shard before any collective."""
    weight = torch.zeros(3, 4)
    shard = VocabShard(None, (3,) * (world.size - 1) + (4,))
    try:
        dk.linear_token_logprobs(torch.zeros(2, 4), weight, torch.zeros(2, dtype=torch.long), vocab_shard=shard)
    except ValueError as error:
        assert world.rank == world.size - 1 and "weight must be the 4 rows" in str(error)  # noqa: PT017
    else:
        raise AssertionError("accepted")


CASES["wrong_shard"] = lambda world: wrong_shard(world) if world.rank == world.size - 1 else None


@case()
def fp8_head(world):
    """Each row of hidden and of the weight has its own scale, so that a shard quantises as the whole head does."""
    problem = random_problem(12, (4, 6), 16, sum(SPLITS[world.size]["uneven"]), torch.bfloat16)
    mine, shard = split_problem(world, problem, "uneven")
    options = {"head_dtype": "fp8_e4m3", "workspace_bytes": SMALL_WORKSPACE}
    out, grads = problems.run(mine, dk.DRPO(), "torch", world.device, vocab_shard=shard, **options)
    grads = whole_gradients(world, grads)
    single, single_grads = problems.run(problem, dk.DRPO(), "torch", world.device, **options)
    assert (out.logprobs - single.logprobs)[out.computed].abs().max().item() <= 1e-5
    agree(grads, single_grads, BOUNDS[torch.bfloat16][0])


@case()
def compiled(world):
    """Under torch.compile the call leaves the graph, and the numbers are those of the eager module."""
    if world.size > 2:
        return
    problem = random_problem(11, vocab=40, bias=True)
    mine, shard = split_problem(world, problem, "even")
    rest = [x.to(world.device) for x in (mine.targets, mine.old_logprobs, mine.advantages, mine.mask)]

    def loss(hidden, weight, bias, objective):
        hidden = torch.tanh(hidden)
        if objective is None:
            options = {"bias": bias, "vocab_shard": shard, "return_logsumexp": True}
            logps, entropy, logsumexp = dk.linear_token_logprobs(hidden, weight, rest[0], **options)
            return (logps * rest[2]).sum() + entropy.sum() + logsumexp.square().sum()
        return 2 * dk.linear_policy_loss(hidden, weight, *rest, bias=bias, objective=objective, vocab_shard=shard).loss

    for objective in (dk.DRPO(), dk.GSPO(), None):
        torch._dynamo.reset()
        results = []
        for function in (loss, torch.compile(loss, backend="eager")):
            leaves = [x.to(world.device).requires_grad_() for x in mine.leaves().values()]
            value = function(*leaves, objective)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        assert all(relative(a, b) <= 1e-6 for a, b in zip(*results, strict=True))
