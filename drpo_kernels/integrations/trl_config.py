"""`DRPOConfig`: TRL's `GRPOConfig` with a policy objective of this package, as an object or as text."""

import ast
import pickle
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from drpo_kernels import CISPO, Objective
from drpo_kernels.objectives import registered_objective

# loss types of TRL that are aggregations; "cispo" is one too (that of "dapo") under objective=CISPO(...)
AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# TRL's own options of the per-token formula, and what says the same here
FORMULA_OPTIONS = {
    "epsilon": "objective=PPO(clip_low=..., clip_high=...)",
    "epsilon_high": "objective=PPO(clip_high=...), or objective=CISPO(ratio_cap=...)",
    "delta": "objective=PPO(dual_clip=...)",
}
CORRECTION_OPTIONS = tuple(f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max", "cap"))


def parse_objective(text: str) -> Objective:
    """`"DRPO(delta=0.2)"`, `"DRPO(0.2)"` or `"DRPO"` to the objective; also for registered ones of your own.

    Raises ValueError for anything else, and what the objective itself raises for its values.
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


def read_objective(objective: Objective | str) -> Objective:
    """An objective or its text to the objective.

    Raises TypeError for anything else, ValueError for text that names none and for one that a checkpoint cannot hold.
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


@dataclass
class DRPOConfig(GRPOConfig):
    """`GRPOConfig` with the policy objective of this package.

    objective   an `Objective` such as `DRPO(delta=0.2)`, or the same as text (what the command line and a saved config
                hold). It takes the place of TRL's formula: `epsilon`, `epsilon_high` and `delta` must keep their
                defaults, `loss_type` ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") chooses the aggregation, and a
                sequence-level ratio is asked for with `objective=GSPO(...)`
    compact     "mask": tokens with A = 0 cost a forward, and TRL's metrics cover them as in GRPOTrainer. "active": they
                cost nothing, and the logged entropy is that of the tokens with A ≠ 0
    sparse_grad τ in [0, 1) of `linear_policy_loss`: tokens whose policy is decided cost a third, and their gradients
                are within τ of themselves (docs/sparse.md). 0: exact

    vllm_importance_sampling_correction is False by default: μ is the sampling engine's own log-prob wherever there is
    one, so the ratio itself corrects the mismatch. True is TRL's decoupled form: old log-probs recomputed by the
    trainer, and the policy term weighted by TRL's importance ratio. One or the other, never both.
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
        metadata={"help": "Gradients of the fewest vocabulary entries, each token's within this of itself; 0: exact."},
    )
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
        """Read the objective, and refuse what TRL's formula would have honoured and an objective would not."""
        self.objective = read_objective(self.objective)
        instead = dict(FORMULA_OPTIONS)
        if not self.vllm_importance_sampling_correction:
            instead |= dict.fromkeys(CORRECTION_OPTIONS, "vllm_importance_sampling_correction=True with it")
        for name, value in instead.items():
            if getattr(self, name) != GRPOConfig.__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} belongs to TRL's own formula: say {value}")
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} belongs to TRL's own formula: "
                "say objective=GSPO(clip_low=..., clip_high=...)"
            )
        allowed = (*AGGREGATIONS, "cispo") if isinstance(self.objective, CISPO) else AGGREGATIONS
        if self.loss_type not in allowed:
            raise ValueError(
                f"loss_type must be one of {', '.join(map(repr, allowed))} with objective={self.objective}, got "
                f"{self.loss_type!r}: the objective is the formula and loss_type its aggregation"
            )
        if self.compact not in ("mask", "active"):
            raise ValueError(f"compact must be 'mask' or 'active', got {self.compact!r}")
        if self.compact == "active" and self.use_adaptive_entropy:
            raise ValueError("compact must be 'mask' with use_adaptive_entropy (it measures all tokens), got 'active'")
        if not 0 <= self.sparse_grad < 1:
            raise ValueError(f"sparse_grad must be in [0, 1), got {self.sparse_grad!r}")
        if self.sparse_grad and (self.entropy_coef or self.use_adaptive_entropy or self.objective.sequence_level):
            raise ValueError(
                f"sparse_grad must be 0 with entropy_coef, use_adaptive_entropy or a sequence-level objective, got "
                f"{self.sparse_grad!r}"
            )
        if self.objective.sequence_level and self.beta and self.use_bias_correction_kl:
            raise ValueError(
                f"use_bias_correction_kl must be False with the sequence-level objective={self.objective} and beta: "
                "the KL would carry the ratio of a whole sequence"
            )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "objective": repr(self.objective)}
