"""The snippets of docs/integrations, run on each trainer's own layout and compared with float64.

A rollout is a list of sequences, each with hidden states of its own. A runner lays it out and names the tensors as the
trainer does, runs the page's snippet and returns its loss. The expectation is computed sequence by sequence and token
by token in float64: token t is scored by the hidden state at t - 1 of the *same* sequence. The trainers are not
installed: `stand_ins` puts modules with the few names that the snippets import in their place.

Tolerances: gradients 5e-5 of their norm from fp32 inputs and 0.4 % from bf16 (the package's promise; in the loss-only
ways autograd through a [n, 23] log-softmax in fp32 stays within 23·2⁻²⁴, far below), the loss 1e-4 of the sum of its
absolute terms (|Δlogprob| <= 1e-4, and a term changes by at most its size times r·w, which is about 1).
"""

import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

PAGES = Path(__file__).resolve().parents[2] / "docs" / "integrations"
TRAINERS = ("prime-rl", "openrlhf", "skyrl", "nemo-rl", "slime", "open-instruct")
V, H, DELTA = 23, 16, 0.2
GRADIENT_BOUND = {torch.float32: 5e-5, torch.bfloat16: 4e-3}
LOSS_BOUND = 1e-4
ELSEWHERE = 37  # tokens of other micro-batches and ranks in the global count


# --- rollouts and what is expected of them ----------------------------------------------------------------------------


@dataclass
class Sequence:
    """One prompt and response; everything but `hidden` belongs to the token at its index."""

    hidden: Tensor  # [n, H], a leaf
    tokens: Tensor
    prompt: int
    old: Tensor
    advantages: Tensor
    mask: Tensor
    ref: Tensor
    temperature: float
    group_sum: float = 0.0  # tokens in the loss of this sequence and its siblings (slime)

    def __len__(self):
        return len(self.tokens)


@dataclass
class Rollout:
    sequences: list[Sequence]
    weight: nn.Parameter

    def column(self, name: str) -> list[Tensor]:
        return [getattr(s, name) for s in self.sequences]

    @property
    def count(self) -> int:
        return int(sum(s.mask.sum() for s in self.sequences))

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.column("hidden"), self.weight]

    def layout(self, name: str, length: int | None = None, pad: float = 0, left: int | None = None) -> Tensor:
        """[B, length] by token: right-padded, or with prompts left-padded to `left`."""
        rows = self.column(name)
        if left is not None:
            rows = [torch.cat([row.new_full((left - s.prompt, *row.shape[1:]), pad), row])
                    for row, s in zip(rows, self.sequences, strict=True)]  # fmt: skip
        length = length or max(map(len, rows))
        return torch.stack([torch.cat([r, r.new_full((length - len(r), *r.shape[1:]), pad)]) for r in rows])

    def packed(self, name: str, padding: int = 0, pad: float = 0) -> Tensor:
        """[1, T] by token, sequences one after the other."""
        row = torch.cat(self.column(name))
        return torch.cat([row, row.new_full((padding, *row.shape[1:]), pad)])[None]

    def responses(self, name: str) -> list[Tensor]:
        return [getattr(s, name)[s.prompt :] for s in self.sequences]


def make_sequence(generator, weight, prompt, response, temperature=1.0, advantage=None, junk=0.0, dtype=torch.float32):
    n = prompt + response
    hidden = torch.randn(n, H, generator=generator).to(dtype)
    tokens = torch.randint(V, (n,), generator=generator)
    logits = (hidden[:-1].double() @ weight.detach().double().T) / temperature
    exact = torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0]
    noise = 0.3 * torch.randn(2, n, generator=generator, dtype=torch.float64)
    old, ref = (torch.cat([exact[:1], exact]) + noise).clamp(max=-1e-3).float()
    advantages = torch.full((n,), advantage) if advantage is not None else torch.randn(n, generator=generator)
    mask = torch.arange(n) >= prompt
    mask[prompt + 1] = response < 4  # a tool's token inside a longer response
    old[~mask] = junk
    return Sequence(hidden.requires_grad_(), tokens, prompt, old, advantages, mask, ref, temperature)


def make_rollout(seed=0, dtype=torch.float32, temperatures=(1.0, 1.0, 1.0, 1.0), junk=0.0) -> Rollout:
    """Four sequences, the first two siblings, the third without advantage, so that its rows may be dropped."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter((0.5 * torch.randn(V, H, generator=generator)).to(dtype))
    shapes = zip(((3, 5), (1, 3), (2, 4), (4, 6)), temperatures, (None, None, 0.0, -1.5), strict=True)
    sequences = [make_sequence(generator, weight, *shape, temp, adv, junk, dtype) for shape, temp, adv in shapes]
    sums = [float(s.mask.sum()) for s in sequences]
    for s, total in zip(sequences, (sums[0] + sums[1], sums[0] + sums[1], *sums[2:]), strict=True):
        s.group_sum = total
    return Rollout(sequences, weight)


def expected(rollout: Rollout, coefficient, kl_coef: float = 0.0) -> tuple[Tensor, list[Tensor], float]:
    """-> (loss, gradients of the leaves, sum of the absolute terms); token t of s counts coefficient(s, t) times."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in rollout.leaves]
    weight = leaves[-1]
    loss, scale = torch.zeros((), dtype=torch.float64), 0.0
    for s, hidden in zip(rollout.sequences, leaves[:-1], strict=True):
        for t in range(1, len(s)):
            if not s.mask[t] or s.old[t].isnan():
                continue
            logits = weight @ hidden[t - 1] / s.temperature
            logprob = logits[s.tokens[t]] - logits.logsumexp(0)
            old, advantage = s.old[t].double(), s.advantages[t].double()
            ratio = (logprob - old).exp()
            term = -(ratio * advantage - advantage.abs() * old.exp() * (ratio - 1) ** 2 / (2 * DELTA))
            if kl_coef:
                difference = s.ref[t].double() - logprob
                term = term + kl_coef * (difference.exp() - 1 - difference)
            loss = loss + coefficient(s, t) * term
            scale += abs(coefficient(s, t) * term.item())
    return loss.detach(), list(torch.autograd.grad(loss, leaves)), scale


def assert_agrees(rollout: Rollout, loss: Tensor, coefficient, kl_coef: float = 0.0):
    want_loss, want, scale = expected(rollout, coefficient, kl_coef)
    assert loss.shape == () and abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    gradients = torch.autograd.grad(loss, rollout.leaves)
    bound = GRADIENT_BOUND[rollout.weight.dtype]
    for got, exact in ((torch.cat(gradients[:-1]), torch.cat(want[:-1])), (gradients[-1], want[-1])):
        assert got.dtype == rollout.weight.dtype
        assert exact.norm() > 0 and (got.double() - exact).norm() / exact.norm() <= bound
    for got, s in zip(gradients[:-1], rollout.sequences, strict=True):
        predicts = torch.cat([s.mask[1:] & (s.advantages[1:] != 0), torch.tensor([False])])
        assert (got[~predicts] == 0).all() or kl_coef, "a position outside the loss has a gradient"
        assert (got[-1] == 0).all(), "the last position of a sequence predicts nothing"
        assert (got[predicts] != 0).any(1).all()


# --- the pages and the trainers' names --------------------------------------------------------------------------------


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.M | re.S)


def run_snippet(page: str, index: int, **names) -> SimpleNamespace:
    namespace = dict(names)
    exec(compile(snippets(page)[index], f"{page}.md, snippet {index + 1}", "exec"), namespace)
    return SimpleNamespace(**namespace)


@dataclass
class LossInputs:
    """prime-rl's, one sequence at a time."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


class OutputLinear(nn.Linear):
    """prime-rl's FusedOutputLinear, whose forward the page replaces."""

    def forward(self, *arguments, **keywords):
        raise AssertionError("the page replaces this")


class PolicyLoss(nn.Module):
    """OpenRLHF's."""

    def __init__(self, token_level_loss=True):
        super().__init__()
        self.token_level_loss = token_level_loss


def aggregate_loss(loss, mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """OpenRLHF's two reductions, each by global counts or, without them, by its own."""
    if token_level_loss:
        total = (loss * mask).sum()
        return total / mask.sum() if batch_num_tokens is None else total / batch_num_tokens * dp_size
    means = torch.stack([row[keep].mean() for row, keep in zip(loss, mask.bool(), strict=True) if keep.any()])
    return means.mean() if global_batch_size is None else means.sum() / global_batch_size * dp_size


class ClippedPGLossFn:
    """NeMo-RL's, as far as its metrics go."""

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        assert not torch.is_grad_enabled()
        return next_token_logprobs.sum(), {"loss": 0.0, "num_valid_samples": data["sample_mask"].sum().item()}


def slime_log_probs(logits, *, args, unconcat_tokens, total_lengths, response_lengths, with_entropy=False):
    """slime's get_log_probs_and_entropy: per-response lists from packed float32 logits [1, T, V]."""
    assert logits.dtype == torch.float32
    full, start, out = torch.log_softmax(logits[0] / args.rollout_temperature, -1), 0, {"log_probs": [], "entropy": []}
    for tokens, total, response in zip(unconcat_tokens, total_lengths, response_lengths, strict=True):
        rows = full[start + total - response - 1 : start + total - 1]
        out["log_probs"].append(rows.gather(1, tokens[-response:, None])[:, 0])
        out["entropy"].append(-(rows.exp() * rows).sum(1))
        start += total
    return None, out


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
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


def naive_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature=1.0) -> Tensor:
    """What every trainer does without a fused head, for the loss-only ways."""
    return torch.log_softmax(hidden @ weight.T / temperature, -1).gather(-1, targets[..., None])[..., 0]


# --- each trainer's way to the loss -----------------------------------------------------------------------------------


def prime_compute_loss(rollout, loss_fn, logprobs, scale, weights=None):
    """`compute_loss`: log-probs [1, T] shifted back to their tokens, split into sequences, summed, divided."""
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
    """[B, A] with A = T - 1: column j belongs to token j + 1; masks and log-probs end in padding."""
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
    """Prompts padded on the left, responses on the right; [B, A] tensors are the last A columns."""
    left, actions = max(s.prompt for s in rollout.sequences), max(len(s) - s.prompt for s in rollout.sequences)
    columns = {"sequences": "tokens", "hidden": "hidden", "rollout_logprobs": "old", "advantages": "advantages",
               "loss_mask": "mask"}  # fmt: skip
    batch = {name: rollout.layout(column, left + actions, left=left) for name, column in columns.items()}
    for name in ("rollout_logprobs", "advantages", "loss_mask"):
        batch[name] = batch[name][:, -actions:]
    batch["advantages"] = batch["advantages"] / (rollout.count + ELSEWHERE)  # token_mean over the minibatch
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
    """[B, S] by token, right-padded; masks are numbers."""
    names = {"input_ids": "tokens", "generation_logprobs": "old", "advantages": "advantages", "token_mask": "mask"}
    data = {name: rollout.layout(column) for name, column in names.items()}
    return {**data, "token_mask": data["token_mask"].int(), "sample_mask": torch.ones(len(rollout.sequences))}


def nemo_loss(rollout, logprobs):
    """`SequencePackingLossWrapper`: the loss function on one unpadded sequence after the other."""
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
    """Megatron's hidden states are [S, B, H]; the loss is called on the padded batch."""
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
    """Per-response lists; the samples of one rollout share its denominator."""
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
    """One packed row [1, T] by token, padded; vLLM's log-probs are NaN on prompts."""
    names = {"query_responses": "tokens", "advantages": "advantages", "response_masks": "mask", "vllm_logprobs": "old"}
    ends = {"query_responses": V + 5}  # the pad token need not be in the vocabulary
    return SimpleNamespace(**{n: [rollout.packed(c, padding=2, pad=ends.get(n, 0))] for n, c in names.items()})


OPEN_INSTRUCT = SimpleNamespace(beta=0.05, world_size=4, sequence_parallel_size=2)


def open_instruct_masked_mean(values, mask, axis, denominator):
    return (values * mask).sum() / denominator


def open_instruct_loss_only(rollout):
    data, mask = open_instruct_batch(rollout), open_instruct_batch(rollout).response_masks[0][:, 1:]
    invalid = {"mask": ~mask, "value": 1.0}  # their INVALID_LOGPROB
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
    junk: float = 0.0  # what stands for old_logprobs on tokens the engine did not sample
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
every_way = pytest.mark.parametrize("name", WAYS)
every_fused_way = pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.fused])


# --- tests ------------------------------------------------------------------------------------------------------------


@every_way
def test_loss_and_gradients(name):
    way = WAYS[name]
    rollout = way.rollout()
    assert_agrees(rollout, way.run(rollout), way.coefficient(rollout), way.kl_coef)


@every_fused_way
def test_bf16(name):
    """The dtype they train in: hidden states and head in bf16, log-probs in float32."""
    way = WAYS[name]
    rollout = way.rollout(torch.bfloat16)
    loss = way.run(rollout)
    assert loss.dtype == torch.float32
    assert_agrees(rollout, loss, way.coefficient(rollout), way.kl_coef)


@every_way
def test_nothing_crosses_a_boundary(name):
    """Other contents in every other sequence of the batch leave a sequence's gradient as it was, bit by bit."""
    way = WAYS[name]
    rollout, other = way.rollout(), way.rollout(seed=1)
    for kept, sequence in enumerate(rollout.sequences):
        sequences = [*other.sequences[:kept], sequence, *other.sequences[kept + 1 :]]
        losses = [way.run(x) for x in (rollout, Rollout(sequences, rollout.weight))]
        assert losses[0] != losses[1]
        alone, beside = (torch.autograd.grad(loss, sequence.hidden)[0] for loss in losses)
        assert torch.equal(alone, beside)


@every_way
def test_micro_batches_add_up(name):
    """The caller's global count makes the sum over micro-batches the loss of the whole batch."""
    way = WAYS[name]
    whole = way.rollout()
    want_loss, want, scale = expected(whole, way.coefficient(whole), way.kl_coef)
    loss, gradients = 0.0, [torch.zeros_like(leaf) for leaf in whole.leaves]
    for part in (slice(0, 2), slice(2, 4)):
        micro = Rollout(whole.sequences[part], whole.weight)
        first = micro.sequences[0]
        micro_loss = way.run(micro) * (way.coefficient(whole)(first, 1) / way.coefficient(micro)(first, 1))
        loss += micro_loss.item()
        found = torch.autograd.grad(micro_loss, whole.leaves, allow_unused=True)
        gradients = [total if new is None else total + new for total, new in zip(gradients, found, strict=True)]
    assert abs(loss - want_loss.item()) <= LOSS_BOUND * scale
    assert (gradients[-1].double() - want[-1]).norm() / want[-1].norm() <= GRADIENT_BOUND[torch.float32]


@pytest.mark.parametrize("run", [prime_loss_only, prime_fused_head])
def test_prime_rl_weight_stream(run):
    rollout = WAYS["prime-rl, loss only"].rollout()
    streams = [torch.rand(len(s), generator=torch.Generator().manual_seed(i)) + 0.5
               for i, s in enumerate(rollout.sequences)]  # fmt: skip
    weights = {id(s): stream for s, stream in zip(rollout.sequences, streams, strict=True)}
    count = rollout.count + ELSEWHERE
    assert_agrees(rollout, run(rollout, streams), lambda s, t: weights[id(s)][t].double() / count)


def test_prime_rl_without_a_token_of_the_component():
    rollout = WAYS["prime-rl, loss only"].rollout()
    for s in rollout.sequences:
        s.mask[:] = False
    gradients = torch.autograd.grad(prime_loss_only(rollout), rollout.leaves)
    assert all((g == 0).all() for g in gradients)


def test_openrlhf_per_sample_mean():
    rollout = make_rollout()
    loss = openrlhf_loss_only(rollout, token_level=False, dp_size=2, global_batch_size=torch.tensor(9.0))
    assert_agrees(rollout, loss, lambda s, t: 2 / 9 / s.mask.sum().item())


def test_openrlhf_padded():
    """What the page says of the layout without packing, in both aggregations."""
    from drpo_kernels import DRPO, linear_policy_loss

    rollout = make_rollout()
    experience, sequences = openrlhf_experience(rollout), rollout.layout("tokens")
    A = experience.action_mask.shape[1]
    for reduction, count, coefficient in (
        ("token-sum", rollout.count, lambda s, t: 2 / rollout.count),
        ("seq-mean-token-mean", 9, lambda s, t: 2 / 9 / s.mask.sum().item()),
    ):
        out = linear_policy_loss(
            rollout.layout("hidden")[:, -A - 1 : -1], rollout.weight, sequences[:, -A:], experience.rollout_log_probs,
            experience.advantages, experience.action_mask, objective=DRPO(delta=DELTA), reduction=reduction,
            normalizer=torch.tensor(float(count)) / 2,
        )  # fmt: skip
        assert_agrees(rollout, out.loss, coefficient)


def test_skyrl_under_their_autocast():
    """Float32 hidden states and head, holding bf16 values, under torch.autocast: the same bound as in bf16."""
    exact = WAYS["SkyRL, fused loss"].rollout(torch.bfloat16)
    sequences = [dataclasses.replace(s, hidden=s.hidden.detach().float().requires_grad_()) for s in exact.sequences]
    rollout = Rollout(sequences, nn.Parameter(exact.weight.detach().float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = skyrl_fused(rollout)
    want_loss, want, scale = expected(rollout, by_count(rollout))
    assert abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    gradients = torch.autograd.grad(loss, rollout.leaves)
    for got, true in ((torch.cat(gradients[:-1]), torch.cat(want[:-1])), (gradients[-1], want[-1])):
        assert (got.double() - true).norm() / true.norm() <= GRADIENT_BOUND[torch.bfloat16]


def test_slime_from_logits():
    """What the page says of logits that exist anyway: `policy_loss` with the same arguments."""
    rollout = WAYS["slime, fused loss"].rollout()
    source = snippets("slime")[1].replace("linear_policy_loss", "policy_loss")
    source = source.replace("hidden.to(head.weight.dtype), head.weight", "hidden")
    namespace = {}
    exec(source, namespace)
    batch, logits = slime_batch(rollout), rollout.packed("hidden", padding=3) @ rollout.weight.T
    loss, _ = namespace["fused_drpo_loss"](slime_args(rollout), batch, logits, slime_reducer(batch))
    assert_agrees(rollout, loss, slime_coefficient(rollout))


@pytest.mark.parametrize("name", ["open-instruct, loss only", "open-instruct, fused loss"])
def test_open_instruct_unscored_tokens(name):
    """vLLM's NaN on a response token: the token leaves the loss, the denominator stays the caller's."""
    way = WAYS[name]
    rollout = way.rollout()
    for s in rollout.sequences[1:]:
        s.old[-1] = torch.nan
    want_loss, want, scale = expected(rollout, way.coefficient(rollout), way.kl_coef)
    loss = way.run(rollout)
    assert abs(loss.item() - want_loss.item()) <= LOSS_BOUND * scale
    for got, exact in zip(torch.autograd.grad(loss, rollout.leaves), want, strict=True):
        assert (got.double() - exact).norm() <= GRADIENT_BOUND[torch.float32] * exact.norm()


@pytest.mark.parametrize("page", TRAINERS)
def test_page(page):
    """Short snippets, and the commit the page was written against."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    assert re.search(r"^Written against `[\w.-]+/[\w.-]+` at `[0-9a-f]{8,9}` \(\d{4}-\d\d-\d\d\)", text, re.MULTILINE)
    for snippet in snippets(page):
        lines = [line for line in snippet.splitlines() if line.strip()]
        imports = [line for line in lines if line.startswith(("import", "from"))]
        assert 5 <= len(lines) <= 15 + len(imports)


def test_every_snippet_is_run():
    """A snippet added to a page without a runner here would go untested."""
    source = Path(__file__).read_text(encoding="utf-8")
    for page in TRAINERS:
        for index in range(len(snippets(page))):
            assert re.search(rf'run_snippet\(\s*"{page}", {index}\b', source), f"{page}.md, snippet {index + 1}"


def test_index_names_every_page():
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({page}.md)" in text for page in (*TRAINERS, "trl", "verl", "transformers"))
