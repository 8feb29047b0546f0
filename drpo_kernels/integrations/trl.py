"""DRPO, or any objective of this package, in TRL's GRPO trainer: `DRPOTrainer` and `DRPOConfig` (TRL >= 1.16).

Everything but the loss is TRL's: generation, rewards, advantages, masks, metrics. TRL scores a batch through one call,
`model(**inputs, labels=labels, fused_lm_head=True)`, which here goes to the head of
`drpo_kernels.integrations.transformers`. During a training step that call also computes the loss, in 6·T·V·H FLOP.
TRL's own formula then runs on the resulting log-probs, but only for its metrics.
"""

import inspect
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from drpo_kernels import (
    CISPO,
    TokenCoefficients,
    linear_policy_loss,
    linear_token_logprobs,
)
from drpo_kernels.integrations import needs
from drpo_kernels.integrations.trl_config import AGGREGATIONS, DRPOConfig, parse_objective
from drpo_kernels.integrations.trl_objective import Scored, parts
from drpo_kernels.integrations.trl_sampling import SampledBatches, engine_warning
from drpo_kernels.policy_loss import PolicyLossOutput
from drpo_kernels.tokens import scorable

with needs("trl", "trl>=1.16"):
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

__all__ = ["DRPOConfig", "DRPOTrainer", "parse_objective"]

logger = logging.getLogger(__name__)


class _FusedLoss(NamedTuple):
    out: PolicyLossOutput
    mean_entropy: Tensor  # the entropy that entropy_coef multiplies, 0-d and detached


class _LossHead:
    """A function for the model's head: the loss of the last K tokens of a batch, all tensors [B, K].

    It is no dataclass, because FSDP1 would round the tensors of a dataclass to its compute dtype.
    """

    def __init__(
        self,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor,
        scoring: dict[str, Any],
        coefficients: Callable[[Callable[[Tensor], tuple[Tensor, Tensor]]], TokenCoefficients],
        options: dict[str, Any],
    ):
        self.targets, self.old_logprobs, self.advantages, self.mask = targets, old_logprobs, advantages, mask
        self.scoring, self.coefficients, self.options = scoring, coefficients, options

    def __call__(self, hidden: Tensor, weight: Tensor, **head) -> _FusedLoss:
        if len(hidden) != len(self.targets):
            raise ValueError(
                f"the training pass must score its {len(self.targets)} sequences in one call, got {len(hidden)}: call "
                "_get_per_token_logps_and_entropies without batch_size"
            )
        hidden = hidden[:, -self.targets.shape[1] - 1 : -1]
        head |= self.scoring

        @torch.no_grad()
        def score(mask: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy = linear_token_logprobs(hidden, weight, self.targets, mask=mask, **head)
            return logprobs, entropy

        coefficients = self.coefficients(score)
        assert coefficients.entropy is not None
        out = linear_policy_loss(
            hidden, weight, self.targets, self.old_logprobs, self.advantages, self.mask,
            reduction=coefficients, **self.options, **head,
        )  # fmt: skip
        return _FusedLoss(out, torch.where(out.computed, coefficients.entropy * out.entropy, 0).sum())


class DRPOTrainer(SampledBatches):
    """TRL's `GRPOTrainer` with `args.objective` as its policy loss, from the hidden states and in 6·T·V·H FLOP.

    It takes the arguments of `GRPOTrainer`, with a `DRPOConfig` as `args`. TRL's metrics keep their names and meaning.
    `out.metrics` of `linear_policy_loss` are logged beside them under "drpo/", over the tokens of each optimizer step
    on all processes; the evidence that only `diagnose` reads is left out. What `diagnose` says becomes a warning, once
    each in training and in evaluation. `off_policy_mask_threshold` and `top_entropy_quantile` need the log-prob or the
    entropy of every token first, so they cost one more forward of the head (8·T·V·H FLOP in all).

    Raises TypeError for a config that is not a `DRPOConfig` or a head that `add_fused_head` refuses. In training it
    raises RuntimeError if something has replaced the model's forward, and ValueError if a router returns no loss.
    """

    _tag_names: ClassVar = ["trl", "grpo", "drpo"]  # type: ignore[misc]
    _name = "DRPO"
    _config: ClassVar = DRPOConfig
    _trl: ClassVar = grpo_trainer

    def __init__(self, model, reward_funcs=None, args: DRPOConfig | None = None, *positional, **keywords):
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        if self.num_generations_eval == 1:  # one completion has no advantage over its mean
            self._diagnosed["eval"].add("no advantage")
        if self.use_vllm and not self.vllm_importance_sampling_correction:
            self._check_engine()
        if self.loss_type == "luspo" and not self.objective.sequence_level:
            self._warn_once(
                "luspo",
                "the setup of LUSPO's paper, importance_sampling_level='sequence', is objective=GSPO(...) here",
            )
        self._set_metric_bounds()

    def _check_engine(self) -> None:
        """Warn if the engine's log-probs, which are μ here, come from another distribution than the trained one."""
        mode = "processed_logprobs"  # the mode of an engine that TRL itself starts
        if self.vllm_mode == "server" and self.accelerator.is_main_process:
            mode = self.vllm_generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        filters = self._filters() if self.rollout_func is None else []  # a rollout_func may return the kept ids
        if warning := engine_warning(mode, self.temperature, filters):
            self._warn_once("engine", warning)

    def _set_metric_bounds(self) -> None:
        """Set the bounds beyond which TRL's clip ratios count a token: the objective's if it has any, else TRL's."""
        if isinstance(self.objective, CISPO):
            cap = self.objective.ratio_cap
            self.epsilon_high = cap if self.loss_type == "cispo" else cap - 1

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if not isinstance(model, torch.nn.Module):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        kept_ids = self._generated_ids

        def score(labels: Tensor, fused_lm_head: bool = True, **model_inputs) -> Scored:
            nonlocal kept_ids  # TRL may score a few sequences per call
            ids, kept_ids = (None, None) if kept_ids is None else kept_ids.tensor_split([len(labels)])
            return self._score(model, labels, ids, model_inputs)

        return super()._get_per_token_logps_and_entropies(score, *args, **kwargs)

    def _score(self, model, labels: Tensor, kept_ids: Tensor | None, model_inputs: dict) -> Scored:
        """The answer to TRL's scoring call: log-prob and entropy of every label, 0 for a label of -100."""
        targets = labels[:, 1:]
        mask, options = targets != -100, self._scoring_options()
        if kept_ids is not None:
            ids = pad(kept_ids, (0, 0, targets.shape[1] - kept_ids.shape[1], 0), value=-1)  # prompt tokens have none
            mask = mask & (ids >= 0).any(-1)  # tokens that a tool has written have none either
            options["kept_ids"] = ids

        def head(hidden: Tensor, weight: Tensor, **head) -> tuple[Tensor, Tensor]:
            predicting = hidden[:, -labels.shape[1] : -1]  # skips the virtual tokens of prompt tuning
            logprobs, entropy = linear_token_logprobs(predicting, weight, targets, mask=mask, **options, **head)
            return logprobs, entropy

        (logprobs, entropy), aux_loss = parts(model(**model_inputs, fused_head=head), tuple)
        return Scored(logprobs, entropy, aux_loss)

    def _compute_loss(self, model, inputs):
        inputs = dict(inputs)
        mask = counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        old_logprobs = self._behaviour_logprobs(inputs)
        if old_logprobs is not None:  # tokens that the engine could not score enter neither the loss nor TRL's metrics
            counted = inputs["tool_mask"] = mask * scorable(old_logprobs)
        entropy_coef = self._applied_entropy_coef()
        loss_head = _LossHead(
            inputs["completion_ids"], old_logprobs, inputs["advantages"], mask,
            self._scoring_options() | {"kept_ids": inputs.get("kept_ids")},
            partial(self._coefficients, inputs, counted), self._terms(inputs, entropy_coef),
        )  # fmt: skip
        results = []

        def score(labels: Tensor, fused_lm_head: bool = True, **model_inputs) -> Scored:
            fused, aux_loss = parts(model(**model_inputs, fused_head=loss_head), _FusedLoss)
            results.append((fused, self._router_loss(aux_loss, self._accumulation(self._mode))))
            # TRL adds up all rows of the batch, so those that were not computed must be 0.
            logprobs, entropy = (torch.where(fused.out.computed, x, 0) for x in (fused.out.logprobs, fused.out.entropy))
            if old_logprobs is not None:  # TRL's metrics then use the same ratio as the loss
                inputs["old_per_token_logps"] = torch.where(scorable(old_logprobs), old_logprobs, logprobs)
            return Scored(logprobs, entropy, None if aux_loss is None else aux_loss.detach())

        # TRL's formula feeds only its metrics and its entropy controller. The loss is the one that the head computed.
        super()._compute_loss(score, inputs)
        ((fused, router_loss),) = results
        mode = self._mode
        loss = fused.out.loss
        if self._entropy_bonus_enabled:
            policy_loss = (loss.detach() + entropy_coef * fused.mean_entropy) * self._loss_scale(mode)
            self._metrics[mode]["policy_loss"][-1] = self.accelerator.gather(policy_loss).nanmean().item()
        self._log_objective(mode, fused.out.metrics)
        return loss + router_loss

    def _behaviour_logprobs(self, inputs: dict) -> Tensor | None:
        """log μ [B, K]: the sampling engine's if it gave them, unless TRL's importance ratio corrects for them."""
        if self.vllm_importance_sampling_correction and self.use_vllm:
            return inputs.get("old_per_token_logps")
        return inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))

    def _applied_entropy_coef(self) -> float:
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _terms(self, inputs: dict, entropy_coef: float) -> dict[str, Any]:
        """Keywords of `linear_policy_loss`: the objective and what is added to it."""
        options = self._loss_options() | {"entropy_coef": entropy_coef}
        if self.beta:
            options |= {"kl_coef": self.beta, "ref_logprobs": inputs["ref_per_token_logps"]}
            options["kl_importance"] = bool(self.args.use_bias_correction_kl)
        if self.use_vllm and self.vllm_importance_sampling_correction:
            options["token_weights"] = inputs["importance_sampling_ratio"].expand(inputs["completion_ids"].shape)
        return options

    def _accumulation(self, mode: str) -> float:
        return self.current_gradient_accumulation_steps if mode == "train" else 1.0

    def _loss_scale(self, mode: str) -> float:
        """The factor between TRL's logged policy loss and the loss."""
        return 1.0 if self.loss_type in ("dapo", "cispo") else self._accumulation(mode)

    def _coefficients(
        self, inputs: dict, mask: Tensor, score: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> TokenCoefficients:
        """TRL's aggregations as coefficients [B, K]. `score` returns (logprobs, entropy) of the tokens of a mask, which
        TRL's selections of sequences and tokens need.
        """
        mode = self._mode
        base, selected = self._aggregation(inputs, mask.float(), mode), mask.float()
        policy = base
        if self.off_policy_mask_threshold is not None or self.top_entropy_quantile < 1.0:
            logprobs, entropy = score(mask)
            policy = base * self._kept_sequences(inputs, mask, logprobs)
            if self.top_entropy_quantile < 1.0:
                selected = selected * self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
                policy = policy * selected
        bonus = selected / selected.sum().clamp(min=1.0) / self._accumulation(mode)
        return TokenCoefficients(policy, kl=base, entropy=bonus)

    def _aggregation(self, inputs: dict, mask: Tensor, mode: str) -> Tensor:
        accumulation = self._accumulation(mode)
        if self.loss_type == "grpo":
            return mask / mask.sum(-1, keepdim=True).clamp(min=1.0) / (len(mask) * accumulation)
        if self.loss_type == "bnpo":
            return mask / (mask.sum().clamp(min=1.0) * accumulation)
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return mask / (len(mask) * self.max_completion_length * accumulation)
        if self.loss_type == "luspo":
            return mask / (len(mask) * accumulation)
        if self.loss_type not in ("dapo", "cispo"):
            raise ValueError(f"loss_type must be one of {', '.join(AGGREGATIONS)} or cispo, got {self.loss_type!r}")
        # num_items_in_batch counts the tokens of the generation batch; this scales it to one accumulation of gradients.
        normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if mode == "train":
            normalizer = normalizer * accumulation / self.args.steps_per_generation
        return mask / normalizer

    def _kept_sequences(self, inputs: dict, mask: Tensor, logprobs: Tensor) -> Tensor | float:
        """[B, 1] factors of the off-policy sequence mask."""
        if self.off_policy_mask_threshold is None:
            return 1.0
        old = inputs.get("old_per_token_logps")
        advantages = inputs["advantages"]
        return self.get_off_policy_mask(
            advantages=advantages if advantages.dim() > 1 else advantages.unsqueeze(1),
            per_token_logps=logprobs,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", logprobs if old is None else old),
            mask=mask,
            off_policy_threshold=self.off_policy_mask_threshold,
        )


# help() and editors show the arguments of GRPOTrainer, because DRPOTrainer takes exactly these.
DRPOTrainer.__init__.__signature__ = inspect.signature(GRPOTrainer.__init__)  # type: ignore[attr-defined]
