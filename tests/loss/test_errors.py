"""Each bad argument raises a ValueError or a TypeError that names it, and none gives a number."""

import math

import pytest
import torch

import drpo_kernels as dk
from problems import BACKENDS
from small_call import LOGITS, PACKED, ROWS, A, B, H, L, V, arguments, changed, expect

if torch.cuda.is_available():  # compiled Triton cannot run on these CPU tensors
    BACKENDS = ("reference", "torch")

# Each row is (name in the message, changed arguments), for linear_policy_loss on every backend.
COMMON = [
    ("reduction", {"reduction": "mean"}),
    ("reduction", {"reduction": 3}),
    ("compact", {"compact": "all"}),
    ("kl_importance", {"kl_importance": 1, "kl_coef": 0.1, "ref_logprobs": A["old_logprobs"]}),
    ("kl_estimator", {"kl_estimator": "k4", "kl_coef": 0.1, "ref_logprobs": A["old_logprobs"]}),
    ("targets", {"targets": A["targets"].float()}),
    ("targets", {"targets": A["targets"].bool()}),
    ("targets", {"targets": A["targets"][:, :2]}),
    ("targets", {"targets": A["targets"].T}),
    ("targets", {"targets": A["targets"].reshape(-1)}),
    ("targets", {"targets": A["targets"].tolist()}),
    ("targets", {"targets": changed(A["targets"], V)}),
    ("targets", {"targets": changed(A["targets"], -1)}),
    ("targets", {"targets": changed(A["targets"], -100)}),
    ("targets", {"targets": changed(A["targets"], 2**40)}),
    ("old_logprobs", {"old_logprobs": changed(A["old_logprobs"], 0.5)}),
    ("old_logprobs", {"old_logprobs": changed(A["old_logprobs"], math.inf)}),
    ("old_logprobs", {"old_logprobs": A["old_logprobs"][:, :2]}),
    ("old_logprobs", {"old_logprobs": A["old_logprobs"][:1]}),
    ("old_logprobs", {"old_logprobs": A["targets"]}),
    ("old_logprobs", {"old_logprobs": -1.0}),
    ("advantages", {"advantages": torch.randn(L)}),
    ("advantages", {"advantages": torch.randn(B, L + 1)}),
    ("advantages", {"advantages": torch.randn(B, L, 1)}),
    ("advantages", {"advantages": changed(A["advantages"], math.nan)}),
    ("advantages", {"advantages": changed(A["advantages"], -math.inf)}),
    ("advantages", {"advantages": None}),
    ("advantages", {"advantages": changed(A["advantages"], 1e30)}),
    ("advantages", {"advantages": changed(A["advantages"].half(), math.inf)}),
    ("mask", {"mask": A["mask"][:, :2]}),
    ("mask", {"mask": changed(A["mask"], 2)}),
    ("mask", {"mask": changed(A["mask"].float(), 0.5)}),
    ("mask", {"mask": changed(A["mask"].float(), math.nan)}),
    ("mask", {"mask": [[1, 1, 1], [1, 1, 0]]}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("temperature", {"temperature": "1"}),
    ("temperature", {"temperature": changed(torch.ones(B, L), 0.0)}),
    ("temperature", {"temperature": torch.ones(B, L + 1)}),
    ("temperature", {"temperature": changed(torch.ones(B, L), 1e-9)}),
    ("temperature", {"temperature": torch.tensor(1e9)}),
    ("temperature", {"temperature": torch.ones(L)}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": -3.0}),
    ("softcap", {"softcap": math.nan}),
    ("logit_scale", {"logit_scale": math.nan}),
    ("kl_coef", {"kl_coef": math.nan, "ref_logprobs": A["old_logprobs"]}),
    ("ref_logprobs", {"kl_coef": 0.1}),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": A["old_logprobs"][:, :2]}),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": A["targets"]}),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": changed(A["old_logprobs"], -math.inf)}),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": changed(A["old_logprobs"], math.nan)}),
    ("ref_logprobs", {"kl_coef": 0.1, "ref_logprobs": changed(A["old_logprobs"], -9999)}),
    ("ref_logprobs", {"ref_logprobs": A["old_logprobs"].to(torch.float8_e5m2)}),
    ("advantages", {"advantages": A["advantages"].to(torch.float8_e4m3fn)}),
    ("advantages", {"advantages": A["advantages"].to("meta")}),
    ("token_weights", {"token_weights": ROWS.to(torch.float8_e4m3fn)}),
    ("mask", {"mask": A["mask"].to(torch.float8_e4m3fn)}),
    ("mask", {"mask": changed(A["mask"].to(torch.int32), 2).to(torch.uint16)}),
    ("targets", {"targets": changed(A["targets"], 60000).to(torch.uint16)}),
    ("normalizer", {"normalizer": torch.tensor(0, dtype=torch.uint16)}),
    ("reduction.policy", {"reduction": dk.TokenCoefficients(ROWS.to(torch.float8_e4m3fn))}),
    ("entropy_coef", {"entropy_coef": math.inf}),
    ("z_loss_coef", {"z_loss_coef": math.nan}),
    ("token_weights", {"token_weights": torch.ones(B, L + 1)}),
    ("horizon", {"reduction": "seq-mean-token-sum-norm"}),
    ("horizon", {"reduction": "seq-mean-token-sum-norm", "horizon": 0}),
    ("horizon", {"reduction": "seq-mean-token-sum-norm", "horizon": -5}),
    ("vocab_size", {"vocab_size": V + 1}),
    ("vocab_size", {"vocab_size": 0}),
    ("targets", {"vocab_size": 3, "targets": changed(A["targets"], 3)}),
    ("normalizer", {"normalizer": torch.tensor([4.0, 5.0])}),
    ("normalizer", {"normalizer": 0}),
    ("normalizer", {"normalizer": -2.0}),
    ("normalizer", {"normalizer": math.nan}),
    ("normalizer", {"normalizer": torch.tensor(0.0)}),
    ("policy", {"reduction": dk.TokenCoefficients(torch.ones(B, L + 1))}),
    ("entropy", {"reduction": dk.TokenCoefficients(ROWS, entropy=changed(ROWS, math.nan)), "entropy_coef": 0.1}),
    ("kl", {"reduction": dk.TokenCoefficients(ROWS, kl=torch.ones(B)), "kl_coef": 0.1, "ref_logprobs": -ROWS}),
    ("normalizer", {"reduction": dk.TokenCoefficients(ROWS), "normalizer": 3.0}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 2, 6])}),
    ("objective", {"objective": "drpo"}),
    ("objective", {"objective": dk.DRPO}),
    ("objective", {"objective": None}),
    ("workspace_bytes", {"workspace_bytes": 0}),
    ("workspace_bytes", {"workspace_bytes": -4096}),
    ("logits_dtype", {"logits_dtype": torch.int32}),
    ("clip_range", {"clip_range": 0.2}),
    ("delta", {"delta": 0.2}),
]

# Each row is for linear_policy_loss alone.
LINEAR = [
    ("hidden", {"hidden": torch.ones(B, L, H, dtype=torch.int64)}),
    ("hidden", {"hidden": torch.ones(B, L, H, dtype=torch.complex64)}),
    ("hidden", {"hidden": torch.tensor(1.0)}),
    ("hidden", {"hidden": A["hidden"].tolist()}),
    ("hidden|weight", {"hidden": torch.ones(B, L, H + 1)}),
    ("hidden|weight", {"hidden": A["hidden"].bfloat16()}),
    ("hidden|weight", {"weight": A["weight"].bfloat16()}),
    ("weight", {"weight": torch.ones(V)}),
    ("weight", {"weight": torch.ones(1, V, H)}),
    ("weight", {"weight": A["weight"].T}),
    ("weight", {"weight": torch.ones(V, H, dtype=torch.int32)}),
    ("weight", {"weight": torch.ones(0, H)}),
    ("weight", {"weight": A["weight"].to("meta")}),
    ("bias", {"bias": torch.zeros(V + 1)}),
    ("bias", {"bias": torch.zeros(V, 1)}),
    ("bias", {"bias": torch.zeros(V, dtype=torch.int64)}),
    ("bias", {"bias": 0.5}),
]

# Each row is for packed inputs, of shape [T].
PACKED_ROWS = [
    ("cu_seqlens", {"reduction": "seq-mean-token-mean"}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum"}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum-norm", "horizon": 4}),
    ("cu_seqlens", {"objective": dk.GSPO()}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([1, 3, 6])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 3, 4])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 3, 7])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 4, 3, 6])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 4, 3, 6], dtype=torch.uint8)}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, -2, 6])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0, 3, 10**7])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([0.0, 3.0, 6.0])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([[0, 3, 6]])}),
    ("cu_seqlens", {"reduction": "seq-mean-token-sum", "cu_seqlens": torch.tensor([], dtype=torch.int32)}),
    ("cu_seqlens", {"objective": dk.GSPO(), "cu_seqlens": torch.tensor([0, 3, 4])}),
]

OBJECTIVES = [
    ("delta", lambda: dk.DRPO(delta=0.0)),
    ("delta", lambda: dk.DRPO(delta=-1.0)),
    ("delta", lambda: dk.DRPO(delta=math.nan)),
    ("delta", lambda: dk.DRPO(delta="1")),
    ("delta_low", lambda: dk.DPPO(delta_low=-0.1)),
    ("delta_high", lambda: dk.DPPO(delta_high=math.nan)),
    ("divergence", lambda: dk.DPPO(divergence="js")),
    ("ratio_cap", lambda: dk.DPPO(ratio_cap=0.0)),
    ("epsilon", lambda: dk.SPO(epsilon=0.0)),
    ("clip_low", lambda: dk.PPO(clip_low=-0.2)),
    ("clip_high", lambda: dk.PPO(clip_high=-0.2)),
    ("dual_clip", lambda: dk.PPO(dual_clip=0.5)),
    ("ratio_cap", lambda: dk.CISPO(ratio_cap=-1.0)),
    ("ratio_cap", lambda: dk.PolicyGradient(ratio_cap=0.0)),
    ("clip_low", lambda: dk.GSPO(clip_low=-1e-4)),
    ("clip_high", lambda: dk.GSPO(clip_high=math.nan)),
    ("token_level", lambda: dk.GSPO(token_level=1)),
]

LOGPROBS = [
    ("targets", {"targets": changed(A["targets"], V)}),
    ("targets", {"targets": changed(A["targets"], -1)}),
    ("targets", {"targets": A["targets"].float()}),
    ("targets", {"targets": A["targets"][:, :2]}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": torch.ones(B + 1, L)}),
    ("softcap", {"softcap": -1.0}),
    ("vocab_size", {"vocab_size": V + 1}),
    ("backend", {"backend": "cuda"}),
    ("return_logsumexp", {"return_logsumexp": 1}),
    ("reduction", {"reduction": "token-mean"}),
]


def label(rows):
    return [f"{i}-{row[0]}" for i, row in enumerate(rows)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, change", COMMON + LINEAR, ids=label(COMMON + LINEAR))
def test_linear_policy_loss(name, change, backend):
    expect(name, dk.linear_policy_loss, **{**arguments(), "backend": backend, **change})


WHOLE = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.bool, *WHOLE], ids=str)
def test_whole_numbers_of_any_dtype_are_taken(dtype, backend):
    """Such tensors come from memory-mapped data sets, from rewards of 0 and 1, and as weights and masks."""
    flags = (A["advantages"] > 0).to(dtype)
    given = {**arguments(), "backend": backend}
    names = ("advantages", "mask", "token_weights")
    want = dk.linear_policy_loss(**{**given, **dict.fromkeys(names, flags.float())}).loss
    got = dk.linear_policy_loss(**{**given, **dict.fromkeys(names, flags)}).loss
    assert got == want
    if dtype != torch.bool:
        given["targets"] = given["targets"].to(dtype)
        given["normalizer"], given["reduction"] = torch.tensor(1).to(dtype), "token-sum"
        got = dk.linear_policy_loss(**{**given, **dict.fromkeys(names, flags)})
        exact = dk.TokenCoefficients(torch.ones(B, L).to(dtype))
        given |= {"reduction": exact, "normalizer": None, "targets": A["targets"]}
        assert got.loss == dk.linear_policy_loss(**{**given, **dict.fromkeys(names, flags)}).loss


@pytest.mark.parametrize("name, change", COMMON, ids=label(COMMON))
def test_policy_loss(name, change):
    given = {**arguments(), **change}
    given = {key: value for key, value in given.items() if key not in ("hidden", "weight")}
    expect(name, dk.policy_loss, LOGITS, **given)


@pytest.mark.parametrize("name, change", PACKED_ROWS, ids=label(PACKED_ROWS))
def test_packed(name, change):
    expect(name, dk.linear_policy_loss, weight=A["weight"], **{**PACKED, **change})
    given = {key: value for key, value in {**PACKED, **change}.items() if key != "hidden"}
    expect(name, dk.policy_loss, LOGITS.reshape(B * L, V), **given)


@pytest.mark.parametrize("name, make", OBJECTIVES, ids=label(OBJECTIVES))
def test_objectives(name, make):
    expect(name, lambda: dk.linear_policy_loss(**arguments(), objective=make()))


@pytest.mark.parametrize("name, change", LOGPROBS, ids=label(LOGPROBS))
def test_logprobs(name, change):
    targets = change.get("targets", A["targets"])
    options = {key: value for key, value in change.items() if key != "targets"}
    expect(name, dk.linear_token_logprobs, A["hidden"], A["weight"], targets, **options)
    expect(name, dk.token_logprobs, LOGITS, targets, **options)


@pytest.mark.parametrize("delta", [0.0, -1.0, math.inf * 0])
def test_drpo_shortcuts(delta):
    given = arguments()
    expect("delta", dk.linear_drpo_loss, **given, delta=delta)
    given = {key: value for key, value in given.items() if key not in ("hidden", "weight")}
    expect("delta", dk.drpo_loss, LOGITS, **given, delta=delta)


@pytest.mark.parametrize(
    "logits", [torch.ones(B, L, V, dtype=torch.int64), torch.tensor(1.0), torch.ones(B, L, 0), None]
)
def test_logits(logits):
    given = {key: value for key, value in arguments().items() if key not in ("hidden", "weight")}
    expect("logits", dk.policy_loss, logits, **given)


@pytest.mark.parametrize("function", [dk.linear_policy_loss, dk.policy_loss])
@pytest.mark.parametrize("backend", ["cuda", "Torch", "", 1])
def test_unknown_backend(backend, function):
    given = arguments()
    if function is dk.policy_loss:
        given = {"logits": LOGITS, **{k: v for k, v in given.items() if k not in ("hidden", "weight")}}
    expect("backend", function, **given, backend=backend)


def test_good_arguments_pass():
    """The arguments that the tables change are right themselves, and so are values at the edge of what is allowed."""
    for change in (
        {},
        {"old_logprobs": changed(A["old_logprobs"], 1e-6)},
        {"targets": changed(A["targets"], -100, (1, 2)), "advantages": changed(A["advantages"], math.nan, (1, 2))},
        {"old_logprobs": changed(A["old_logprobs"], 0.5, (1, 2))},
        {"vocab_size": V},
        {"normalizer": torch.tensor(3)},
    ):
        assert math.isfinite(dk.linear_policy_loss(**{**arguments(), **change}).loss.item())


def test_double_precision_is_refused_by_triton():
    given = {**arguments(), "hidden": A["hidden"].double(), "weight": A["weight"].double()}
    with pytest.raises((ValueError, TypeError, RuntimeError), match="float64"):
        dk.linear_policy_loss(**given, backend="triton")
