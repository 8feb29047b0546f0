"""`DRPOConfig`: TRL's `GRPOConfig` with a policy objective of this package, as an object or as text."""

import ast
import difflib
import functools
import pickle
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch

from drpo_kernels import CISPO, DPPO, DRPO, GSPO, PPO, SPO, Objective, PolicyGradient
from drpo_kernels.integrations import needs
from drpo_kernels.objective import registered_objective
from drpo_kernels.options import PolicyOptions
from drpo_kernels.validation import check_logprob_options, check_policy_options

with needs("trl", "trl>=1.16"):
    from trl import GRPOConfig

Config = TypeVar("Config", bound=type)

OBJECTIVES = (DRPO, PPO, CISPO, GSPO, SPO, DPPO, PolicyGradient)
# These loss types of TRL are aggregations. With objective=CISPO(...), "cispo" is one too and aggregates as "dapo" does.
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# Options of TRL's per-token formula, and the prefixes of options of formulas that this package does not have.
CLIP_OPTIONS = ("epsilon", "epsilon_high", "delta")
OTHER_FORMULAS = {"sapo_": "SAPO", "vespo_": "VESPO"}
CORRECTION_OPTIONS = tuple(f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max", "cap"))
# Keywords of `linear_policy_loss`, and the options of TRL that mean the same.
RENAMED = {"kl_coef": "beta", "kl_importance": "use_bias_correction_kl", "reduction": "loss_type"}
# Names that other libraries use for the bounds of PPO.
CLIPS = ("eps", "epsilon_low", "clip", "clip_range", "cliprange", "clip_ratio", "clip_ratio_low", "clip_ratio_high")
# Options of the head that the log-prob functions take as well.
HEAD_OPTIONS = ("workspace_bytes", "logits_dtype", "head_dtype", "batch_invariant", "validate")
# What to write in place of a loss type of TRL that is a formula.
FORMULAS = {
    "cispo": f"; write objective=CISPO(ratio_cap={CISPO.ratio_cap})",
    "sapo": "; write the objective SAPO of docs/integrations/trl.md, with loss_type='grpo'",
    "vespo": "; write the objective VESPO of docs/integrations/trl.md, with loss_type='dapo'",
}


def parse_objective(text: str) -> Objective:
    """The objective that a text such as "DRPO(delta=0.2)", "DRPO(0.2)" or "DRPO" names; it may be registered by a user.

    Raises ValueError for any other text, and whatever the objective raises for its values.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        values = [ast.literal_eval(value) for value in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"objective must read like 'DRPO(delta=0.2)', got {text!r}") from error
    try:
        return registered_objective(name)(*values, **keywords)
    except TypeError as error:
        raise ValueError(f"objective {text!r} has the wrong arguments: {error}") from error


def read_objective(objective: Objective | str | None) -> Objective:
    """The objective itself, or the objective that a text names.

    Raises TypeError for anything else, and ValueError for a text that names no objective or for an objective that a
    checkpoint cannot hold.
    """
    if isinstance(objective, str):
        objective = parse_objective(objective)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective such as DRPO(delta=0.2), got {objective!r}")
    try:
        pickle.dumps(objective)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"objective={objective} cannot be saved with a checkpoint: define its class at the top of a module"
        ) from error
    return objective


def _suggest(name: str, value: Any, objective: Any, options: Collection[str]) -> str:
    """What to write in place of the keyword `name`, which is not among the fields of a configuration."""
    chosen = objective.split("(")[0].strip() if isinstance(objective, str) else type(objective).__name__
    for cls in sorted(OBJECTIVES, key=lambda cls: cls.__name__ != chosen):
        option = name.removeprefix(f"{cls.__name__.lower()}_")
        if option in [of_class.name for of_class in fields(cls)]:
            return f"objective={cls.__name__}({option}={value!r})"
    if RENAMED.get(name) in options:
        return f"{RENAMED[name]}=..."
    if name in CLIPS:
        return "objective=PPO(clip_low=..., clip_high=...)"
    close = difflib.get_close_matches(name, options, 1, cutoff=0.75)
    return f"{close[0]}={value!r}" if close else "one of those that its help() lists"


def named_options(config: Config) -> Config:
    """Class decorator: a configuration raises a TypeError for an unknown keyword that says what to write instead."""
    init = config.__init__  # type: ignore[misc]  # this class's, which the next one down gets anew
    options = [of_class.name for of_class in fields(config)]

    @functools.wraps(init)
    def __init__(self, *args, **keywords):
        for name, value in keywords.items():
            if name not in options:
                raise TypeError(
                    f"{config.__name__} must be given its own options, got {name}={value!r}: write "
                    f"{_suggest(name, value, keywords.get('objective'), options)}"
                )
        init(self, *args, **keywords)

    config.__init__ = __init__  # type: ignore[misc]  # a subclass may have more options and must be decorated itself
    return config


@dataclass
class ObjectiveOptions:
    """Options that are added to the configuration of a trainer: the policy objective, and options of
    `linear_policy_loss`.

    objective        an `Objective` such as `DRPO(delta=0.2)`, or the same as text, which the command line and a saved
                     config need. It takes the place of TRL's formula
    compact          "mask": tokens with A = 0 cost a forward, and TRL's metrics cover them as in TRL's trainer.
                     "active": they cost nothing, and the logged entropy is that of the tokens with A ≠ 0
    sparse_grad      experimental. τ in [0, 1) of `linear_policy_loss`: on a CPU tokens that few vocabulary entries
                     decide cost a third, and their gradients leave out at most τ of 1 - π (docs/sparse.md). 0: exact
    workspace_bytes, logits_dtype, head_dtype, batch_invariant, validate
                     as in `linear_policy_loss`, for the loss and for the scoring of old and reference log-probs alike.
                     `logits_dtype` is "float32", "bfloat16" or the torch.dtype, and kept as text
    """

    objective: Objective | str | None = field(
        default="DRPO()", metadata={"help": "Policy objective, such as 'DRPO(delta=0.2)' or 'PPO(clip_high=0.28)'."}
    )
    compact: str = field(
        default="mask",
        metadata={"help": "'mask': tokens with zero advantage cost a forward; 'active': they cost nothing."},
    )
    sparse_grad: float = field(
        default=0.0,
        metadata={"help": "Experimental. Gradients of the fewest entries, each token's within this of itself."},
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Bytes for the head's logits and their gradients; the default fits the device."}
    )
    logits_dtype: str | None = field(
        default=None, metadata={"help": "'bfloat16': round the logits, for speed; the default keeps them in float32."}
    )
    head_dtype: str | None = field(
        default=None, metadata={"help": "'fp8_e4m3' or 'fp8_e5m2': the head of an fp8 engine. Experimental."}
    )
    batch_invariant: bool = field(
        default=False, metadata={"help": "A token's log-prob does not depend on what is beside it. Needs Triton."}
    )
    validate: bool | None = field(
        default=None, metadata={"help": "Check values as well as shapes; the default does so on a CPU only."}
    )

    def check_loss_options(self, entropy_coef: float = 0.0) -> None:
        """Read the objective, and raise now what `linear_policy_loss` would raise for these options in training."""
        self.objective = read_objective(self.objective)
        if self.compact not in ("mask", "active"):
            raise ValueError(f"compact must be 'mask' or 'active', got {self.compact!r}")
        if self.logits_dtype is not None:
            self.logits_dtype = str(self.logits_dtype).removeprefix("torch.")
        temperature = self.temperature  # type: ignore[attr-defined]  # of the trainer's own configuration
        options = PolicyOptions(
            objective=self.objective, temperature=temperature, entropy_coef=entropy_coef,
            sparse_grad=self.sparse_grad, **self.head_options(),
        )  # fmt: skip
        one = torch.ones(1, 1)
        check_logprob_options(options, one.long(), one.shape, one, vocab=1)
        check_policy_options(options, one.long(), None, one)

    def head_options(self) -> dict[str, Any]:
        """Keywords of `linear_policy_loss` that `linear_token_logprobs` takes too."""
        options = {name: getattr(self, name) for name in HEAD_OPTIONS}
        if isinstance(self.logits_dtype, str):
            options["logits_dtype"] = getattr(torch, self.logits_dtype, self.logits_dtype)
        return options

    def to_dict(self) -> dict[str, Any]:
        of_trainer = super().to_dict()  # type: ignore[misc]  # the trainer's own configuration has it
        return {**of_trainer, "objective": repr(self.objective)}


@named_options
@dataclass
class DRPOConfig(ObjectiveOptions, GRPOConfig):
    """`GRPOConfig` with the policy objective of this package, and the options of `ObjectiveOptions`.

    `epsilon`, `epsilon_high` and `delta` must keep their defaults. `loss_type` ("grpo", "bnpo", "dr_grpo", "dapo",
    "luspo") chooses the aggregation. `importance_sampling_level` is "sequence" with `objective=GSPO(...)`, else
    "token".

    vllm_importance_sampling_correction is False by default: log μ is the sampling engine's own log-prob if there is
    one, so the ratio itself corrects the mismatch. True is TRL's decoupled form: the trainer recomputes the old
    log-probs, and TRL's importance ratio weights the policy term.

    Raises TypeError or ValueError for an option that would be ignored or that `linear_policy_loss` refuses. The message
    names the option and what to write instead.
    """

    vllm_importance_sampling_correction: bool = field(
        default=False,
        metadata={
            "help": "False: the behaviour policy is the sampling engine's own log-probs. True: TRL's decoupled "
            "correction, with recomputed old log-probs and a truncated importance weight."
        },
    )

    def __post_init__(self):
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Read the objective, and refuse options that only TRL's formula would honour."""
        self.objective = read_objective(self.objective)
        self._check_formula_options()
        allowed = (*AGGREGATIONS, "cispo") if isinstance(self.objective, CISPO) else AGGREGATIONS
        if self.loss_type not in allowed:
            raise ValueError(
                f"loss_type must be one of {', '.join(map(repr, allowed))} with objective={self.objective}, got "
                f"{self.loss_type!r}: the objective is the formula and loss_type its aggregation"
                + FORMULAS.get(self.loss_type, "")
            )
        if self.compact == "active" and self.use_adaptive_entropy:
            raise ValueError("compact must be 'mask' with use_adaptive_entropy (it measures all tokens), got 'active'")
        if self.sparse_grad and self.use_adaptive_entropy:
            raise ValueError(f"sparse_grad must be 0 with use_adaptive_entropy, got {self.sparse_grad!r}")
        self.check_loss_options(self.entropy_coef)
        if self.objective.sequence_level and self.beta and self.use_bias_correction_kl:
            raise ValueError(
                f"use_bias_correction_kl must be False with the sequence-level objective={self.objective} and beta, "
                "got True: TRL multiplies each token's KL by the ratio of its whole sequence; write "
                "use_bias_correction_kl=False"
            )

    def _check_formula_options(self) -> None:
        """Refuse options of TRL's formula that an objective would ignore."""
        assert isinstance(self.objective, Objective)  # `check` has read it
        given = {option.name: (getattr(self, option.name), option.default) for option in fields(GRPOConfig)}
        changed = {name: value for name, (value, default) in given.items() if value != default}
        for name in CLIP_OPTIONS:
            if name in changed:
                raise ValueError(
                    f"{name} must keep its default, because objective={self.objective} has its own bounds, got "
                    f"{changed[name]!r}: write {self._as_objective(changed)}"
                )
        for prefix, objective in OTHER_FORMULAS.items():
            for name in (name for name in changed if name.startswith(prefix)):
                raise ValueError(
                    f"{name} must keep its default, because no formula here has it, got {changed[name]!r}: set it on "
                    f"the objective {objective} of docs/integrations/trl.md"
                )
        for name in CORRECTION_OPTIONS:
            if name in changed and not self.vllm_importance_sampling_correction:
                raise ValueError(
                    f"{name} must keep its default without vllm_importance_sampling_correction, got {changed[name]!r}: "
                    "write vllm_importance_sampling_correction=True with it"
                )
        level = "sequence" if self.objective.sequence_level else "token"
        if self.importance_sampling_level not in ("token", level):
            raise ValueError(
                f"importance_sampling_level must be {level!r} with objective={self.objective}, got "
                f"{self.importance_sampling_level!r}: write {self._as_objective(changed)}, which sets it, or "
                f"importance_sampling_level={level!r}"
            )
        self.importance_sampling_level = level  # TRL's constructor gives advice that depends on it

    def _as_objective(self, changed: dict[str, Any]) -> str:
        """How to write the objective that means the same as these options of TRL's formula."""
        assert isinstance(self.objective, Objective)
        bounds = getattr(self.objective, "clip_low", None), getattr(self.objective, "clip_high", None)
        low = changed.get("epsilon", bounds[0] or GRPOConfig.epsilon)
        high = changed.get("epsilon_high", changed.get("epsilon", bounds[1] or GRPOConfig.epsilon))
        delta = changed.get("delta")
        if self.objective.sequence_level or self.importance_sampling_level == "sequence":
            if not (isinstance(self.objective, GSPO) or "epsilon" in changed or "epsilon_high" in changed):
                low, high = GSPO.clip_low, GSPO.clip_high
            without = "" if delta is None else ", which has no two-sided clip"
            return f"objective=GSPO(clip_low={low}, clip_high={high}){without}"
        if isinstance(self.objective, CISPO) or self.loss_type == "cispo":
            cap = changed.get("epsilon_high", changed.get("epsilon", CISPO.ratio_cap))
            return f"objective=CISPO(ratio_cap={cap})"
        if isinstance(self.objective, DPPO) and delta is not None:
            return f"objective=DPPO(delta_low={delta}, delta_high={delta})"
        if isinstance(self.objective, SPO) and "epsilon" in changed:
            return f"objective=SPO(epsilon={low})"
        if delta is None:
            return f"objective=PPO(clip_low={low}, clip_high={high})"
        drpo = f"objective=DRPO(delta={delta})"
        if delta <= 1:
            return drpo
        # TRL caps the ratio at delta in one branch of its minimum, for advantages of both signs.
        upper, cap = (high, delta) if delta > 1 + high else (round(delta - 1, 12), round(1 + high, 12))
        ppo = f"objective=PPO(clip_low={low}, clip_high={upper}, dual_clip={cap})"
        return ppo if isinstance(self.objective, PPO) else f"{drpo}, or for TRL's two-sided clip {ppo}"
