"""DRPO, or any objective of this package, in TRL's asynchronous GRPO trainer: `AsyncDRPOTrainer` and `AsyncDRPOConfig`
(TRL >= 1.16, whose `trl.experimental.async_grpo` is marked as experimental).

Everything but the loss is TRL's: rollout worker, weight synchronisation, staleness, packing, metrics. log μ comes from
the policy that sampled the token, which may be several weight updates old. TRL scores a packed row through one call,
`model(**inputs, fused_lm_head=True)`, which here goes to the head of `drpo_kernels.integrations.transformers`. That
call also computes the loss, in 6·T·V·H FLOP. TRL's own formula then runs on the log-probs, but only for its metrics.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drpo_kernels import linear_policy_loss
from drpo_kernels.integrations import needs
from drpo_kernels.integrations.trl_config import ObjectiveOptions, named_options
from drpo_kernels.integrations.trl_objective import ObjectiveTrainer, Scored, parts
from drpo_kernels.integrations.trl_sampling import engine_warning, filters_of
from drpo_kernels.policy_loss import PolicyLossOutput
from drpo_kernels.tokens import scorable

with needs("trl", "trl>=1.16"):
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer
    from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker

__all__ = ["AsyncDRPOConfig", "AsyncDRPOTrainer"]

logger = logging.getLogger(__name__)


@named_options
@dataclass
class AsyncDRPOConfig(ObjectiveOptions, AsyncGRPOConfig):
    """`AsyncGRPOConfig` with the policy objective of this package, and the options of `ObjectiveOptions`.

    `epsilon` and `epsilon_high` must keep their defaults. With compact="active", TRL's `ratio` and `kl` treat tokens
    that were not computed as unchanged.

    Raises TypeError or ValueError for an option that would be ignored or that `linear_policy_loss` refuses. The message
    names the option and what to write instead.
    """

    def __post_init__(self):
        self.check()
        super().__post_init__()

    def check(self) -> None:
        """Read the objective, and refuse options that only TRL's formula would honour."""
        self.check_loss_options()
        bounds = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        for name, value in bounds.items():
            if value != getattr(AsyncGRPOConfig, name):
                high = self.epsilon if self.epsilon_high is None else self.epsilon_high
                raise ValueError(
                    f"{name} must keep its default, because objective={self.objective} has its own bounds, got "
                    f"{value!r}: write objective=PPO(clip_low={self.epsilon}, clip_high={high})"
                )


class AsyncDRPOTrainer(ObjectiveTrainer, AsyncGRPOTrainer):  # type: ignore[misc]  # `objective` is not transformers'
    """TRL's `AsyncGRPOTrainer` with `args.objective` as its policy loss, from the hidden states and in 6·T·V·H FLOP.

    It takes the arguments of `AsyncGRPOTrainer`, with an `AsyncDRPOConfig` as `args`. log μ is what the sampling engine
    reported with the sample, whatever version of the policy it had. A token without a reported log-prob (NaN, or -100
    and below) is left out of the loss. TRL's metrics keep their names and meaning. `out.metrics` of
    `linear_policy_loss` are logged beside them under "drpo/", over the tokens of each optimizer step on all processes.
    What `diagnose` says becomes a warning, once each.

    Raises TypeError for a config that is not an `AsyncDRPOConfig` or a head that `add_fused_head` refuses. In training
    it raises RuntimeError if something has replaced the model's forward, and ValueError if a router returns no loss.
    """

    _tag_names: ClassVar = ["trl", "async-grpo", "drpo"]  # type: ignore[misc]
    _name = "AsyncDRPO"
    _config: ClassVar = AsyncDRPOConfig
    _trl: ClassVar = async_grpo_trainer

    def __init__(self, model, reward_funcs=None, args: AsyncDRPOConfig | None = None, *positional, **keywords):
        super().__init__(model, reward_funcs, args, *positional, **keywords)

    def get_train_dataloader(self):
        if isinstance(self.rollout_worker, AsyncRolloutWorker):  # TRL makes it on the main process only
            self._check_engine()
        return super().get_train_dataloader()

    def _check_engine(self) -> None:
        """Warn if the server's log-probs, which are μ here, come from another distribution than the trained one."""
        filters = filters_of(vars(self.args))
        if self.temperature == 1 and not filters:
            return
        assert self.vllm_client is not None
        self.vllm_client.wait_for_server_ready()
        mode = self.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if warning := engine_warning(mode, self.temperature, filters):
            logger.warning(warning)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one packed row [1, N] with M trained tokens, some of which may share a position."""
        trained = inputs["token_index"] >= 0
        position = inputs["token_index"][trained]
        old_logprobs, advantages = inputs["old_log_probs"][trained], inputs["advantages"][trained]
        options = self._scoring_options() | self._loss_options()
        if self.objective.sequence_level:
            lengths = inputs["segment_id"][trained].bincount()
            options["cu_seqlens"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        # As in TRL, the loss is a mean over the trained tokens of all processes. DDP and FSDP average their gradients.
        tokens = (inputs["global_n_tokens"][0] / self.accelerator.num_processes).clamp(min=1.0)
        normalizer = tokens * self.current_gradient_accumulation_steps
        unchanged = torch.where(scorable(old_logprobs), old_logprobs, 0)
        results: list[tuple[Tensor, dict[str, Tensor]]] = []

        def score(shift_labels: Tensor, fused_lm_head: bool, **model_inputs) -> Scored:
            def head(hidden: Tensor, weight: Tensor, **head) -> PolicyLossOutput:
                return linear_policy_loss(
                    hidden[0, position], weight, shift_labels[0, position], old_logprobs, advantages,
                    reduction="token-sum", normalizer=normalizer, **options, **head,
                )  # fmt: skip

            out, aux_loss = parts(model(**model_inputs, fused_head=head), PolicyLossOutput)
            loss = out.loss + self._router_loss(aux_loss, self.current_gradient_accumulation_steps)
            results.append((loss, out.metrics))
            # TRL's metrics shall treat a token that was not computed as unchanged.
            logprobs = torch.where(out.computed, out.logprobs, unchanged)
            return Scored(logprobs, torch.where(out.computed, out.entropy, 0), aux_loss)

        # TRL's formula feeds only its metrics. It gets one log-prob for each trained token, not for each position.
        index = torch.where(trained, trained.cumsum(-1) - 1, -1)
        known = inputs["old_log_probs"].masked_scatter(trained, unchanged)
        known_inputs = {**inputs, "token_index": index, "old_log_probs": known}
        super().compute_loss(score, known_inputs)  # pyright: ignore[reportArgumentType]  # TRL only calls the model
        ((loss, metrics),) = results
        self._log_objective("train", metrics)
        return loss


# help() and editors show the arguments of AsyncGRPOTrainer, because AsyncDRPOTrainer takes exactly these.
AsyncDRPOTrainer.__init__.__signature__ = inspect.signature(AsyncGRPOTrainer.__init__)  # type: ignore[attr-defined]
