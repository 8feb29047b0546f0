"""The methods by the names that `benchmarks.harness` measure them under, and their floors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.roofline import ours, peers
from benchmarks.roofline.work import Cost, Problem


@dataclass(frozen=True)
class Method:
    """The label in tables, the work on a problem, and the floor whose work it cannot avoid (None for a floor)."""

    label: str
    cost: Callable[[Problem], Cost]
    held_to: str | None = "gemms_whole"


METHODS = {
    "gemms_whole": Method("three bare products (6F)", ours.whole_products, held_to=None),
    "gemms_frozen": Method("two bare products (4F)", lambda p: ours.whole_products(ours.frozen(p)), held_to=None),
    "gemms_recompute": Method("four bare products (8F)", lambda p: ours.whole_products(p, 2), held_to=None),
    "copy": Method("a copy of the logits", ours.copy, held_to=None),
    "linear_policy_loss": Method("`linear_policy_loss`", ours.linear),
    "linear_policy_loss_bf16_logits": Method(
        "`linear_policy_loss`, bf16 logits", lambda p: ours.linear(replace(p, logits_itemsize=p.itemsize))
    ),
    "linear_policy_loss_frozen_head": Method(
        "`linear_policy_loss`, frozen head", lambda p: ours.linear(ours.frozen(p)), held_to="gemms_frozen"
    ),
    "linear_token_logprobs": Method("`linear_token_logprobs`", ours.recompute, held_to="gemms_recompute"),
    "policy_loss": Method("`policy_loss` from logits", ours.ready, held_to="copy"),
    "policy_loss_inplace": Method("`policy_loss`, in place", lambda p: ours.ready(p, in_place=True), held_to="copy"),
    "eager": Method("eager PyTorch", peers.eager),
    "eager_compiled": Method("`torch.compile`, all fused", peers.eager_compiled),
    "trl": Method("TRL's fused head", peers.trl),
    "liger_grpo": Method("Liger's chunked GRPO loss", peers.liger_grpo),
    "cce_exact": Method("cut-cross-entropy, no filter", peers.cce_exact),
}
