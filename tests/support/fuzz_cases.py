"""A fuzz case is a frozen record of plain values, drawn by hypothesis, from which its tensors are made.

A record prints as Python that makes it again, so a failing example is rerun by pasting it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import problems
from problems import Problem, generator

FLOAT = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MASKS = {"bool": torch.bool, "i64": torch.int64, "u8": torch.uint8, **FLOAT}
# These things may be wrong or unusual about one valid token, or about all of them where the name says so.
HAZARDS = (
    "old -inf", "old nan", "old 0", "old +0.005", "old -1e4", "old +0.5",
    "advantage 1e10", "advantage 1e30", "advantage inf", "advantage nan", "advantages 0",
    "target -100", "target V", "target 2^40", "ban columns", "ban target", "ban row", "nan logit", "inf logit",
    "weight nan", "ref nan", "ref -inf", "ref +0.5", "coefficient nan", "temperature 0", "temperature 1e-9",
    "mask 2", "normalizer 0",
)  # fmt: skip
OBJECTIVES = (*problems.SPECS, "user")


@dataclass(frozen=True)
class Case:
    """The defaults are the plainest call, and shrinking moves towards them."""

    seed: int = 0
    form: str = "linear"
    call: str = "policy"
    shape: tuple[int, ...] = (2, 3)
    packed: tuple[int, ...] = ()  # lengths of the sequences of a packed batch, in place of `shape`
    hidden: int = 3
    vocab: int = 5
    dtype: str = "f32"
    weight_dtype: str = "f32"  # for autocast; otherwise the weight has `dtype`
    autocast: str | None = None
    side_dtype: str = "f32"  # dtype of old_logprobs, advantages and the like
    scale: float = 1.0  # of the logits
    offset: float = 0.0
    spread: float = 0.3  # of the log-ratios
    layout: str = "plain"
    mask: str | None = None
    masked: str = "some"
    poison: bool = False
    hazard: str | None = None
    objective: str = "drpo-default"
    on_policy: bool = False
    advantages: str = "token"
    reduction: str = "token-mean"
    normalizer: str | None = None
    temperature: str = "1"
    softcap: float | None = None
    logit_scale: float = 1.0
    padding: int = 0
    kept: int = 0  # number of ids beside the target that a token was sampled from; 0 means the whole vocabulary
    bias: bool = False
    kl: str | None = None
    kl_importance: bool = False
    entropy_coef: float = 0.0
    z_loss_coef: float = 0.0
    token_weights: bool = False
    compact: str = "active"
    workspace: int | None = None
    logits_dtype: str | None = None
    frozen: str = ""
    upstream: float = 1.0
    inplace: bool = False
    triton: bool = False

    def __repr__(self) -> str:
        """Print only what differs from the defaults, so that a failing example can be read at once."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Case({', '.join(changed)})"


def _choice(*values):
    return st.sampled_from(values)


_PLAIN = (None,) * len(HAZARDS)  # half of the cases have no hazard
CASES = st.builds(
    Case,
    seed=st.integers(0, 2**16),
    form=_choice("linear", "logits"),
    call=_choice("policy", "policy", "policy", "logprobs"),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 6))
    | st.tuples(st.integers(1, 3), st.integers(1, 5))
    | st.tuples(st.integers(0, 9))
    | st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)),
    packed=st.just(()) | st.just(()) | st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 8) | st.integers(1, 64),
    dtype=_choice("f32", "f32", "f64", "bf16", "f16"),
    weight_dtype=_choice("f32", "bf16", "f16"),
    autocast=_choice(None, None, None, None, "bf16", "f16"),
    side_dtype=_choice("f32", "f32", "f64", "bf16", "f16"),
    scale=_choice(1.0, 0.0, 4.0, 30.0),
    offset=_choice(0.0, 0.0, 0.0, 1e4, -1e4, -60.0),
    spread=_choice(0.3, 0.0, 2.0, 30.0),
    layout=_choice("plain", "transposed", "sliced", "offset", "expanded"),
    mask=_choice("bool", None, *MASKS),
    masked=_choice("some", "some", "some", "none", "all", "sequence"),
    poison=st.booleans(),
    hazard=_choice(*_PLAIN, *HAZARDS),
    objective=_choice(*OBJECTIVES),
    on_policy=_choice(False, False, False, True),
    advantages=_choice("token", "token", "sparse", "sequence", "column"),
    reduction=_choice(*problems.REDUCTIONS, "coefficients"),
    normalizer=_choice(None, None, "number", "tensor"),
    temperature=_choice("1", "0.1", "10", "0-d", "token", "sequence", "column"),
    softcap=_choice(None, None, 5.0, 0.5),
    logit_scale=_choice(1.0, 0.25, 3.0),
    padding=_choice(0, 0, 1, 3),
    kept=_choice(0, 0, 0, 0, 1, 5),
    bias=st.booleans(),
    kl=_choice(None, None, "k1", "k2", "k3"),
    kl_importance=st.booleans(),
    entropy_coef=_choice(0.0, 0.0, 0.2, -0.1),
    z_loss_coef=_choice(0.0, 0.0, 0.05, -0.02),
    token_weights=st.booleans(),
    compact=_choice("active", "mask", "none"),
    workspace=_choice(None, 1, 64, 640, 1 << 14),
    logits_dtype=_choice(None, None, None, "f32", "bf16"),
    frozen=_choice("", "", "", "weight", "hidden", "both"),
    upstream=_choice(1.0, 3.7, -0.5, 1024.0),
    inplace=st.booleans(),
    triton=_choice(*[False] * 39, True),
)


@dataclass(frozen=True)
class Built:
    """A case's tensors as a `Problem` with the call's options, and what to ask of the oracle."""

    case: Case
    problem: Problem
    counted: Tensor  # bool, shaped like targets: in the mask
    expected_errors: frozenset[str]  # names of the arguments that are wrong; a call must raise and name one

    @property
    def spec(self):
        return USER_SPEC if self.case.objective == "user" else problems.SPECS[self.case.objective]


def user_formula(x, delta):
    """Return the loss of the README's example, DRPO without |A|, for the oracle's rows."""
    return x.old.exp() * (x.ratio - 1) ** 2 / (2 * delta) - x.adv * x.ratio


USER_SPEC = (user_formula, {"delta": 0.4})


def build(case: Case) -> Built:
    return _Builder(case).built()


class _Builder:
    def __init__(self, case: Case):
        self.case = case = _consistent(case)
        self.g = generator(case.seed)
        self.shape = (sum(case.packed),) if case.packed else case.shape
        self.vocab = max(case.vocab - case.padding, 1)
        self.wrong: set[str] = set()
        self.options = self._scalar_options()
        self._logits()
        self._mask()
        self._per_token()

    def normal(self, *shape):
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.g, dtype=torch.float64)

    def side(self, values: Tensor) -> Tensor:
        return values.to(FLOAT[self.case.side_dtype])

    def _scalar_options(self) -> dict:
        case = self.case
        options = {"softcap": case.softcap, "logit_scale": case.logit_scale}
        if self.vocab < case.vocab:
            options["vocab_size"] = self.vocab
        if case.form == "linear":
            options["workspace_bytes"] = case.workspace
            options["logits_dtype"] = FLOAT.get(case.logits_dtype)
        if case.temperature in ("1", "0.1", "10"):
            options["temperature"] = float(case.temperature)
        else:
            shape = {"0-d": (), "token": self.shape, "sequence": self.shape[:-1], "column": (*self.shape[:-1], 1)}
            options["temperature"] = self.side(0.5 + self.uniform(*shape[case.temperature]))
        return options

    def _logits(self) -> None:
        """Make the targets, and around them hidden and weight, or logits."""
        case = self.case
        self.targets = torch.randint(self.vocab, self.shape, generator=self.g)
        hidden = self.normal(*self.shape, case.hidden)
        if case.layout == "expanded":
            hidden = hidden.new_zeros(hidden.shape) + self.normal(case.hidden)
        weight = self.normal(case.vocab, case.hidden) * case.scale / math.sqrt(case.hidden)
        bias = self.normal(case.vocab) + case.offset if case.bias or case.offset else None
        if case.form == "logits":
            logits = hidden @ weight.T + (0 if bias is None else bias)
            self.tensors = {"logits": logits.to(FLOAT[case.dtype])}
            return
        kinds = FLOAT[case.dtype], FLOAT[case.weight_dtype if case.autocast else case.dtype]
        self.tensors = {"hidden": hidden.to(kinds[0]), "weight": weight.to(kinds[1])}
        if bias is not None:
            self.tensors["bias"] = bias.to(kinds[1])

    def _mask(self) -> None:
        case, shape = self.case, self.shape
        self.counted = torch.ones(shape, dtype=torch.bool)
        self.mask = None
        if case.mask is None:
            return
        if case.masked == "some":
            self.counted = self.uniform(*shape) < 0.7
        elif case.masked == "all":
            self.counted = torch.zeros(shape, dtype=torch.bool)
        elif case.masked == "sequence" and shape and shape[0]:
            self.counted[0] = False
        self.mask = self.counted.to(MASKS[case.mask])

    def _per_token(self) -> None:
        case, shape, options = self.case, self.shape, self.options
        leaves = {name: x.double() for name, x in self.tensors.items()}
        raw = leaves["logits"] if case.form == "logits" else leaves["hidden"] @ leaves["weight"].T
        raw = raw + leaves["bias"] if "bias" in leaves else raw
        if case.kept:
            ids = torch.randint(-2, self.vocab, (*shape, case.kept), generator=self.g)
            options["kept_ids"] = torch.cat([ids, self.targets[..., None]], -1)
        logp = _logprobs(raw, self.targets, options, shape)
        # Every log-prob is scorable here. One that is not is a hazard of its own, and nothing else of its token is
        # read.
        old = (logp + case.spread * self.normal(*shape)).clamp(-99, -1e-3)
        self.old = None if case.on_policy else self.side(old)
        self.advantages = self._advantages()
        if case.call == "logprobs":
            return
        options["reduction"] = case.reduction
        if case.reduction == "coefficients":
            options["reduction"] = tuple(self.side(self.uniform(*shape)) for _ in range(4))
        elif case.normalizer:
            options["normalizer"] = 7 if case.normalizer == "number" else torch.tensor(7.0)
        options |= {"horizon": 5, "compact": case.compact, "entropy_coef": case.entropy_coef}
        options["z_loss_coef"] = case.z_loss_coef
        if case.packed:
            options["cu_seqlens"] = torch.tensor([0, *case.packed]).cumsum(0).to(torch.int32)
        if case.kl:
            ref = (logp + min(case.spread, 2.0) * self.normal(*shape)).clamp(-900, -1e-3)
            options |= {"kl_coef": 0.3, "kl_estimator": case.kl, "ref_logprobs": self.side(ref)}
            options["kl_importance"] = case.kl_importance
        if case.token_weights:
            options["token_weights"] = self.side(2 * self.uniform(*shape))

    def _advantages(self) -> Tensor:
        case, shape = self.case, self.shape
        if case.advantages == "sequence":
            return self.side(self.normal(len(case.packed)) if case.packed else self.normal(*shape[:-1]))
        if case.advantages == "column":
            return self.side(self.normal(*shape[:-1], 1))
        advantages = self.normal(*shape)
        return self.side(advantages * (self.uniform(*shape) < 0.4) if case.advantages == "sparse" else advantages)

    def built(self) -> Built:
        from fuzz_hazards import apply_hazard, apply_poison

        if self.case.hazard:
            apply_hazard(self, self.case.hazard)
        if self.case.poison:
            apply_poison(self)
        per_token = ("hidden", "weight", "bias", "logits")
        tensors = {name: laid_out(self.tensors.get(name), self.case.layout) for name in per_token}
        rest = {"targets": self.targets, "old_logprobs": self.old, "advantages": self.advantages, "mask": self.mask}
        rest = {name: laid_out(x, self.case.layout) for name, x in rest.items()}
        options = {key: laid_out(x, self.case.layout) for key, x in self.options.items()}
        problem = Problem(**tensors, **rest, options=options)
        return Built(self.case, problem, self.counted, frozenset(self.wrong))


def _consistent(case: Case) -> Case:
    """Return the case without options that exclude each other, where the plainer one wins."""
    changes = {}
    if case.call == "logprobs":
        changes |= {"packed": (), "inplace": False}
    flat = len(case.shape) == 1 and not changes.get("packed", case.packed)
    if flat or case.packed:
        changes["temperature"] = "token" if case.temperature in ("sequence", "column") else case.temperature
        if case.advantages == "column" or (flat and case.advantages == "sequence"):
            changes["advantages"] = "token"
    if flat:
        changes["reduction"] = "token-mean" if case.reduction.startswith("seq-") else case.reduction
        changes["objective"] = "drpo-active" if case.objective.startswith("gspo") else case.objective
    if case.form == "logits" or case.dtype == "f64":
        changes["autocast"] = None
    if case.dtype == "f64" or case.form == "logits" or case.kept:
        changes["logits_dtype"] = None
    if case.triton:
        changes |= {"vocab": min(case.vocab, 24), "shape": tuple(min(n, 2) for n in case.shape)}
        changes["packed"] = tuple(min(n, 2) for n in changes.get("packed", case.packed))
    return replace(case, **changes)


def _logprobs(raw: Tensor, targets: Tensor, options: dict, shape) -> Tensor:
    """Return the policy's own log-probs in fp64, around which old and reference ones are drawn."""
    transform = problems.transform_of(options)
    heat = problems.oracle.spread(transform.pop("temperature"), shape).unsqueeze(-1)
    z = problems.oracle.transform(raw.reshape(-1, raw.shape[-1]), heat, **transform)
    if "kept_ids" in options:
        z = problems.oracle.kept_only(z, options["kept_ids"].flatten(0, -2))
    return problems.oracle.statistics(z, targets.reshape(-1))[0].reshape(shape)


def laid_out(x, layout: str):
    """Return the same values behind other strides or at another storage offset, or with a stride of 0 where all rows
    are equal.
    """
    if not isinstance(x, Tensor) or not x.dim():
        return x
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.stack([x, torch.ones_like(x)], dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat([torch.ones_like(x[:1]), x])[1:] if len(x) else x
    if layout == "expanded" and len(x) and torch.equal(x, x[:1].expand_as(x)):
        return x[:1].expand_as(x)
    return x
