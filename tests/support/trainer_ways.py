"""Each trainer's way from a rollout to the loss, through the snippets of its page in docs/integrations.

A way lays the rollout out and names the tensors as the trainer does, runs the page's snippet and returns its loss.
"""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from rollouts import DELTA, ELSEWHERE, H, V, make_rollout, naive_logprobs
from snippets import ROOT, snippets
from trainer_names import LossInputs

PAGES = ROOT / "docs" / "integrations"
TRAINERS = ("prime-rl", "openrlhf", "skyrl", "nemo-rl", "slime", "open-instruct")


def page_snippets(page: str) -> list[str]:
    return snippets(PAGES / f"{page}.md")


def run_snippet(page: str, index: int, **names) -> SimpleNamespace:
    namespace = dict(names)
    exec(compile(page_snippets(page)[index], f"{page}.md, snippet {index + 1}", "exec"), namespace)
    return SimpleNamespace(**namespace)


def prime_compute_loss(rollout, loss_fn, logprobs, scale, weights=None):
    """Do what `compute_loss` does: shift the log-probs [1, T] back to their tokens, split them into sequences, sum the
    losses, and divide.
    """
    logprobs = torch.cat([logprobs.new_full((1, 1), -torch.tensor(float(V)).log()), logprobs[:, :-1]], 1)
    columns = [logprobs, *(rollout.packed(name) for name in ("old", "advantages", "mask"))]
    total = 0.0
    for i, (new, old, advantages, mask) in enumerate(
        zip(*(c.squeeze(0).split([len(s) for s in rollout.sequences]) for c in columns), strict=True)
    ):
        stream = None if weights is None else weights[i]
        total = total + loss_fn(LossInputs(new, old, None, advantages, mask, stream), delta=DELTA).loss
    return total / scale


def prime_labels(rollout):
    input_ids = rollout.packed("tokens")
    return torch.cat([input_ids[:, 1:], torch.zeros_like(input_ids[:, :1])], 1)


def prime_temperatures(rollout):
    return torch.cat([torch.full((len(s),), s.temperature) for s in rollout.sequences])[None]


def prime_head(rollout):
    head = sys.modules["prime_rl.trainer.models.layers.lm_head"].FusedOutputLinear(H, V, bias=False)
    head.weight = rollout.weight
    return head


def prime_loss_only(rollout, weights=None):
    temperature = prime_temperatures(rollout)[..., None]
    logprobs = naive_logprobs(rollout.packed("hidden"), rollout.weight, prime_labels(rollout), temperature)
    loss_fn = run_snippet("prime-rl", 0).drpo_loss
    return prime_compute_loss(rollout, loss_fn, logprobs, rollout.count + ELSEWHERE, weights)


def prime_fused_head(rollout, weights=None):
    run_snippet("prime-rl", 1)
    out = prime_head(rollout)(rollout.packed("hidden"), prime_labels(rollout), temperature=prime_temperatures(rollout))
    assert out["entropy"].shape == out["logprobs"].shape == (1, sum(map(len, rollout.sequences)))
    loss_fn = run_snippet("prime-rl", 0).drpo_loss
    return prime_compute_loss(rollout, loss_fn, out["logprobs"], rollout.count + ELSEWHERE, weights)


def prime_fused_loss(rollout):
    run_snippet("prime-rl", 2)
    head = prime_head(rollout)
    names = {"inference_logprobs": "old", "advantages": "advantages", "loss_mask": "mask"}
    head.rl = {name: rollout.packed(column) for name, column in names.items()}
    head.rl_scale = rollout.count + ELSEWHERE
    return head(rollout.packed("hidden"), prime_labels(rollout), temperature=prime_temperatures(rollout))["loss"]


def openrlhf_experience(rollout):
    """Return [B, A] with A = T - 1. Column j belongs to token j + 1, and masks and log-probs end in padding."""
    names = {"rollout_log_probs": "old", "advantages": "advantages", "action_mask": "mask"}
    return SimpleNamespace(**{name: rollout.layout(column)[:, 1:] for name, column in names.items()})


def openrlhf_counts(rollout):
    return {"dp_size": 2, "batch_num_tokens": torch.tensor(float(rollout.count + ELSEWHERE))}


def openrlhf_loss_only(rollout, token_level=True, **counts):
    sequences, experience = rollout.layout("tokens"), openrlhf_experience(rollout)
    rolled = torch.roll(sequences, -1, 1)
    logprobs = naive_logprobs(rollout.layout("hidden"), rollout.weight, rolled)[:, :-1] * experience.action_mask.float()
    loss_fn = run_snippet("openrlhf", 0).DRPOLoss(token_level)
    loss, clip_ratio, ppo_kl, vllm_kl = loss_fn(
        logprobs, experience.rollout_log_probs - 1, experience.advantages, action_mask=experience.action_mask,
        rollout_log_probs=experience.rollout_log_probs, **(counts or openrlhf_counts(rollout)),
    )  # fmt: skip
    assert clip_ratio.shape == ppo_kl.shape == () and not ppo_kl.requires_grad and vllm_kl is None
    return loss


def openrlhf_fused(rollout):
    sequences = rollout.layout("tokens")
    lengths = torch.tensor([len(s) for s in rollout.sequences])
    indices = (torch.arange(sequences.shape[1]) < lengths[:, None]).reshape(-1).nonzero()[:, 0]
    return run_snippet(
        "openrlhf", 1,
        hidden=rollout.packed("hidden"),
        lm_head=SimpleNamespace(weight=rollout.weight),
        rolled_sequences=torch.roll(sequences, -1, 1).reshape(-1)[indices][None],
        indices=indices,
        seqlen=sequences.shape[1],
        experience=openrlhf_experience(rollout),
        actor=SimpleNamespace(temperature=rollout.sequences[0].temperature),
        loss_batch_info=openrlhf_counts(rollout),
    ).actor_loss  # fmt: skip


def skyrl_batch(rollout):
    """Pad prompts on the left and responses on the right. The [B, A] tensors are the last A columns."""
    left, actions = max(s.prompt for s in rollout.sequences), max(len(s) - s.prompt for s in rollout.sequences)
    columns = {"sequences": "tokens", "hidden": "hidden", "rollout_logprobs": "old", "advantages": "advantages",
               "loss_mask": "mask"}  # fmt: skip
    batch = {name: rollout.layout(column, left + actions, left=left) for name, column in columns.items()}
    for name in ("rollout_logprobs", "advantages", "loss_mask"):
        batch[name] = batch[name][:, -actions:]
    # SkyRL divides by the tokens of the minibatch for token_mean
    batch["advantages"] = batch["advantages"] / (rollout.count + ELSEWHERE)
    return {**batch, "loss_mask": batch["loss_mask"].float(), "num_actions": actions}


def skyrl_loss_only(rollout):
    batch = skyrl_batch(rollout)
    rolled = torch.roll(batch["sequences"], -1, 1)
    logprobs = naive_logprobs(batch["hidden"], rollout.weight, rolled)[:, -batch["num_actions"] - 1 : -1]
    loss, metrics = run_snippet("skyrl", 0).drpo_policy_loss(
        logprobs, batch["rollout_logprobs"] - 1, batch["advantages"], config=None, loss_mask=batch["loss_mask"],
        rollout_logprobs=batch["rollout_logprobs"],
    )  # fmt: skip
    assert all(isinstance(value, float) for value in metrics.values())
    return loss


def skyrl_fused(rollout):
    batch = skyrl_batch(rollout)
    temperature, lm_head = rollout.sequences[0].temperature, SimpleNamespace(weight=rollout.weight)
    names = run_snippet("skyrl", 1, **batch, lm_head=lm_head, temperature=temperature)
    assert names.action_log_probs.shape == names.entropy.shape == batch["loss_mask"].shape
    return names.policy_loss


def nemo_data(rollout):
    """Return [B, S] by token, padded on the right. The masks are numbers."""
    names = {"input_ids": "tokens", "generation_logprobs": "old", "advantages": "advantages", "token_mask": "mask"}
    data = {name: rollout.layout(column) for name, column in names.items()}
    return {**data, "token_mask": data["token_mask"].int(), "sample_mask": torch.ones(len(rollout.sequences))}


def nemo_loss(rollout, logprobs):
    """Call the loss function on one unpadded sequence after the other, as `SequencePackingLossWrapper` does."""
    loss_fn, data, loss = run_snippet("nemo-rl", 0).DRPOLossFn(), nemo_data(rollout), 0.0
    for i, (s, new) in enumerate(zip(rollout.sequences, logprobs, strict=True)):
        one = {name: x[i : i + 1, : len(s)] if x.dim() > 1 else x[i : i + 1] for name, x in data.items()}
        part, metrics = loss_fn(next_token_logprobs=new[None], data=one, global_valid_seqs=torch.tensor(4),
                                global_valid_toks=torch.tensor(rollout.count + ELSEWHERE))  # fmt: skip
        assert metrics == {"loss": part.item(), "num_valid_samples": 1.0}
        loss = loss + part
    return loss


def nemo_loss_only(rollout):
    return nemo_loss(rollout, [naive_logprobs(s.hidden[:-1], rollout.weight, s.tokens[1:]) for s in rollout.sequences])


def nemo_fused_head(rollout):
    """Megatron's hidden states are [S, B, H], and the loss is called on the padded batch."""
    replaced = run_snippet("nemo-rl", 1).model_utils.from_parallel_hidden_states_to_logprobs
    logprobs = replaced(
        rollout.layout("hidden").transpose(0, 1), rollout.weight, None, rollout.layout("tokens"),
        vocab_start_index=0, vocab_end_index=V, inference_only=False, tp_group=None, cp_group=None, chunk_size=4,
    )  # fmt: skip
    return nemo_loss(rollout, [row[: len(s) - 1] for row, s in zip(logprobs, rollout.sequences, strict=True)])


def nemo_fused_loss(rollout):
    lengths = torch.tensor([0, *(len(s) for s in rollout.sequences)])
    return run_snippet(
        "nemo-rl", 2,
        hidden=rollout.packed("hidden"),
        lm_head=SimpleNamespace(weight=rollout.weight),
        data=nemo_data(rollout),
        cu_seqlens_q=lengths.cumsum(0).int(),
        sampling_params=SimpleNamespace(temperature=rollout.sequences[0].temperature),
        global_valid_toks=torch.tensor(rollout.count + ELSEWHERE),
    ).out.loss  # fmt: skip


def slime_batch(rollout):
    """Return a list per response. The samples of one rollout share its denominator."""
    return {
        "unconcat_tokens": rollout.column("tokens"),
        "total_lengths": [len(s) for s in rollout.sequences],
        "response_lengths": [len(s) - s.prompt for s in rollout.sequences],
        "loss_masks": [mask.int() for mask in rollout.responses("mask")],
        "rollout_mask_sums": torch.tensor(rollout.column("group_sum")),
        "rollout_log_probs": rollout.responses("old"),
        "advantages": rollout.responses("advantages"),
    }


def slime_reducer(batch):
    def sum_of_sample_mean(x):
        parts = zip(x.split(batch["response_lengths"]), batch["loss_masks"], batch["rollout_mask_sums"], strict=True)
        return sum((part * mask).sum() / total.clamp(min=1) for part, mask, total in parts)

    return sum_of_sample_mean


def slime_args(rollout):
    return SimpleNamespace(rollout_temperature=rollout.sequences[0].temperature)


def slime_coefficient(rollout):
    return lambda s, t: 1 / s.group_sum


def slime_loss_only(rollout):
    batch = slime_batch(rollout)
    logits = rollout.packed("hidden", padding=3) @ rollout.weight.T
    loss_fn = run_snippet("slime", 0).drpo_loss
    loss, metrics = loss_fn(slime_args(rollout), batch, logits, slime_reducer(batch))
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    return loss


def slime_fused(rollout):
    """`hidden` comes out of Megatron's Float16Module in float32 and ends in padding."""
    batch = slime_batch(rollout)
    hidden = rollout.packed("hidden", padding=3, pad=torch.nan).float()
    loss_fn = run_snippet("slime", 1, head=SimpleNamespace(weight=rollout.weight)).fused_drpo_loss
    loss, metrics = loss_fn(slime_args(rollout), batch, hidden, slime_reducer(batch))
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    return loss


def open_instruct_batch(rollout):
    """Return one packed and padded row [1, T] by token. vLLM's log-probs are NaN on prompts."""
    names = {"query_responses": "tokens", "advantages": "advantages", "response_masks": "mask", "vllm_logprobs": "old"}
    ends = {"query_responses": V + 5}  # the pad token need not be in the vocabulary
    return SimpleNamespace(**{n: [rollout.packed(c, padding=2, pad=ends.get(n, 0))] for n, c in names.items()})


OPEN_INSTRUCT = SimpleNamespace(beta=0.05, world_size=4, sequence_parallel_size=2)


def open_instruct_masked_mean(values, mask, axis, denominator):
    return (values * mask).sum() / denominator


def open_instruct_loss_only(rollout):
    data, mask = open_instruct_batch(rollout), open_instruct_batch(rollout).response_masks[0][:, 1:]
    invalid = {"mask": ~mask, "value": 1.0}  # INVALID_LOGPROB of open-instruct
    labels = data.query_responses[0][:, 1:].clamp(max=V - 1)
    hidden = rollout.packed("hidden", padding=2)[:, :-1]
    logprobs = naive_logprobs(hidden, rollout.weight, labels).masked_fill(**invalid)
    difference = rollout.packed("ref", padding=2)[:, 1:] - logprobs
    return run_snippet(
        "open-instruct", 0,
        new_logprobs_BT=logprobs,
        vllm_logprobs_BT=data.vllm_logprobs[0][:, 1:].masked_fill(**invalid).nan_to_num(nan=1.0),
        response_mask_BT=mask,
        data_BT=data,
        kl_BT=torch.expm1(difference) - difference,
        args=OPEN_INSTRUCT,
        masked_mean=open_instruct_masked_mean,
        loss_denominator=float(rollout.count + ELSEWHERE),
        i=0,
    ).loss  # fmt: skip


def open_instruct_fused(rollout):
    names = run_snippet(
        "open-instruct", 1,
        hidden=rollout.packed("hidden", padding=2, pad=torch.nan),
        lm_head=SimpleNamespace(weight=rollout.weight),
        data_BT=open_instruct_batch(rollout),
        ref_logprobs_BT=[rollout.packed("ref", padding=2, pad=1.0)[:, 1:]],
        args=OPEN_INSTRUCT,
        temperature=rollout.sequences[0].temperature,
        loss_denominator=float(rollout.count + ELSEWHERE),
        i=0,
    )  # fmt: skip
    unscored = sum((s.mask & s.old.isnan()).sum() for s in rollout.sequences)
    assert names.out.metrics["drpo/unscorable"] == unscored
    return names.loss


def by_count(rollout, factor=1.0):
    return lambda s, t: factor / (rollout.count + ELSEWHERE)


@dataclass(frozen=True)
class Way:
    run: object
    coefficient: object = by_count
    kl_coef: float = 0.0
    junk: float = 0.0  # the old log-prob of a token that the engine did not sample
    per_token_temperature: bool = False
    fused: bool = True

    def rollout(self, dtype=torch.float32, seed=0):
        temperatures = (0.7, 1.3, 1.0, 1.1) if self.per_token_temperature else (1.0, 1.0, 1.0, 1.0)
        if self.fused and not self.per_token_temperature and self.run is not nemo_fused_head:
            temperatures = (0.8,) * 4
        return make_rollout(seed, dtype, temperatures, self.junk)


def doubled(rollout):
    return by_count(rollout, 2.0)


KL = OPEN_INSTRUCT.beta
WAYS = {
    "prime-rl, loss only": Way(prime_loss_only, per_token_temperature=True, fused=False),
    "prime-rl, fused head": Way(prime_fused_head, per_token_temperature=True),
    "prime-rl, fused loss": Way(prime_fused_loss, per_token_temperature=True),
    "OpenRLHF, loss only": Way(openrlhf_loss_only, doubled, fused=False),
    "OpenRLHF, fused loss": Way(openrlhf_fused, doubled),
    "SkyRL, loss only": Way(skyrl_loss_only, fused=False),
    "SkyRL, fused loss": Way(skyrl_fused),
    "NeMo-RL, loss only": Way(nemo_loss_only, fused=False),
    "NeMo-RL, fused head": Way(nemo_fused_head),
    "NeMo-RL, fused loss": Way(nemo_fused_loss),
    "slime, loss only": Way(slime_loss_only, slime_coefficient, fused=False),
    "slime, fused loss": Way(slime_fused, slime_coefficient),
    "open-instruct, loss only": Way(open_instruct_loss_only, doubled, KL, torch.nan, fused=False),
    "open-instruct, fused loss": Way(open_instruct_fused, doubled, KL, torch.nan),
}
