"""DRPOTrainer against the real TRL: the same numbers as GRPOTrainer wherever TRL has the formula, step for step."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'trl>=1.16' peft")
pytest.importorskip("peft", reason="peft is not installed")
import transformers
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereForCausalLM,
    Gemma2ForCausalLM,
    GraniteForCausalLM,
    HfArgumentParser,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

import tiny_trl
from drpo_kernels import CISPO, DRPO, GSPO, PPO, SPO, Tokens
from drpo_kernels.integrations import trl as integration
from drpo_kernels.integrations.trl import DRPOConfig, DRPOTrainer, parse_objective
from drpo_kernels.integrations.trl_config import HEAD_OPTIONS
from launcher import launch, torchrun
from snippets import README, ROOT, run, snippet

transformers.logging.set_verbosity_error()

# fp32 log-probs of two correct heads differ by about 1e-6; the losses here cancel to 1e-2 and below, hence the floor
LOSS_BOUND, LOSS_FLOOR = 2e-5, 1e-2
WEIGHT_BOUND = 2e-5
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
TRL_FORMULA = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")


def moe():
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return tiny_trl.model(Qwen3MoeForCausalLM, router_aux_loss_coef=0.05, **shape)


# name: (TRL's options, the objective that says the same, keywords of both trainers, the policy)
CASES = {
    "defaults": ({}, PPO(), {}, tiny_trl.model),
    "grpo accumulated": ({"loss_type": "grpo", "gradient_accumulation_steps": 2}, PPO(), {}, tiny_trl.model),
    "bnpo reused": ({"loss_type": "bnpo", "num_iterations": 2}, PPO(), {}, tiny_trl.model),
    "dr_grpo": ({"loss_type": "dr_grpo", "steps_per_generation": 2}, PPO(), {}, tiny_trl.model),
    "luspo truncated": ({"loss_type": "luspo", "mask_truncated_completions": True}, PPO(), {}, tiny_trl.model),
    "two-sided clip": (
        {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.4, "num_iterations": 2}, PPO(0.1, 0.3, 1.4), {},
        tiny_trl.model,
    ),
    "gspo": (
        {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "num_iterations": 2}, GSPO(),
        {}, tiny_trl.model,
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2}, CISPO(), {}, tiny_trl.model),
    "off-policy mask": ({"off_policy_mask_threshold": 1e-4, "num_iterations": 2}, PPO(), {}, tiny_trl.model),
    "entropy quantile": (
        # at the third step tokens of equal entropy lie at other quantiles, and the last bit chooses among them
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "num_iterations": 2}, PPO(), {}, tiny_trl.model
    ),
    "entropy bonus": ({"entropy_coef": 0.02, "loss_type": "grpo"}, PPO(), {}, tiny_trl.model),
    "adaptive entropy": (
        {"use_adaptive_entropy": True, "entropy_target": 3.7, "gradient_accumulation_steps": 2}, PPO(), {},
        tiny_trl.model,
    ),
    "fp32 head, temperature": ({"cast_lm_head_to_fp32": True, "temperature": 0.7}, PPO(), {}, tiny_trl.model),
    "adapters": ({}, PPO(), LORA, tiny_trl.model),
    "adapters, kl": ({"beta": 0.05}, PPO(), LORA, tiny_trl.model),
    "router": ({"gradient_accumulation_steps": 2}, PPO(), {}, moe),
    "soft-cap": (
        {"temperature": 1.3}, PPO(), {}, lambda: tiny_trl.model(Gemma2ForCausalLM, final_logit_softcapping=3.0)
    ),
    "scale, tied": (
        {}, PPO(), {}, lambda: tiny_trl.model(CohereForCausalLM, logit_scale=0.25, tie_word_embeddings=True)
    ),
    "divided logits": ({}, PPO(), {}, lambda: tiny_trl.model(GraniteForCausalLM, logits_scaling=2.0)),
}  # fmt: skip


def close(ours: list, theirs: list) -> bool:
    """Numbers within the bound, and None (TRL's log of a NaN) where theirs is."""
    return len(ours) == len(theirs) and all(
        a is b if a is None or b is None else abs(a - b) <= LOSS_BOUND * max(abs(b), LOSS_FLOOR)
        for a, b in zip(ours, theirs, strict=True)
    )


def assert_same_run(options, objective, keywords, policy, tmp_path, steps):
    theirs = tiny_trl.trainer(
        GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, max_steps=steps, **options), policy(), **keywords
    )
    start = tiny_trl.weights(theirs)
    want = tiny_trl.run(theirs)
    kept = {name: value for name, value in options.items() if name not in TRL_FORMULA}
    args = tiny_trl.arguments(DRPOConfig, tmp_path, max_steps=steps, objective=objective, **kept)
    ours = tiny_trl.trainer(DRPOTrainer, args, policy(), **keywords)
    got = tiny_trl.run(ours)
    assert len(want["loss"]) == steps
    moved = (tiny_trl.weights(theirs) - start).norm()
    assert moved > 0
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()
    for name in set(want) - {"step_time", "epoch"}:
        assert close(got[name], want[name]), f"{name}: {got[name]} instead of {want[name]}"


@pytest.mark.parametrize("name", CASES)
def test_same_as_trl(name, tmp_path):
    assert_same_run(*CASES[name], tmp_path, steps=10 if name == "defaults" else 3)


def test_same_as_trl_with_a_reference(tmp_path):
    """TRL reloads the reference from the model's path, and its KL carries the ratio by default."""
    tiny_trl.model().save_pretrained(tmp_path / "policy")
    options = {"beta": 0.1, "num_iterations": 2}
    assert_same_run(
        options, PPO(), {}, lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), tmp_path, steps=6
    )


def test_same_evaluation(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8, "max_steps": 2}
    losses = []
    for cls, args in ((GRPOTrainer, GRPOConfig), (DRPOTrainer, DRPOConfig)):
        keywords = {} if args is GRPOConfig else {"objective": PPO()}
        trainer = tiny_trl.trainer(
            cls, tiny_trl.arguments(args, tmp_path, **options, **keywords), tiny_trl.model(),
            eval_dataset=tiny_trl.dataset(8),
        )  # fmt: skip
        trainer.train()
        losses.append([entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry])
    assert len(losses[0]) == 1 and abs(losses[0][0]) > 1e-3
    assert close(*losses)


class EagerDRPO(GRPOTrainer):
    """TRL with the DRPO formula of the paper written into its loss, on TRL's own log-probs: default aggregation."""

    def _compute_loss(self, model, inputs):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention, inputs["completion_ids"].shape[1], compute_entropy=True
        )
        old, adv = inputs.get("old_per_token_logps", logps.detach()), inputs["advantages"][:, None]
        ratio = (logps - old).exp()
        loss = -(ratio * adv - adv.abs() * old.exp() * (ratio - 1) ** 2 / (2 * 0.2)) * inputs["completion_mask"]
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return loss.sum() / (inputs["num_items_in_batch"] * share)


def test_drpo_is_the_paper_s_loss_in_trl(tmp_path):
    common = {"max_steps": 6, "num_iterations": 2, "gradient_accumulation_steps": 2}
    theirs = tiny_trl.trainer(EagerDRPO, tiny_trl.arguments(GRPOConfig, tmp_path, **common), tiny_trl.model())
    want = tiny_trl.run(theirs)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=DRPO(delta=0.2), **common)
    ours = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())  # seeds the process: after the other run
    got = tiny_trl.run(ours)
    assert close(got["loss"], want["loss"]) and close(got["grad_norm"], want["grad_norm"])
    assert (tiny_trl.weights(ours) - tiny_trl.weights(theirs)).norm() <= WEIGHT_BOUND * tiny_trl.weights(theirs).norm()


def test_trl_s_head_is_never_called(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("TRL's head was called")

    tiny_trl.model().save_pretrained(tmp_path / "policy")
    monkeypatch.setattr(chunked_logprob.ChunkedLogProbFunction, "apply", refuse)
    options = {"num_iterations": 2, "beta": 0.1, "max_steps": 2, "off_policy_mask_threshold": 0.5}
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with pytest.raises(AssertionError, match="TRL's head"):  # the trap works: it is the head that GRPOTrainer calls
        tiny_trl.run(tiny_trl.trainer(GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, **options), policy))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=DRPO(delta=0.2), **options)
    assert len(tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, policy))["loss"]) == 2
    assert trl_utils._ChunkedLogProbFunction is chunked_logprob.ChunkedLogProbFunction


def test_the_run_learns(tmp_path):
    args = tiny_trl.arguments(
        DRPOConfig, tmp_path, objective=DRPO(delta=0.2), max_steps=40, num_iterations=2, learning_rate=1e-2,
        per_device_train_batch_size=16, num_generations=8,
    )  # fmt: skip
    rewards = tiny_trl.run(tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model()))["reward"]
    # vowels: 5 of 49 tokens at first
    assert sum(rewards[:5]) / 5 < 0.2
    assert sum(rewards[-5:]) / 5 > 0.3


# --- batches made by hand: what a tiny run cannot produce -------------------------------------------------------------


def batch(trainer, **changes):
    """Two prompts, left-padded, with completions of 2 to 6 tokens."""
    g = torch.Generator().manual_seed(5)
    lengths = torch.tensor([6, 4, 2, 5])
    steps = torch.arange(6)
    inputs = {
        "prompt_ids": torch.randint(4, tiny_trl.VOCAB, (4, 5), generator=g),
        "prompt_mask": torch.tensor([[0, 0, 1, 1, 1]] * 2 + [[1] * 5] * 2),
        "completion_ids": torch.randint(4, tiny_trl.VOCAB, (4, 6), generator=g),
        "completion_mask": (steps < lengths[:, None]).long(),
        "advantages": torch.tensor([1.0, -0.7, 0.0, 0.4]),
        "num_items_in_batch": lengths.sum(),
    }
    inputs = {**inputs, **changes}
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return inputs


def loss_and_gradient(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1) for p in trainer.model.parameters() if p.grad is not None])


def pair(tmp_path, objective=None, **options):
    """A GRPOTrainer and a DRPOTrainer on the same weights."""
    theirs = tiny_trl.trainer(GRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path, **options), tiny_trl.model())
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=objective or PPO(), **options)
    return theirs, tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())


def assert_same_step(theirs, ours, **changes):
    want_loss, want = loss_and_gradient(theirs, batch(theirs, **changes))
    got_loss, got = loss_and_gradient(ours, batch(ours, **changes))
    assert got_loss == pytest.approx(want_loss, rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert (got - want).norm() <= LOSS_BOUND * want.norm()
    assert want.norm() > 0


def old_logprobs(seed=7):
    return -3 - torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) * 2


def test_tool_masks(tmp_path):
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 1:3] = mask[3, 0] = 0
    assert_same_step(*pair(tmp_path), tool_mask=mask, num_items_in_batch=torch.tensor(14))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_advantages_per_token(loss_type, tmp_path):
    advantages = torch.randn(4, 6, generator=torch.Generator().manual_seed(8))
    assert_same_step(
        *pair(tmp_path, loss_type=loss_type), advantages=advantages, old_per_token_logps=old_logprobs()
    )


@pytest.mark.parametrize("shape", [(4, 6), (4, 1)], ids=["token", "sequence"])
def test_vllm_correction_as_in_trl(shape, tmp_path):
    """vllm_importance_sampling_correction=True: recomputed old log-probs, and TRL's ratio on the policy term alone."""
    theirs, ours = pair(tmp_path, vllm_importance_sampling_correction=True)
    theirs.use_vllm = ours.use_vllm = True
    ratio = 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(9))
    sampling = old_logprobs(10)
    sampling[0, 2] = math.nan
    assert_same_step(
        theirs, ours, old_per_token_logps=old_logprobs(), importance_sampling_ratio=ratio,
        sampling_per_token_logps=sampling,
    )  # fmt: skip


def test_the_engine_s_logprobs_are_the_behaviour_policy(tmp_path):
    """By default μ is what the sampling engine reported, counted once; a token it could not score does not count."""
    theirs, ours = pair(tmp_path, vllm_importance_sampling_correction=False)
    ours.use_vllm, ours.beta, theirs.beta = True, 0.1, 0.1
    ours.args.compact, reference = "mask", {"ref_per_token_logps": old_logprobs(11)}
    sampling = old_logprobs(10)
    # TRL, told that the old log-probs are the engine's, with the unscorable token out of its mask but in its counts
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 2] = 0
    want_loss, want = loss_and_gradient(
        theirs, batch(theirs, old_per_token_logps=sampling, tool_mask=mask, **reference)
    )
    unscorable = sampling.clone()
    unscorable[0, 2] = math.nan
    changes = {"old_per_token_logps": old_logprobs(), "sampling_per_token_logps": unscorable, **reference}
    got_loss, got = loss_and_gradient(ours, batch(ours, **changes))
    assert got_loss == pytest.approx(want_loss, rel=LOSS_BOUND, abs=LOSS_BOUND * LOSS_FLOOR)
    assert (got - want).norm() <= LOSS_BOUND * want.norm()
    assert ours._metrics["train"]["drpo/unscorable"] == [1]
    assert all(math.isfinite(value) for series in ours._metrics["train"].values() for value in series)
    for name, series in theirs._metrics["train"].items():
        assert close(ours._metrics["train"][name], series), name


def test_sparse_gradients(tmp_path):
    _, exact = pair(tmp_path)
    want_loss, want = loss_and_gradient(exact, batch(exact))
    errors = []
    for tolerance in (0.5, 1e-3):
        args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=PPO(), sparse_grad=tolerance)
        sparse = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
        loss, found = loss_and_gradient(sparse, batch(sparse))
        assert loss == pytest.approx(want_loss, rel=1e-6)
        assert sparse._metrics["train"]["drpo/left_out_share_max"][0] <= tolerance
        errors.append((found - want).norm() / want.norm())
    # every token's dlogits are within τ of themselves; their sum may cancel, but not to a twentieth
    assert errors[0] > 1e-3 and errors[1] < 20 * 1e-3


def test_skipping_tokens_without_advantage(tmp_path):
    theirs, ours = pair(tmp_path)
    args = tiny_trl.arguments(DRPOConfig, tmp_path, objective=PPO(), compact="active")
    lean = tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())
    assert_same_step(theirs, lean)
    loss_and_gradient(ours, batch(ours))
    assert ours._metrics["train"]["drpo/active_share"] == [1.0]
    assert lean._metrics["train"]["drpo/active_share"] == [pytest.approx(15 / 17)]
    # of the computed tokens, not a mean in which the skipped ones count as 0
    assert lean._metrics["train"]["entropy"] == lean._metrics["train"]["drpo/entropy_mean"]
    assert lean._metrics["train"]["entropy"][0] == pytest.approx(ours._metrics["train"]["entropy"][0], rel=0.1)


def test_all_masked(tmp_path):
    _, ours = pair(tmp_path)
    nothing = torch.zeros(4, 6, dtype=torch.long)
    loss, gradient = loss_and_gradient(ours, batch(ours, tool_mask=nothing, num_items_in_batch=torch.tensor(0)))
    assert loss == 0 and gradient.eq(0).all()


def test_a_user_s_objective(tmp_path):
    """The loss of an objective is its own, whatever TRL's formula would have said."""
    _, ours = pair(tmp_path, objective=DRPO(delta=0.1))
    old = old_logprobs()
    got, _ = loss_and_gradient(ours, batch(ours, old_per_token_logps=old))
    inputs = batch(ours)
    logits = ours.model(
        input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    ).logits[:, -7:-1]
    logp = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
    tokens = Tokens(logp.double(), old.double(), inputs["advantages"][:, None].double())
    want = (DRPO(delta=0.1).token_loss(tokens) * inputs["completion_mask"]).sum() / 17
    assert got == pytest.approx(want.item(), rel=LOSS_BOUND)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, objective",
    [("DRPO", DRPO()), ("DRPO(delta=0.2)", DRPO(0.2)), (" SPO( 0.3 )", SPO(0.3)), ("PPO(dual_clip=None)", PPO())],
)
def test_objective_as_text(text, objective):
    assert parse_objective(text) == objective
    assert parse_objective(repr(objective)) == objective


BAD_TEXTS = ("", "DRPO(", "DRPO(delta=x)", "__import__('os')", "DRPO(delta=-1)", "NOPE()", "3", "DRPO(epsilon=1)")


@pytest.mark.parametrize("text", [*BAD_TEXTS, "DRPO(**{})", "DRPO(**{'delta': 1})"])
def test_bad_text(text):
    with pytest.raises(ValueError, match=r"objective|delta"):
        parse_objective(text)


def test_config_survives_the_command_line_and_json(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--objective", "PPO(clip_high=0.28)", "--use_cpu", "--bf16", "False"]
    (config,) = HfArgumentParser(DRPOConfig).parse_args_into_dataclasses([*arguments, "--report_to", "none"])
    assert config.objective == PPO(clip_high=0.28)
    saved = json.loads(config.to_json_string())
    assert parse_objective(saved["objective"]) == config.objective
    added = {"objective", "compact", "sparse_grad", *HEAD_OPTIONS}
    assert set(saved) == {*GRPOConfig(str(tmp_path), bf16=False, use_cpu=True).to_dict(), *added}
    torch.save(config, tmp_path / "args.bin")
    assert torch.load(tmp_path / "args.bin", weights_only=False).objective == config.objective
    assert DRPOConfig(str(tmp_path), bf16=False, use_cpu=True).objective == DRPO()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": GSPO(), "beta": 0.1}, "use_bias_correction_kl"),
        ({"compact": "none"}, "compact"),
        ({"vllm_importance_sampling_mode": "token_truncate"}, "vllm_importance_sampling_correction=True"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "vllm_importance_sampling_correction=True"),
        ({"compact": "active", "use_adaptive_entropy": True}, "compact"),
        ({"sparse_grad": 1.0}, "sparse_grad"),
        ({"sparse_grad": 0.01, "entropy_coef": 0.1}, "sparse_grad"),
        ({"sparse_grad": 0.01, "objective": GSPO()}, "sparse_grad"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tiny_trl.arguments(DRPOConfig, tmp_path, **options)


@dataclass
class OnTheCPU(DRPOConfig):
    """The snippets are for a GPU; this is what differs without one."""

    use_cpu: bool = True
    max_completion_length: int = 6
    report_to: str = "none"


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "integrations" / "trl.md"], ids=["readme", "page"])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(integration, "DRPOConfig", OnTheCPU)
    tiny_trl.model().save_pretrained("policy")
    tiny_trl.tokenizer().save_pretrained("policy")
    names = {"model": "policy", "reward": tiny_trl.letter_share, "dataset": tiny_trl.dataset(2)}
    trainer = run(snippet("integrations.trl import", page), **names)["trainer"]
    assert trainer.state.global_step > 0
    assert trainer.args.objective == DRPO(delta=0.2)


def test_fields_set_after_construction_are_checked(tmp_path):
    args = tiny_trl.arguments(DRPOConfig, tmp_path)
    args.objective = "DRPO(0.1)"
    assert tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model()).objective == DRPO(0.1)
    args.loss_type = "sapo"
    with pytest.raises(ValueError, match="loss_type"):
        tiny_trl.trainer(DRPOTrainer, args, tiny_trl.model())


def test_an_objective_that_no_checkpoint_could_hold(tmp_path):
    @dataclass(frozen=True)
    class Local(DRPO):
        pass

    with pytest.raises(ValueError, match="top of a module"):
        tiny_trl.arguments(DRPOConfig, tmp_path, objective=Local())


def test_signature_is_trl_s():
    assert inspect.signature(DRPOTrainer.__init__) == inspect.signature(GRPOTrainer.__init__)


def test_compiled_model(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    assert_same_run(options, PPO(), {}, tiny_trl.model, tmp_path, steps=2)


def test_accumulated_metrics_are_one_step_s(tmp_path, caplog):
    """A micro-batch without an advantage is no reason for a warning, and counts add up."""
    _, ours = pair(tmp_path)
    nothing = batch(ours, advantages=torch.zeros(4))
    ours.accelerator.gradient_state._set_sync_gradients(False)
    loss_and_gradient(ours, nothing)
    assert "drpo/tokens" not in ours._metrics["train"]
    ours.accelerator.gradient_state._set_sync_gradients(True)
    loss_and_gradient(ours, batch(ours))
    assert ours._metrics["train"]["drpo/tokens"] == [34]
    assert not any("evidence" in name for name in ours._metrics["train"])
    assert "advantages" not in caplog.text


def test_fsdp_does_not_round_what_the_loss_is_made_of(tmp_path):
    """FSDP1 casts every tensor it finds in a forward's arguments, in dataclasses too."""
    from torch.distributed.utils import _apply_to_tensors

    _, ours = pair(tmp_path)
    seen = []

    class Wrapped(torch.nn.Module):
        def forward(self, fused_head, **inputs):
            fused_head = _apply_to_tensors(torch.Tensor.bfloat16, {"fused_head": fused_head})["fused_head"]
            seen.append(fused_head.old_logprobs)
            return ours.model(**inputs, fused_head=fused_head)

    old = old_logprobs()
    ours._compute_loss(Wrapped(), batch(ours, old_per_token_logps=old))
    assert torch.equal(seen[0], old)


def test_wrong_types(tmp_path):
    with pytest.raises(TypeError, match="objective"):
        tiny_trl.arguments(DRPOConfig, tmp_path, objective=0.2)
    with pytest.raises(TypeError, match="DRPOConfig"):
        tiny_trl.trainer(DRPOTrainer, tiny_trl.arguments(GRPOConfig, tmp_path), tiny_trl.model())


# --- processes --------------------------------------------------------------------------------------------------------

RECIPES = ROOT / "docs" / "recipes"


def test_two_processes(tmp_path):
    """The same run as TRL's on two processes, and metrics of both ranks' tokens."""
    status, output = torchrun(2, "trl_worker.py", str(tmp_path))
    assert status == 0, output[-4000:]
    record = json.loads(next(line for line in output.splitlines() if line.startswith("RECORD "))[len("RECORD ") :])
    theirs, ours = record["theirs"], record["ours"]
    for name in set(theirs) - {"step_time", "epoch"}:
        assert close(ours[name], theirs[name]), f"{name}: {ours[name]} instead of {theirs[name]}"
    assert record["moved"] > 0 and record["ranks"] == 0
    assert record["weights"] <= WEIGHT_BOUND
    # a step's tokens are those of both micro-batches on both ranks
    counts = [sum(ranks) for ranks in zip(*record["tokens"], strict=True)]
    assert ours["drpo/tokens"] == [a + b for a, b in zip(counts[::2], counts[1::2], strict=True)]
    # a mean over tokens; TRL's log is a mean over micro-batches of means
    assert ours["drpo/entropy_mean"] == pytest.approx(theirs["entropy"], rel=0.02)


def test_recipe(tmp_path):
    """The launch of docs/recipes on two CPU processes, as written there but for the number of steps."""
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    written = next(part for part in text.split("accelerate launch ")[1:] if "--use_cpu" in part).split("```")[0]
    words = written.replace("\\\n", " ").split()
    words[words.index("--max_steps") + 1] = "3"
    words = [str(RECIPES / word) if (RECIPES / word).exists() else word for word in words]
    status, output = launch("accelerate.commands.launch", *words, "--output_dir", str(tmp_path / "out"))
    assert status == 0, output[-4000:]
    assert "'drpo/weight_mean'" in output and "'train_loss'" in output
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(p.isfinite().all() for p in saved.parameters())
