"""Tests of what shows only with size, a stream or a graph: offsets beyond 2^31, 64k tokens in a workspace, CUDA graph
capture, synchronisation.

The `full` sizes need a GPU; the `tiny` ones run the same lines anywhere.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import drpo_kernels as dk
import oracle
from drpo_kernels.backends import sweep
from drpo_kernels.backends.rows import Field, RowBatch, RowKind, Terms, Transform
from drpo_kernels.backends.triton.launch import TritonRows
from problems import row_relative

GIB = 1 << 30
DRPO = ("DRPO", {"delta": 0.2})
# The bound of a row of dlogits, norm-wise: bf16 rounds an entry by up to 2^-8, and the target's is most of its row.
GRADIENT = {torch.float32: 5e-5, torch.bfloat16: 4e-3}
# The bound of a row of dX, which is rounded too: by 0.4 · 2^-8 over its entries, plus 2^-24 · V/16 for truncated sums.
HIDDEN_GRADIENT = GRADIENT | {torch.bfloat16: 1.5 * 2**-8}
WHOLE, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A call has T = `tokens`, H = `hidden` and V = `vocab`. `tiny` sizes are float32, because the interpreter
    truncates to bf16.
    """

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype = HALF


def sizes(tiny: Size, large: bool = False, **full: Size):
    marks = [pytest.mark.gpu, *([pytest.mark.large] if large else [])]
    cases = [pytest.param(size, id=name, marks=marks) for name, size in full.items()]
    return pytest.mark.parametrize("size", [pytest.param(tiny, id="tiny"), *cases])


TINY = Size(6, 8, 70, WHOLE)
REAL = Size(4096, 1024, 151_936)


class Inputs:
    """These are trained-looking rows on the device, and the arguments of a call."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0):
        g = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device)

        self.weight = normal(size.vocab, size.hidden).div_(size.hidden**0.5).to(size.dtype)
        self.targets = torch.randint(size.vocab, (size.tokens,), generator=g, device=device)
        pull = 2 + 8 * torch.rand(size.tokens, 1, generator=g, device=device)
        self.hidden = (normal(size.tokens, size.hidden) + pull * self.weight[self.targets].float()).to(size.dtype)
        self.old = -4 * torch.rand(size.tokens, generator=g, device=device)
        self.advantages = normal(size.tokens)
        # a quarter of the rows is masked
        self.mask = torch.rand(size.tokens, generator=g, device=device) < 0.75
        self.mask[0] = self.mask[-1] = True
        self.dtype, self.device = size.dtype, device

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.targets, self.old, self.advantages, self.mask

    def some_rows(self, count: int = 64) -> Tensor:
        """Return the first and the last row and some between them. All of them contribute."""
        valid = self.mask.nonzero()[:, 0]
        return valid[torch.linspace(0, len(valid) - 1, min(count, len(valid)), device=self.device).long()]

    def check(self, logprobs: Tensor, gradient: Tensor, rows: Tensor, *, softcap=None, logits=None) -> None:
        """Compare the log-probs, and dX or dlogits, of these rows with float64 under "token-sum"."""
        leaf = (self.hidden if logits is None else logits)[rows].detach().double().requires_grad_()
        x = leaf if logits is not None else leaf @ self.weight.double().T
        want, _ = oracle.statistics(oracle.transform(x, 1.0, softcap=softcap), self.targets[rows])
        fields = oracle.Rows(want, self.old[rows].double(), self.advantages[rows].double(), None)
        (want_gradient,) = torch.autograd.grad(oracle.token_loss(DRPO, fields).sum(), leaf)
        bound, gradient_bound = 1e-4, GRADIENT[self.dtype]
        if logits is None:  # tensor cores truncate while they add
            bound = max(bound, self.hidden.shape[1] / 16 * 2**-24 * x.abs().max().item())
            gradient_bound = HIDDEN_GRADIENT[self.dtype]
        assert (logprobs - want).abs().max() <= bound
        assert row_relative(gradient, want_gradient) <= gradient_bound


def options(**changes) -> dict:
    """Return the options of every call here. The loss is a sum, so that a row's gradient depends on no other row."""
    return {"backend": "triton", "objective": dk.DRPO(delta=0.2), "reduction": "token-sum", "validate": False} | changes


def gradients(inputs: Inputs, frozen: bool = False, **changes) -> tuple[Tensor, ...]:
    """Return (log-probs, loss, dX, and dW unless frozen) of the linear path."""
    leaves = [inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_(not frozen)]
    out = dk.linear_policy_loss(*leaves, *inputs.arguments, **options(**changes))
    return out.logprobs, out.loss.detach(), *torch.autograd.grad(out.loss, leaves[: 1 if frozen else 2])


def recomputed(inputs: Inputs, **changes) -> tuple[Tensor, ...]:
    """Return (log-probs, entropy, dX, dW) of the recompute path."""
    leaves = [inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()]
    changes = {"backend": "triton", "validate": False} | changes
    logprobs, entropy = dk.linear_token_logprobs(*leaves, inputs.targets, **changes)
    slopes = [inputs.advantages, inputs.old]
    return logprobs.detach(), entropy.detach(), *torch.autograd.grad([logprobs, entropy], leaves, slopes)


def from_logits(inputs: Inputs, **changes) -> tuple[Tensor, ...]:
    """Return (log-probs, loss, dlogits) from ready logits."""
    leaf = (inputs.hidden @ inputs.weight.T).requires_grad_()
    out = dk.policy_loss(leaf, *inputs.arguments, **options(**changes))
    return out.logprobs, out.loss.detach(), *torch.autograd.grad(out.loss, leaf)


ROUTES = {"fused": gradients, "recompute": recomputed, "logits": from_logits}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def same(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Return whether all tensors are the same bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


# --- offsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["linear", "logits"])
@sizes(TINY, large=True, full=Size(8_400, 64, 262_208))
def test_widest_vocabulary(size, form, device):
    """Gemma has this vocabulary and a soft-cap, and T·V is beyond 2^31."""
    inputs = Inputs(size, device)
    rows = inputs.some_rows()
    if form == "linear":
        logprobs, _, found, _ = gradients(inputs, softcap=30.0)
        inputs.check(logprobs[rows], found[rows], rows, softcap=30.0)
    else:
        logits = (inputs.hidden @ inputs.weight.T).requires_grad_()
        out = dk.policy_loss(logits, *inputs.arguments, **options(softcap=30.0))
        (found,) = torch.autograd.grad(out.loss, logits)
        inputs.check(out.logprobs[rows], found[rows], rows, softcap=30.0, logits=logits)
        assert not found[~inputs.mask].any()


@pytest.mark.parametrize("view", ["shifted", "padded"])
@sizes(TINY, large=True, full=Size(16_500, 64, 131_072))
def test_rows_that_are_not_contiguous(size, view, device):
    """The rows are `logits[:, :-1]` of three sequences, or columns of a padded vocabulary. Their gradient, too, has
    offsets beyond 2^31.
    """
    inputs, sequences = Inputs(size, device), 3
    whole = inputs.hidden @ inputs.weight.T
    if view == "shifted":
        buffer = whole.new_full((sequences, size.tokens // sequences + 1, size.vocab), float("nan"))
        buffer[:, :-1] = whole.view(sequences, -1, size.vocab)
    else:
        buffer = whole.new_full((sequences, size.tokens // sequences, size.vocab + 24), float("nan"))
        buffer[..., : size.vocab] = whole.view(sequences, -1, size.vocab)
    leaf = buffer.requires_grad_()
    logits = leaf[:, :-1] if view == "shifted" else leaf[..., : size.vocab]
    assert not logits.is_contiguous()
    shaped = [x.view(sequences, -1) for x in inputs.arguments]
    out = dk.policy_loss(logits, *shaped, **options())
    (found,) = torch.autograd.grad(out.loss, leaf)
    inside, outside = (found[:, :-1], found[:, -1]) if view == "shifted" else found.split([size.vocab, 24], -1)
    assert not outside.any()
    rows, length = inputs.some_rows(), shaped[0].shape[1]
    inputs.check(out.logprobs.flatten()[rows], inside[rows // length, rows % length], rows, logits=whole)


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes(step: Callable[[], object], device: torch.device) -> tuple[object, int]:
    """Return (what `step` returns, the bytes at its peak beyond those before it). The bytes are 0 on a CPU, whose
    allocator does not count them.
    """
    if device.type == "cpu":
        return step(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@sizes(
    TINY,
    large=True,
    long=Size(65_600, 1024, 151_936),
    retained=Size(8_192, 4096, 151_936),
    retained_beyond_int32=Size(19_200, 8192, 151_936),  # a quarter of its rows is masked
)
def test_peak_memory(size, frozen, device):
    """The workspace is a GiB, and there are more rows than a grid dimension holds. Beside it there is a float32 dW, or
    the retained bf16 dlogits.
    """
    inputs, workspace = Inputs(size, device), GIB
    # this loads libraries, with workspaces of their own
    gradients(Inputs(Size(4, size.hidden, 64, size.dtype), device))
    (logprobs, _, dx, *dw), peak = peak_bytes(lambda: gradients(inputs, frozen, workspace_bytes=workspace), device)
    active, hidden, vocab = int(inputs.mask.sum()), size.hidden, size.vocab
    beside = 0 if frozen else max(4 * vocab * hidden, 2 * active * vocab if active <= 2 * hidden else 0)
    returned = dx.nbytes + sum(gradient.nbytes for gradient in dw)
    assert peak - returned <= workspace + beside + 0.1 * GIB, f"{(peak - returned) / GIB:.2f} GiB"
    rows = inputs.some_rows()
    inputs.check(logprobs[rows], dx[rows], rows)


# --- graphs, streams, synchronisation ---------------------------------------------------------------------------------


def captured(step: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """Return `step` as a CUDA graph that reads its inputs where they are. On a CPU, which has no graphs, return `step`
    itself.
    """
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


@every_route
@sizes(TINY, full=REAL)
def test_graph(size, route, device):
    """A replay has the bits of the eager call, on new values too. The policy losses need compact="none" for it."""
    inputs, others = Inputs(size, device), Inputs(size, device, seed=1)
    changes = {} if route is recomputed else {"compact": "none"}
    want, want_others = copies(route(inputs, **changes)), copies(route(others, **changes))
    replay = captured(lambda: route(inputs, **changes), device)
    assert same(replay(), want)
    for name in ("hidden", "weight", "targets", "old", "advantages", "mask"):
        getattr(inputs, name).copy_(getattr(others, name))
    assert same(replay(), want_others) and not same(want, want_others)


@every_route
@sizes(TINY, large=True, full=REAL)
def test_two_streams(size, route, device):
    """Two batches run at once, and neither uses the other's buffers."""
    batches = [Inputs(size, device, seed) for seed in (0, 1)]
    want = [copies(route(batch)) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches] if device.type == "cuda" else [None, None]
    found = []
    for _ in range(2):
        for batch, stream in zip(batches, streams, strict=True):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(route(batch))
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert all(same(result, want[i % 2]) for i, result in enumerate(found))


class RefusesReads(TorchFunctionMode):
    """Raise where the host reads a tensor's value, as a GPU's debug mode does, on any device."""

    READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", None) in self.READS:
            raise RuntimeError(f"{function.__name__} reads from the device")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_synchronisation(device: torch.device):
    if device.type == "cpu":
        with RefusesReads():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("route", ROUTES)
@sizes(TINY, full=REAL)
def test_no_synchronisation(size, route, device):
    """With compact="none" the host reads nothing back. Compaction reads one count, which shows that the test sees
    reads.
    """
    inputs = Inputs(size, device)
    head = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    logits = (inputs.hidden @ inputs.weight.T).detach().requires_grad_()

    def call(compact: str = "none") -> Tensor:
        if route == "recompute":
            logprobs, entropy = dk.linear_token_logprobs(*head, inputs.targets, backend="triton", validate=False)
            return logprobs.sum() + entropy.sum()
        if route == "logits":
            return dk.policy_loss(logits, *inputs.arguments, **options(compact=compact)).loss
        return dk.linear_policy_loss(*head, *inputs.arguments, **options(compact=compact)).loss

    call().backward()  # this compiles the kernels
    with no_synchronisation(device):
        loss = call()
    # On a CPU the backward of a policy loss reads the upstream factor, which costs nothing there.
    watched = device.type == "cuda" or route == "recompute"
    with no_synchronisation(device) if watched else contextlib.nullcontext():
        loss.backward()
    if route == "fused":
        with pytest.raises(RuntimeError), no_synchronisation(device):
            call(compact="active")


# --- bits -------------------------------------------------------------------------------------------------------------


@every_route
@sizes(TINY, full=REAL)
def test_run_to_run(size, route, device):
    inputs = Inputs(size, device)
    want = copies(route(inputs))
    for _ in range(2):
        assert same(route(inputs), want)


@pytest.mark.parametrize("dtype", [WHOLE, HALF, torch.float16], ids=str)
@sizes(Size(3, 8, 2500, WHOLE), full=Size(2048, 64, 151_936), odd=Size(2048, 64, 151_937))
def test_gradient_over_the_logits(size, dtype, device):
    """The gradient is written over the row that it is computed from, bitwise as into a buffer of its own: no store
    overtakes a load.
    """
    inputs = Inputs(size, device)
    logits = (inputs.hidden @ inputs.weight.T).to(dtype)
    rows = torch.zeros(len(Field), size.tokens, device=device)
    rows[Field.OLD_LOGPROB], rows[Field.ADVANTAGE], rows[Field.POLICY] = inputs.old, inputs.advantages, 1
    rows[Field.INV_TEMPERATURE], rows[Field.KIND] = 1, RowKind.ACTIVE
    ops, terms = TritonRows(), Terms(dk.DRPO(delta=0.2))
    slopes = inputs.advantages[None].contiguous()

    def written(over: bool, fused: bool) -> tuple[Tensor, Tensor]:
        batch = RowBatch(logits.clone(), inputs.targets, rows, Transform())
        out = batch.logits if over else torch.full_like(logits, float("nan"))
        if fused:
            return ops.policy(batch, terms, out), out
        statistics = ops.statistics(batch)
        ops.write_gradient(batch, statistics, slopes, out)
        return statistics, out

    for fused in (True, False):
        want = written(over=False, fused=fused)
        assert all(same(written(over=True, fused=fused), want) for _ in range(3))


@pytest.mark.parametrize("logits_dtype", [None, HALF], ids=str)
@sizes(TINY, chunked=Size(4096, 1024, 151_936), retained=Size(1024, 1024, 151_936))
def test_no_store_over_logits_of_another_size(size, logits_dtype, device, monkeypatch):
    """bf16 dlogits over float32 logits land on elements that another thread may not have read yet."""
    seen = []

    class Watching(TritonRows):
        def policy(self, batch, terms, out, factors=None):
            shared = out is not None and batch.logits.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
            seen.append((shared, out is not None and out.element_size() == batch.logits.element_size()))
            return super().policy(batch, terms, out, factors)

    monkeypatch.setattr(sweep, "row_ops", lambda name: Watching())
    gradients(Inputs(size, device), logits_dtype=logits_dtype)
    assert seen and all(same_size for shared, same_size in seen if shared)
