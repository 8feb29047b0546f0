"""`token_losses`: an objective's `token_loss`, checked to return one loss per token from that token alone.

Without the checks these mistakes would be silent: a mean makes every gradient N times too small, a detached loss trains
on nothing, and a loss that mixes tokens depends on how many of them fit into a chunk.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from drpo_kernels.graphs import own_graph, traced
from drpo_kernels.objective import Objective, is_built_in
from drpo_kernels.tokens import Tokens

# An objective is tried on MADE_UP made-up tokens, and on at most OWN tokens of a call.
MADE_UP, OWN = 64, 1024
# The loss and slope of a token may differ by this much between two calls with other tokens beside it, relative to
# themselves and to 1 + |A| (1 + r): in float32, vectorised functions round according to a token's place.
TOLERANCE = 1e-4
# At most MOST_TRIED kinds of settings are remembered. Settings of one kind differ only in their numbers, as those of an
# annealed objective do in every step; the first MOST_VALUES settings of a kind are tried.
MOST_TRIED, MOST_VALUES = 1000, 16
_tried: dict[tuple, set[tuple[float, ...]]] = {}


def token_losses(objective: Objective, tokens: Tokens) -> Tensor:
    """ℓ of each token, [N] in the dtype of the log-probs, differentiable in `tokens.logprobs` if they require grad.

    At the first use of an objective of this class with these settings, it is also tried on a few tokens, together and
    in parts. Raises TypeError or ValueError, naming the objective, for a result that is not one differentiable loss per
    token, or that mixes tokens without `sequence_level`.
    """
    if traced(tokens.logprobs):  # a graph can neither ask `is_built_in` nor read which settings were tried
        tokens = _copied(tokens)
    elif not is_built_in(objective):
        tokens = _copied(tokens)
        _try_on_own(objective, tokens)
    losses, wanted = objective.token_loss(tokens), tokens.logprobs
    name = _name(objective)
    if not isinstance(losses, Tensor) or not losses.dtype.is_floating_point:
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"{name} must return a tensor of float losses, got {kind}")
    if losses.shape != wanted.shape:
        raise ValueError(
            f"{name} must return one loss per token, of shape {tuple(wanted.shape)}, got {tuple(losses.shape)}: means "
            "and sums over tokens are the business of `reduction`"
        )
    if wanted.requires_grad and not losses.requires_grad:
        raise not_differentiable(objective)
    return losses.to(wanted.dtype)


def _copied(tokens: Tokens) -> Tokens:
    """Tokens with copies of the constants, because an objective may write to them and the KL term reads them too."""
    old, advantages = tokens.old_logprobs.clone(), tokens.advantages.clone()
    return Tokens(tokens.logprobs, old, advantages, valid=tokens.valid, sequences=tokens.sequences)


def not_differentiable(objective: Objective) -> ValueError:
    return ValueError(
        f"{_name(objective)} must be differentiable in tokens.logprobs, got a loss detached from them. Where there is "
        "nothing to learn, return 0 * tokens.logprobs"
    )


def _name(objective: Objective) -> str:
    return f"{type(objective).__name__}.token_loss"


# --- trying an objective ----------------------------------------------------------------------------------------------


def check_objective(objective: Objective, like: Tensor, alone: bool) -> None:
    """Try an objective once for its settings, on made-up tokens in the dtype and on the device of `like`. `alone` says
    that only log π will get a gradient.

    Raises ValueError, naming the objective, if it mixes tokens without `sequence_level`, if its `zero_if_no_advantage`
    is not true, or if it would leave a tensor that requires grad without a gradient.
    """
    if traced(like) or is_built_in(objective) or objective.sequence_level:
        return
    with _once(objective, like.device, "made up") as new:
        if new:
            fields = _made_up(like)
            _require_no_mixing(objective, fields)
            _require_nothing_without_advantage(objective, fields)
    if alone and torch.is_grad_enabled():
        with _once(objective, like.device, "alone") as new:
            if new:
                _require_no_other_gradient(objective, _made_up(like))


def _try_on_own(objective: Objective, tokens: Tokens) -> None:
    """Try the objective on some tokens of the call, which may reach branches that made-up tokens do not reach."""
    if objective.sequence_level:
        return
    check_objective(objective, tokens.logprobs, alone=False)
    with _once(objective, tokens.logprobs.device, "own") as new:
        if new:
            _require_no_mixing(objective, _own(tokens))


def _made_up(like: Tensor) -> Tensor:
    """(log π, log μ, A, coefficient of the loss), [4, MADE_UP]: ratios of 0.1 to 10 and advantages of both signs."""
    # Multiples of an irrational number modulo 1 spread evenly and never repeat.
    steps = torch.tensor([0.618034, 0.754878, 0.569840, 0.414214], dtype=torch.float64)
    even = (torch.arange(1, MADE_UP + 1, dtype=torch.float64) * steps[:, None]) % 1
    old = -0.01 - 8 * even[0].square()
    shift = torch.where(old > -3, 1, 4.6) * (even[1] - 0.5)
    fields = torch.stack([(old + shift).clamp(max=-0.001), old, 4 * even[2] - 2, 0.5 + even[3]])
    return fields.to(device=like.device, dtype=like.dtype)


def _own(tokens: Tokens) -> Tensor:
    """(log π, log μ, A, coefficient of the loss) of the first tokens of a call, [4, at most OWN]."""
    fields = [x.detach()[:OWN] for x in (tokens.logprobs, tokens.old_logprobs, tokens.advantages)]
    coefficients = 0.5 + torch.arange(len(fields[0]), device=fields[0].device) * 0.414214 % 1
    return torch.stack([*fields, coefficients.to(fields[0].dtype)])


def _require_no_mixing(objective: Objective, fields: Tensor) -> None:
    count = fields.shape[1]
    try:
        together, again = (_losses_and_slopes(objective, fields) for _ in range(2))
    except Exception:
        return  # it may need what made-up tokens do not have; if it fails on the call's own tokens, the call raises
    if count < 2 or not torch.equal(together.nan_to_num(), again.nan_to_num()):
        return  # nothing can be told about an objective that draws random numbers
    parts = [slice(0, None, 2), slice(1, None, 2), slice(count - 1, None)]
    try:
        apart = [_losses_and_slopes(objective, fields[:, part]) for part in parts]
    except Exception as error:
        raise ValueError(
            f"{_name(objective)} must take any number of tokens, as many as fit into a chunk: it works for {count} and "
            f"not for each of {count - count // 2}, {count // 2} and 1"
        ) from error
    logprobs, old, advantages, _ = fields
    size = TOLERANCE * (1 + advantages.abs() * (1 + (logprobs - old).clamp(-20, 20).exp()))
    for part, found in zip(parts, apart, strict=True):
        wanted, size_of_part = together[:, part], size[part]
        close = (found - wanted).abs() <= size_of_part + TOLERANCE * wanted.abs()
        wrong = ~(close | (found == wanted) | (found.isnan() & wanted.isnan())).all(0)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"{_name(objective)} must give a token the same loss and gradient whatever tokens are beside it, got "
                f"losses and slopes {wanted[:, i].tolist()} among {count} tokens and {found[:, i].tolist()} among "
                f"{found.shape[1]}: its result would depend on the size of a chunk. An objective that needs other "
                "tokens declares sequence_level = True"
            )


def _require_nothing_without_advantage(objective: Objective, fields: Tensor) -> None:
    if not objective.zero_if_no_advantage:
        return
    without = fields.clone()
    without[2] = 0
    try:
        found = _losses_and_slopes(objective, without)
    except Exception:
        return
    if (found != 0).any():
        raise ValueError(
            f"{type(objective).__name__}.zero_if_no_advantage must be False, got True: the token_loss of a token with "
            "A = 0 is not 0, or has a slope, and such tokens would be left out"
        )


def _require_no_other_gradient(objective: Objective, fields: Tensor) -> None:
    """Search autograd's graph of the losses for another tensor that requires grad."""
    with own_graph():
        logprobs, old, advantages, coefficients = (row.clone() for row in fields)
        try:
            losses = objective.token_loss(Tokens(logprobs.requires_grad_(), old, advantages))
            torch.autograd.grad(losses, logprobs, coefficients)  # this frees what the graph has saved
        except Exception:
            return
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", logprobs)
        if variable is not logprobs:
            raise ValueError(
                f"{_name(objective)} has a tensor in it that requires grad, of shape {tuple(variable.shape)}, and "
                "would leave it without a gradient: detach it, or use reduction='none' or backend='reference', which "
                "differentiate the loss in everything"
            )
        pending.extend(following for following, _ in node.next_functions)


def _losses_and_slopes(objective: Objective, fields: Tensor) -> Tensor:
    """-> losses and slopes [2, n] of tokens [4, n]. Raises what the objective raises, or if the losses are not [n]."""
    with own_graph():
        logprobs, old, advantages, coefficients = (row.clone() for row in fields)
        losses = objective.token_loss(Tokens(logprobs.requires_grad_(), old, advantages))
        (slope,) = torch.autograd.grad(losses, logprobs, coefficients)
        return torch.stack([losses.detach(), slope])


# --- what has been tried ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _once(objective: Objective, device: torch.device, *of: object) -> Iterator[bool]:
    """Yields True if the body shall try the objective: its settings are new, and fewer than MOST_VALUES settings of
    their kind have been tried. A body that raises runs again the next time. The caller's random state stays as it is.
    """
    numbers: list[float] = []
    kind = (*of, _Same(type(objective).token_loss), *_settings(objective, numbers))
    values = _tried.get(kind, ())
    new = len(values) < MOST_VALUES and tuple(numbers) not in values
    if not new:
        yield False
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield True
    if len(_tried) >= MOST_TRIED:
        _tried.clear()
    _tried.setdefault(kind, set()).add(tuple(numbers))


class _Same:
    """A key that equals only another key of the same living object."""

    def __init__(self, value: object):
        self._hash = hash((type(value), id(value)))
        try:
            self._get: Callable[[], object] = weakref.ref(value)
        except TypeError:
            self._get = lambda: value  # this keeps the value alive, so no other object gets its id

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        value = self._get()
        return isinstance(other, _Same) and value is not None and value is other._get()


def _settings(value: object, numbers: list[float]) -> tuple:
    """The class and attributes of an objective, as far as they can be compared. Settings that may change in every step
    are appended to `numbers` instead: floats, and how often a tensor was written to.
    """
    return (type(value), *((name, _setting(attribute, numbers)) for name, attribute in _attributes(value)))


def _setting(value: object, numbers: list[float]) -> object:
    if isinstance(value, float):
        numbers.append(float(value))
        return float
    if value is None or isinstance(value, str | int):
        return type(value), value
    if isinstance(value, tuple):
        return type(value), *(_setting(item, numbers) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if value.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # the typing stubs lack it
            return _settings(value, numbers)
        return _Same(value)
    if isinstance(value, Tensor) and not value.is_inference():
        numbers.append(value._version)
        return _Same(value), value.requires_grad
    return _Same(value)


def _attributes(value: object) -> Iterator[tuple[str, object]]:
    yield from getattr(value, "__dict__", {}).items()
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield name, getattr(value, name)
