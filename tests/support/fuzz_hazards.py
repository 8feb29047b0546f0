"""Hazards make one valid token's value wrong or unusual, poison fills masked ones; here too is what a call should then
do.

`wrong` collects the arguments that a call must refuse. A hazard that finds nothing to act on leaves the case plain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

OLD = {
    "old -inf": -math.inf, "old nan": math.nan, "old 0": 0.0, "old +0.005": 0.005, "old -1e4": -1e4, "old +0.5": 0.5,
}  # fmt: skip
ADVANTAGE = {"advantage 1e10": 1e10, "advantage 1e30": 1e30, "advantage inf": math.inf, "advantage nan": math.nan}
TARGET = {"target -100": -100, "target V": None, "target 2^40": 2**40}


def apply_hazard(builder, hazard: str) -> None:
    where = builder.counted.nonzero()
    at = tuple(where[builder.case.seed % len(where)].tolist()) if len(where) else None
    policy = builder.case.call == "policy"
    if hazard in OLD and policy and builder.old is not None and at is not None:
        _set_old(builder, hazard, at)
    elif hazard in ADVANTAGE and policy:
        _set_advantage(builder, ADVANTAGE[hazard], at)
    elif hazard == "advantages 0":
        builder.advantages = torch.zeros_like(builder.advantages)
    elif hazard in TARGET and at is not None:
        builder.targets[at] = builder.vocab if TARGET[hazard] is None else TARGET[hazard]
        builder.wrong.add("targets")
    elif hazard.startswith("ban") or hazard.endswith("logit"):
        _spoil_logits(builder, hazard, at)
    elif hazard == "mask 2" and builder.mask is not None and at is not None and builder.case.mask != "bool":
        builder.mask[at] = 2
        builder.wrong.add("mask")
    elif hazard.startswith("temperature"):
        _set_option(builder, "temperature", 0.0 if hazard.endswith(" 0") else 1e-9, at)
    elif hazard == "normalizer 0" and isinstance(builder.options.get("normalizer"), Tensor):
        builder.options["normalizer"] = torch.tensor(0.0)
        builder.wrong.add("normalizer")
    elif hazard == "weight nan":
        _set_option(builder, "token_weights", math.nan, at)
    elif hazard == "coefficient nan" and isinstance(builder.options.get("reduction"), tuple) and at is not None:
        builder.options["reduction"][0][at] = math.nan
        builder.wrong.add("reduction")
    elif hazard.startswith("ref"):
        _set_option(builder, "ref_logprobs", {"nan": math.nan, "-inf": -math.inf, "+0.5": 0.5}[hazard.split()[1]], at)


def _set_old(builder, hazard: str, at: tuple[int, ...]) -> None:
    builder.old[at] = OLD[hazard]
    if hazard == "old +0.5":
        builder.wrong.add("old_logprobs")


def _set_advantage(builder, value: float, at) -> None:
    if builder.case.side_dtype == "f16" and math.isfinite(value):
        return  # that dtype does not have this number
    shape = builder.advantages.shape
    if shape != builder.targets.shape:
        if not builder.advantages.numel():
            return
        builder.advantages.view(-1)[0] = value
        first = builder.counted
        if builder.case.packed:
            first = first[: builder.case.packed[0]]
        else:
            first = first.flatten(0, -2)[0]
        reached = bool(first.any())
    elif at is None:
        return
    else:
        builder.advantages[at] = value
        reached = True
    if reached and not abs(value) <= 1e12:
        builder.wrong.add("advantages")


def _set_option(builder, name: str, value: float, at) -> None:
    tensor = builder.options.get(name)
    if not isinstance(tensor, Tensor) or (tensor.dim() and at is None):
        return
    if not tensor.dim():
        tensor.fill_(value)
    else:
        tensor[at if tensor.shape == builder.targets.shape else at[:-1]] = value
    if builder.counted.any():
        builder.wrong.add(name)


def _spoil_logits(builder, hazard: str, at) -> None:
    """Put -inf, NaN or +inf into ready logits. With a head, -inf comes from the bias and NaN from a hidden state."""
    logits, tensors = builder.tensors.get("logits"), builder.tensors
    if at is None:
        return
    if hazard == "ban columns":
        columns = [j for j in range(builder.vocab) if j % 2 and not (builder.targets == j).any()]
        _ban(builder, logits, (..., columns))
    elif hazard == "ban target":
        _ban(builder, logits, (*at, builder.targets[at].item()))
    elif hazard == "ban row":
        _ban(builder, logits, (*at, slice(None)))
    else:
        value = math.nan if hazard == "nan logit" else math.inf
        if logits is not None:
            logits[(*at, builder.case.seed % builder.vocab)] = value
        else:
            tensors["hidden"] = tensors["hidden"].contiguous()
            tensors["hidden"][(*at, 0)] = value


def _ban(builder, logits, index) -> None:
    if logits is not None:
        logits[index] = -math.inf
    elif "bias" in builder.tensors:
        builder.tensors["bias"][index[-1]] = -math.inf


def apply_poison(builder) -> None:
    """Put NaN and infinities into the masked entries of everything per token, and -100 into their targets."""
    off = ~builder.counted
    if not off.any():
        return
    values = torch.tensor([math.nan, math.inf, -math.inf])

    def spoil(x):
        if not isinstance(x, Tensor) or x.shape[: off.dim()] != off.shape or not x.dim():
            return x
        mask = off.reshape(off.shape + (1,) * (x.dim() - off.dim())).expand_as(x)
        poison = values[torch.randint(3, x.shape, generator=builder.g)].to(x.dtype)
        return torch.where(mask, poison if x.is_floating_point() else torch.full_like(x, -100), x)

    for name in ("hidden", "logits"):
        if name in builder.tensors:
            builder.tensors[name] = spoil(builder.tensors[name])
    builder.targets, builder.old = spoil(builder.targets), spoil(builder.old)
    if builder.advantages.shape == builder.targets.shape:
        builder.advantages = spoil(builder.advantages)
    for name in ("temperature", "token_weights", "ref_logprobs"):
        value = builder.options.get(name)
        if isinstance(value, Tensor) and value.shape == off.shape:
            builder.options[name] = spoil(value)
    if "kept_ids" in builder.options:
        builder.options["kept_ids"] = spoil(builder.options["kept_ids"])
    if isinstance(builder.options.get("reduction"), tuple):
        builder.options["reduction"] = tuple(map(spoil, builder.options["reduction"]))
