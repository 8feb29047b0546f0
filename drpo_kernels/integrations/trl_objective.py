"""What `DRPOTrainer` and `AsyncDRPOTrainer` share: the fused head in place of TRL's, metrics and warnings."""

import logging
from types import ModuleType
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from drpo_kernels import GSPO, PPO, Objective, diagnose
from drpo_kernels.distributed import reduce_metrics
from drpo_kernels.evidence import EVIDENCE
from drpo_kernels.integrations.transformers import WithAuxiliaryLoss, add_fused_head
from drpo_kernels.reductions import PREFIX

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What TRL reads from a scored batch: a log-prob and an entropy per token, and the 0-d loss of a router."""

    log_probs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None


class ObjectiveTrainer:
    """A mixin that comes before a trainer of TRL. `args` is a configuration with an `objective`."""

    _config: ClassVar[type]
    _trl: ClassVar[ModuleType]  # TRL's module that defines the trainer
    _name: str
    objective: Objective
    # TRL's trainer has these.
    args: Any
    model: Any
    accelerator: Any
    temperature: float
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _metrics: Any
    _paper: ClassVar = {
        "title": "Divergence Regularized Policy Optimization",
        "id": "2606.09821",
        "citation": "@article{drpo2026,\n"
        "    title  = {{Divergence Regularized Policy Optimization}},\n"
        "    year   = 2026,\n"
        "    eprint = {arXiv:2606.09821},\n"
        "}",
    }

    def __init__(self, model, reward_funcs=None, args=None, *positional, **keywords):
        config = self._config.__name__
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = self._config(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self._config):
            raise TypeError(f"args must be of {config}, got {type(args).__name__}: write {config}(...)")
        if "objective" in keywords:
            raise TypeError(
                f"objective must be given in args, got {keywords['objective']!r} beside them: write "
                f"args={config}(objective={keywords['objective']!r})"
            )
        args.check()  # fields may have been set after the configuration was made
        self._step_metrics: list[dict[str, Tensor]] = []
        self._diagnosed: dict[str, set[str]] = {"train": set(), "eval": set()}
        # TRL calls this when every model, the reference too, exists and is not wrapped yet.
        with mock.patch.object(self._trl, "add_fused_lm_head", _add_head):
            super().__init__(model, reward_funcs, args, *positional, **keywords)  # pyright: ignore[reportCallIssue]
        self.objective = args.objective
        if self.objective.remark:
            logger.info(self.objective.remark)
        if isinstance(self.objective, (PPO, GSPO)):  # TRL's clip ratios count the tokens beyond these bounds
            self.epsilon_low, self.epsilon_high = self.objective.clip_low, self.objective.clip_high

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _warn_once(self, kind: str, sentence: str) -> None:
        """Log a warning on the main process, once in training and once in evaluation."""
        said = self._diagnosed[self._mode]
        if kind not in said and self.accelerator.is_main_process:
            logger.warning(sentence)
        said.add(kind)

    def _loss_options(self) -> dict[str, Any]:
        """Keywords of `linear_policy_loss` that the configuration sets."""
        return {"objective": self.objective, "compact": self.args.compact, "sparse_grad": self.args.sparse_grad}

    def _scoring_options(self) -> dict[str, Any]:
        """Keywords that `linear_policy_loss` and `linear_token_logprobs` share."""
        return {"temperature": self.temperature, **self.args.head_options()}

    def _router_loss(self, aux_loss: Tensor | None, accumulation: float) -> Tensor | float:
        """The router's load-balancing loss, as it is added to the loss."""
        if not self.aux_loss_enabled:
            return 0.0
        if aux_loss is None:
            raise ValueError(
                "router_aux_loss_coef must be 0 with a model whose forward returns no load-balancing loss, got "
                f"{self.router_aux_loss_coef}: write {self._config.__name__}(router_aux_loss_coef=0.0)"
            )
        return self.router_aux_loss_coef * aux_loss / accumulation

    def _log_objective(self, mode: str, metrics: dict[str, Tensor]) -> None:
        self._step_metrics.append(metrics)
        if self.args.compact == "active":  # TRL's mean counted the entropy of a skipped token as 0
            of_batch = reduce_metrics(metrics)["drpo/entropy_mean"]
            self._metrics[mode]["entropy"][-1] = of_batch.item()
        if mode == "train" and not self.accelerator.sync_gradients:
            return
        reduced = reduce_metrics(self._step_metrics)  # over all processes
        self._step_metrics = []
        values = dict(zip(reduced, torch.stack(list(reduced.values())).tolist(), strict=True))
        for name, value in values.items():
            if not name.startswith(PREFIX + EVIDENCE):
                self._metrics[mode][name].append(value)
        if self.accelerator.is_main_process:
            for sentence in diagnose(values, seen=self._diagnosed[mode]):
                logger.warning(sentence if mode == "train" else f"In evaluation: {sentence}")


def parts(output, kind: type) -> tuple[Any, Tensor | None]:
    """-> (the fused head's result, the router's loss or None). Raises RuntimeError for a result of another kind."""
    result, aux_loss = output if isinstance(output, WithAuxiliaryLoss) else (output, None)
    if not isinstance(result, kind):
        raise RuntimeError(
            f"the model's forward must be that of its fused head, got a {type(result).__name__} from another one that "
            "replaced it: patch the model before the trainer is made"
        )
    return result, aux_loss


def _add_head(model, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple = ()) -> None:
    """Takes the place of TRL's `add_fused_lm_head`. The temperature is passed with each call instead."""
    add_fused_head(model, float32=cast_lm_head_to_fp32)
