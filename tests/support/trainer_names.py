"""The few names that the pages' snippets import from trainers, which are not installed."""

import dataclasses
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


@dataclass
class LossInputs:
    """prime-rl gives its loss functions one sequence at a time."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


class OutputLinear(nn.Linear):
    """This is prime-rl's FusedOutputLinear. The page replaces its forward."""

    def forward(self, *arguments, **keywords):
        raise AssertionError("the page replaces this")


class PolicyLoss(nn.Module):
    """This is the base class of OpenRLHF's losses."""

    def __init__(self, token_level_loss=True):
        super().__init__()
        self.token_level_loss = token_level_loss


def aggregate_loss(loss, mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """Reduce as OpenRLHF does in its two ways, by the global counts or, without them, by the counts of the batch."""
    if token_level_loss:
        total = (loss * mask).sum()
        return total / mask.sum() if batch_num_tokens is None else total / batch_num_tokens * dp_size
    means = torch.stack([row[keep].mean() for row, keep in zip(loss, mask.bool(), strict=True) if keep.any()])
    return means.mean() if global_batch_size is None else means.sum() / global_batch_size * dp_size


class ClippedPGLossFn:
    """This is NeMo-RL's loss, as far as its metrics go."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        assert not torch.is_grad_enabled()
        return next_token_logprobs.sum(), {"loss": 0.0, "num_valid_samples": data["sample_mask"].sum().item()}


def slime_log_probs(logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False):
    """Return the log-probs and entropies of each response from packed float32 logits [1, T, V], as slime does."""
    assert logits.dtype == torch.float32
    full, start, out = torch.log_softmax(logits[0] / args.rollout_temperature, -1), 0, {"log_probs": [], "entropy": []}
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        rows = full[start + total - response - 1 : start + total - 1]
        out["log_probs"].append(rows.gather(1, tokens[-response:, None])[:, 0])
        out["entropy"].append(-(rows.exp() * rows).sum(1))
        start += total
    return None, out


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules with these names in the place of the trainers'."""
    modules = {
        "prime_rl.trainer.rl.loss": {
            "LossInputs": LossInputs,
            "LossOutputs": dataclasses.make_dataclass("LossOutputs", ["loss", "metrics"]),
            "shift_tensor_left": lambda x: torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1),
        },
        "prime_rl.trainer.models.layers.lm_head": {
            "FusedOutputLinear": type("FusedOutputLinear", (OutputLinear,), {}),
            "PrimeLmOutput": dict,
        },
        "openrlhf.models": {"PolicyLoss": PolicyLoss, "aggregate_loss": aggregate_loss},
        "skyrl.backends.skyrl_train.utils.ppo_utils": {
            "register_policy_loss": lambda name: lambda function: function,
            "reduce_loss": lambda loss, mask: loss.sum() if mask is None else (loss * mask).sum(),
        },
        "nemo_rl.algorithms.loss.loss_functions": {"ClippedPGLossFn": ClippedPGLossFn},
        "nemo_rl.algorithms.utils": {
            "masked_mean": lambda x, mask, global_normalization_factor: (
                (x * mask).sum() / (global_normalization_factor + 1e-8)
            )
        },
        "nemo_rl.distributed.model_utils": {"from_parallel_hidden_states_to_logprobs": None},
        "slime.backends.megatron_utils.loss": {"get_log_probs_and_entropy": slime_log_probs},
    }
    for path, names in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
                if depth > 1:
                    setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[name])
        vars(sys.modules[path]).update(names)
