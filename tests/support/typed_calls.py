"""A user's script for type checkers, which must accept the right calls and flag the wrong ones. Nobody runs it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import assert_type

import drpo_kernels as dk
from drpo_kernels import DRPO, PPO, Objective, PolicyLossOutput, Tokens, register_objective
from drpo_kernels.distributed import VocabShard


@register_objective
@dataclass(frozen=True)
class Mine(Objective):
    scale: float = 1.0

    def token_loss(self, tokens: Tokens) -> Tensor:
        return -self.scale * tokens.advantages * tokens.ratio


def right(hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, adv: Tensor, shard: VocabShard) -> None:
    out = dk.linear_policy_loss(hidden, weight, ids, old, adv, objective=DRPO(delta=0.2), temperature=0.7)
    assert_type(out, PolicyLossOutput)
    assert_type(out.metrics["drpo/ratio_mean"], Tensor)
    out.loss.backward()
    assert_type(DRPO(delta=0.2), DRPO)
    assert_type(Mine(scale=2.0), Mine)
    dk.linear_policy_loss(hidden, weight, ids, None, adv, None, bias=None, objective=Mine(2.0), sparse_grad=0.003)
    dk.linear_policy_loss(hidden, weight, ids, old, adv, vocab_shard=shard, logits_dtype=torch.bfloat16)
    dk.policy_loss(hidden, ids, old, adv, inplace=True, objective=PPO(clip_low=0.1), ref_logprobs=old, kl_coef=0.04)
    dk.policy_loss(hidden, ids, old, adv, reduction=dk.TokenCoefficients(old), normalizer=torch.tensor(3.0))
    dk.linear_drpo_loss(hidden, weight, ids, old, adv, delta=0.2, workspace_bytes=2**20, kept_ids=ids)
    dk.drpo_loss(hidden, ids, old, adv, delta=0.2, temperature=adv, entropy_coef=0.01, compact="mask")
    logprobs, entropy = dk.linear_token_logprobs(hidden, weight, ids, temperature=0.7, batch_invariant=True)
    logprobs, entropy, logsumexp = dk.token_logprobs(hidden, ids, softcap=30.0, return_logsumexp=True)
    print(logprobs + entropy + logsumexp, dk.diagnose(out.metrics))


def wrong(hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, adv: Tensor, shard: VocabShard) -> None:
    dk.linear_policy_loss(hidden, weight, ids, old, adv, temprature=0.7)  # WRONG: no such keyword
    dk.linear_policy_loss(hidden, weight, ids, old)  # WRONG: advantages are missing
    dk.linear_policy_loss(hidden, weight, ids, old, adv, objective="drpo")  # WRONG: a name, not an objective
    dk.linear_policy_loss(hidden, weight, ids, old, adv, objective=DRPO)  # WRONG: a class, not an objective
    dk.linear_policy_loss(hidden, weight, ids, old, adv, objective=DRPO(detla=0.2))  # WRONG: no such field
    dk.linear_policy_loss(hidden, weight, ids, old, adv, objective=Mine(scale="large"))  # WRONG: no number
    dk.linear_policy_loss(hidden, weight, ids, old, adv, [1, 0])  # WRONG: the mask is no tensor
    register_objective(PolicyLossOutput)  # WRONG: no subclass of Objective
    dk.policy_loss(hidden, ids, old, adv, vocab_shard=shard)  # WRONG: for heads, not for logits
    dk.policy_loss(hidden, ids, old, adv, temperature="0.7")  # WRONG: no number
    dk.linear_drpo_loss(hidden, weight, ids, old, adv, objective=PPO())  # WRONG: the objective is DRPO
    dk.drpo_loss(hidden, ids, old, adv, delta=None)  # WRONG: no number
    dk.linear_token_logprobs(hidden, weight, ids, kl_coef=0.04)  # WRONG: for a loss, not for log-probs
    dk.token_logprobs(hidden, ids, workspace_bytes=2**20)  # WRONG: for heads, not for logits
    print(dk.policy_loss(hidden, ids, old, adv).logprob)  # WRONG: it is called logprobs
