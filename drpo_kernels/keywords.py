"""Error messages for keywords that a function or an objective does not take."""

import difflib
import functools
from collections.abc import Callable
from typing import TypeVar, cast

Function = TypeVar("Function", bound=Callable)

# What to write here in place of a name that other libraries (TRL, verl, Liger, transformers) use.
_ELSEWHERE = {
    written: ours
    for ours, names in {
        "kl_coef=...": "beta kl_beta",
        "objective=PPO(clip_low=..., clip_high=...)": "clip clip_coef clip_eps clip_high clip_low clip_range "
        "clip_ratio clip_ratio_high clip_ratio_low cliprange eps epsilon epsilon_high epsilon_low",
        "objective=DRPO(delta=...)": "delta",
        "objective=GSPO()": "importance_sampling_level",
        "objective=... and reduction=...": "loss_type",
        "reduction=...": "loss_agg_mode",
        "normalizer=...": "num_items_in_batch",
        "token_weights=...": "importance_weights rollout_is_weights",
        "weight=lm_head.weight": "lm_head lm_head_weight",
        "softcap=...": "final_logit_softcapping logit_softcap logit_softcapping",
        "hidden=...": "hidden_states last_hidden_state",
        "targets=...": "completion_ids input_ids labels responses selected_token_ids",
        "mask=...": "attention_mask completion_mask loss_mask response_mask",
        "mask=targets != ignore_index": "ignore_index",
        "old_logprobs=...": "old_logps old_per_token_logps rollout_log_probs sampling_logprobs",
        "ref_logprobs=...": "ref_logps ref_per_token_logps",
    }.items()
    for written in names.split()
}


def with_known_keywords(
    function: Function, called: str, known: tuple[str, ...], hint: Callable[[str], str | None] = lambda name: None
) -> Function:
    """Make `function`, which users call by the name `called`, raise a TypeError for a keyword that is not `known`.

    The message says what to write instead: the `hint` for that keyword, our name for what another library calls so, or
    the most similar known name.
    """

    @functools.wraps(function)
    def checked(*args, **given):
        for name in given:
            if name not in known:
                said = hint(name) or _said_of(name, known)
                raise TypeError(f"{called}() got an unexpected keyword argument {name!r}: {said}")
        return function(*args, **given)

    return cast(Function, checked)


def _said_of(name: str, known: tuple[str, ...]) -> str:
    if _ELSEWHERE.get(name, "").partition("=")[0] in known:
        return f"write {_ELSEWHERE[name]}"
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if alike:
        return f"did you mean {alike[0]!r}?"
    return f"it takes {', '.join(known)}" if len(known) < 8 else "its help() lists those that it takes"
