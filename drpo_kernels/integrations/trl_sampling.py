"""The sampled batches of TRL's trainers: log-probs of the tokens, and the ids that a filter kept for them."""

import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from drpo_kernels.evidence import FAR_BELOW_ONE
from drpo_kernels.integrations import needs
from drpo_kernels.integrations.trl_objective import ObjectiveTrainer
from drpo_kernels.tokens import scorable

with needs("trl", "trl>=1.16"):
    from trl import GRPOTrainer

logger = logging.getLogger(__name__)

# Sampling options that change the distribution of the engine's log-probs. At these values, and at None, they do not.
UNFILTERED: dict[str, tuple] = {
    "top_p": (1,), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,),
    "frequency_penalty": (0,), "min_tokens": (0,), "logit_bias": ({},), "bad_words": ([],), "allowed_token_ids": (),
    "logits_processors": ([],), "guided_decoding": (), "structured_outputs": (), "vllm_structured_outputs_regex": (),
}  # fmt: skip

# The ratio stays right under these options if the engine returns the `kept_ids`.
REPLAYED = {"top_p", "top_k", "min_p"}

# If more than this share of a rollout's log-probs cannot be log-probs, all of them are taken for placeholders.
PLACEHOLDERS = 0.5


def filters_of(sampling: Mapping) -> list[str]:
    """The names of the given sampling options that change the distribution of the engine's log-probs."""
    return [name for name, same in UNFILTERED.items() if sampling.get(name) not in (None, *same)]


def engine_warning(mode: str, temperature: float, filters: list[str]) -> str | None:
    """What is wrong with log-probs of an engine that samples with these filters; `mode` is vLLM's --logprobs-mode."""
    if mode != "processed_logprobs":  # other modes give log-probs before the temperature and the filters
        if temperature == 1:
            return None
        return (
            f"the vLLM server runs with --logprobs-mode {mode}: its log-probs are those before the temperature "
            f"{temperature:g}, so μ is wrong. Restart it with --logprobs-mode processed_logprobs"
        )
    if not filters:
        return None
    kept = ', or return from a rollout_func the ids that they kept, as "kept_ids"' if set(filters) <= REPLAYED else ""
    return (
        f"μ is the engine's log-prob after {', '.join(filters)}, which π does not apply: the ratio is one of unlike "
        f"things. Leave these options out{kept}, or expect ratios away from 1 on a fresh batch"
    )


class SampledBatches(ObjectiveTrainer, GRPOTrainer):  # type: ignore[misc]  # `objective` is not transformers'
    """TRL's `GRPOTrainer` whose batches hold real log-probs or none: placeholders are removed. With a `rollout_func`
    they may also hold "kept_ids".
    """

    _generated_ids: Tensor | None = None  # the kept ids of the batch that is being generated, [B, K, ids]

    def _filters(self) -> list[str]:
        given = self.args.generation_kwargs or {}
        hotter = given.get("temperature", self.temperature) != self.temperature
        return filters_of(vars(self.args) | given) + ["temperature"] * hotter

    def _generate(self, prompts):
        """TRL's batch. Every token of a `rollout_func` has a log-prob or None; TRL would pad missing ones with 0."""
        output: list[Any] = list(super()._generate(prompts))
        completions, logprobs, kept_ids = output[1], output[4], output[5].pop("kept_ids", None)
        self._generated_ids = None
        if self.rollout_func is None:
            return tuple(output)
        self._require_everywhere(logprobs is not None)
        if kept_ids is not None:
            ids = padded_ids(kept_ids, completions, output[2], int(self.pad_to_multiple_of or 1))
            self._generated_ids = ids.to(self.accelerator.device)
        if logprobs is None:
            return tuple(output)
        if self.use_vllm and not self.vllm_importance_sampling_correction:
            filters = [name for name in self._filters() if kept_ids is None or name not in REPLAYED]
            if warning := engine_warning("processed_logprobs", self.temperature, filters):
                self._warn_once("filters", warning)
        output[4] = rows = []
        for tokens, row in zip_longest(completions, logprobs, fillvalue=()):
            rows.append([None] * len(tokens) if row is None else row)
            if (given := len(rows[-1])) != len(tokens):
                raise ValueError(
                    f"rollout_func must return one log-prob per completion token, got {given} for the {len(tokens)} "
                    f'tokens of completion {len(rows) - 1}: write None for those that have none, or "logprobs": None'
                )
        return tuple(output)

    def _require_everywhere(self, has_logprobs: bool) -> None:
        """Raise ValueError if only some processes have log-probs, because the collectives that follow need all."""
        has = torch.tensor(int(has_logprobs), device=self.accelerator.device)
        count, processes = self.accelerator.reduce(has, reduction="sum").item(), self.accelerator.num_processes
        if count not in (0, processes):
            raise ValueError(
                f'rollout_func must return "logprobs" on every process or on none, got None on {processes - count} of '
                f"{processes}: write None for each token that has none"
            )

    def _generate_and_score_completions(self, inputs):
        """TRL's batch without log-probs that are placeholders; TRL requires a `rollout_func` to return some."""
        output = super()._generate_and_score_completions(inputs)
        sampled = output.get("sampling_per_token_logps")
        if self.rollout_func is not None and sampled is not None and self._are_placeholders(output, sampled):
            del output["sampling_per_token_logps"]
            if "importance_sampling_ratio" in output:
                output["importance_sampling_ratio"] = torch.ones_like(output["importance_sampling_ratio"])
            self._warn_once(
                "rollout_func",
                "rollout_func returns no log-probs of the sampled tokens: most are exactly 0, NaN, or -100 and below. "
                "μ is taken from the policy at generation instead, as GRPOTrainer does; return what the engine sampled "
                'with, or None under "logprobs"',
            )
        if self._generated_ids is not None:
            output["kept_ids"], self._generated_ids = self._generated_ids, None
        return output

    def _are_placeholders(self, output: dict, sampled: Tensor) -> bool:
        """Whether most tokens over all processes have no log-prob. A 0 is a log-prob if the policy is certain too."""
        mask = output["completion_mask"] * output.get("tool_mask", 1) != 0

        def mostly(missing: Tensor) -> bool:
            counts = self.accelerator.reduce(torch.stack([(missing & mask).sum(), mask.sum()]), reduction="sum")
            return bool(counts[0] > PLACEHOLDERS * counts[1])

        without, zero = ~scorable(sampled), sampled == 0
        if not mostly(without | zero):
            return False
        return mostly(without) or mostly(without | (zero & (self._policy_logprobs(output) < -FAR_BELOW_ONE)))

    def _policy_logprobs(self, output: dict) -> Tensor:
        """log π [B, K] of a generated batch. It takes one more forward if TRL has not computed it."""
        if "old_per_token_logps" in output:
            return output["old_per_token_logps"]
        ids, attention = (
            torch.cat([output[f"prompt_{name}"], output[f"completion_{name}"]], dim=1) for name in ("ids", "mask")
        )
        named = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters.keys() & output.keys()
        mode = self._mode
        size = self.args.per_device_train_batch_size if mode == "train" else self.args.per_device_eval_batch_size
        with torch.no_grad():
            logprobs, _, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, output["completion_ids"].shape[1], batch_size=size,
                **{name: output[name] for name in named},
            )  # fmt: skip
        return logprobs


def padded_ids(
    kept_ids: Sequence[Sequence[Collection[int] | None] | None],
    completions: Sequence[Sequence[int]],
    sampled: Sequence[Sequence[int]] | None,
    multiple: int,
) -> Tensor:
    """The ids that were kept for each token of each completion -> [B, K, ids] int64, padded with -1.

    A token that was not `sampled` (0) gets none. K is the length of the longest completion, rounded up to a multiple.

    Raises ValueError if a completion does not have one list per token, or an id is not an integer.
    """
    rows, wanted = [], 'rollout_func must return as "kept_ids" one list of ids per completion token'
    if len(kept_ids) != len(completions):
        raise ValueError(f"{wanted}, got lists for {len(kept_ids)} of {len(completions)} completions")
    for i, (of_tokens, tokens) in enumerate(zip(kept_ids, completions, strict=True)):
        if of_tokens is None or len(of_tokens) != len(tokens):
            got = None if of_tokens is None else len(of_tokens)
            raise ValueError(
                f"{wanted}, got {got} for the {len(tokens)} tokens of completion {i}: write [] for a token that a tool "
                "has written"
            )
        was_sampled = [1] * len(tokens) if sampled is None else sampled[i]
        rows += [list(ids) if ids is not None and own else [] for ids, own in zip(of_tokens, was_sampled, strict=True)]
    counts = torch.tensor([len(ids) for ids in rows], dtype=torch.int64)
    lengths = torch.tensor([len(tokens) for tokens in completions], dtype=torch.int64)
    width, longest = max([1, *counts.tolist()]), max([1, *lengths.tolist()])
    flat = torch.tensor([int(token) for ids in rows for token in ids], dtype=torch.int64)
    if any(not isinstance(token, Integral) for ids in rows for token in ids if not isinstance(token, Tensor)):
        raise ValueError('rollout_func must return as "kept_ids" integers, the ids of tokens, got another number')
    padded = torch.full((len(rows), width), -1)
    padded[torch.arange(width) < counts[:, None]] = flat
    ids = torch.full((len(lengths), -(-longest // multiple) * multiple, width), -1)
    ids[torch.arange(ids.shape[1]) < lengths[:, None]] = padded
    return ids
