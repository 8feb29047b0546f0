"""The checks of types, shapes, dtypes, devices and plain numbers, which always run.

Every message names the argument: "<argument> must ..., got ...". Checks that read the data of a tensor are in
value_checks.py.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from drpo_kernels.aggregation import REDUCTIONS, TokenCoefficients
from drpo_kernels.backends.quantize import FORMATS
from drpo_kernels.collectives import VocabShard, group_rank, group_size
from drpo_kernels.kl import KL_ESTIMATORS
from drpo_kernels.objective import Objective
from drpo_kernels.options import LogprobOptions, PolicyOptions

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A temperature, logit scale or soft-cap in this range neither overflows nor vanishes in a float32 softmax.
SMALLEST_SCALE, LARGEST_SCALE = 1e-6, 1e6
EMPTY_BATCH = ": a batch without a single valid token counts as 1, as in drpo_kernels.distributed.global_normalizer"


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def check_tensor(name: str, value: object, *, floating: bool | None = None) -> None:
    if not isinstance(value, Tensor):
        of_head = isinstance(value, torch.nn.Module) and name in ("weight", "bias")
        hint = f": pass lm_head.{name} of a module lm_head" if of_head else ""
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}{hint}")
    if hasattr(value, "device_mesh"):  # a DTensor; importing its class would take a second
        raise TypeError(
            f"{name} must be a plain tensor, got {type(value).__name__}: call inside the wrapped module's forward, "
            "where its parameters are gathered (drpo_kernels.integrations.transformers.add_fused_head does), or hand "
            "over this rank's rows of the head with vocab_shard"
        )
    if floating is True and value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    if floating is False and (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")


def check_number(name: str, value: float, *, positive: bool = True, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (0 if positive else -math.inf) < value < math.inf:  # math.isfinite cannot be traced in a graph
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {value}{hint}")


def _check_scale(name: str, value: float) -> None:
    check_number(name, value)
    if not SMALLEST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(f"{name} must be in [{SMALLEST_SCALE:g}, {LARGEST_SCALE:g}], got {value}")


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def _check_real(name: str, value: Tensor) -> None:
    """Check a tensor of numbers that enters the loss as a constant."""
    check_tensor(name, value)
    _check_constant(name, value)
    if value.dtype.is_complex or (value.dtype.is_floating_point and value.dtype not in FLOATS):
        raise TypeError(f"{name} must be float64, float32, bfloat16, float16, integer or bool, got {value.dtype}")


def comparable(values: Tensor) -> Tensor:
    """The values in a dtype that PyTorch can compare: it lacks operations on bool and on unsigned integers."""
    return values if values.dtype in FLOATS or values.dtype == torch.int64 else values.to(torch.int64)


def _check_like_targets(name: str, value: Tensor, targets: Tensor) -> None:
    _check_real(name, value)
    if value.shape != targets.shape:
        raise ValueError(f"{name} must be shaped like targets {_shape(targets)}, got {_shape(value)}")
    _check_device(name, value, targets.device)


def _check_constant(name: str, value: Tensor) -> None:
    """Refuse a tensor that requires grad, because its gradient would silently be missing."""
    if value.requires_grad and torch.is_grad_enabled():
        learnt = "; to learn it, divide hidden or logits by it before the call" if name == "temperature" else ""
        raise ValueError(
            f"{name} must not require grad, because it gets no gradient here, got a tensor that does: pass "
            f"{name}.detach(){learnt}"
        )


def _check_not_meta(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(
            f"{name} must have values, got a meta tensor: give the model a device first (`to_empty`, or loaded "
            "weights); FakeTensorMode estimates memory without values"
        )


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_not_reference(backend: str | None, option: str) -> None:
    if backend == "reference":
        raise ValueError(f"backend must be None, 'triton' or 'torch' with {option}, got 'reference'")


def _check_choice(name: str, value: object, choices) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None) -> None:
    check_tensor("hidden", hidden, floating=True)
    check_tensor("weight", weight, floating=True)
    _check_not_meta("hidden", hidden)
    if hidden.dim() < 2:
        raise ValueError(f"hidden must be [..., H] with at least one leading dimension, got shape {_shape(hidden)}")
    if weight.dim() != 2 or not all(weight.shape):
        raise ValueError(f"weight must be [V, H] with V and H at least 1, got shape {_shape(weight)}")
    if hidden.shape[-1] != weight.shape[1]:
        hint = ": pass weight.T where it is [H, V]; where hidden are logits, call policy_loss or token_logprobs"
        raise ValueError(
            f"weight must be [V, H] with H = {hidden.shape[-1]} like hidden, got shape {_shape(weight)}"
            f"{hint if hidden.shape[-1] == weight.shape[0] else ''}"
        )
    _check_device("weight", weight, hidden.device)
    if autocast is None and hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden ({hidden.dtype}) outside autocast, got {weight.dtype}: "
            "cast one of them, or run under torch.autocast"
        )
    if bias is not None:
        check_tensor("bias", bias, floating=True)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got shape {_shape(bias)}")
        _check_device("bias", bias, hidden.device)


def check_main_grad(
    main_grad: Tensor | None, loss_scale: float, weight: Tensor, compute_dtype: torch.dtype, wanted: bool
) -> None:
    """Check the buffer against `weight`, which has been checked; `wanted` says whether weight gets a gradient."""
    check_number("loss_scale", loss_scale)
    if main_grad is None:
        return
    check_tensor("main_grad", main_grad)
    if compute_dtype == torch.float64:
        raise ValueError("main_grad must be None for float64 inputs, got a tensor")
    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad must be float32, got {main_grad.dtype}")
    if main_grad.shape != weight.shape:
        raise ValueError(f"main_grad must be shaped like weight {_shape(weight)}, got {_shape(main_grad)}")
    _check_device("main_grad", main_grad, weight.device)
    if not main_grad.is_contiguous() or main_grad.requires_grad:
        raise ValueError(
            "main_grad must be contiguous and not require grad itself, got "
            f"strides {main_grad.stride()}, requires_grad={main_grad.requires_grad}"
        )
    if not wanted:
        raise ValueError(
            "main_grad must be None where weight gets no gradient (torch.no_grad(), or a weight that does not require "
            "grad), got a tensor"
        )


def check_logits(logits: Tensor) -> None:
    check_tensor("logits", logits, floating=True)
    _check_not_meta("logits", logits)
    if logits.dim() < 2 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must be [..., V] with a leading dimension and V at least 1, got shape {_shape(logits)}"
        )


def check_logprob_options(
    options: LogprobOptions, targets: Tensor, lead: torch.Size, source: Tensor, vocab: int
) -> None:
    """Check integer targets and every field of `LogprobOptions`. `source` is hidden or logits; `vocab` is the V of the
    whole head.
    """
    if targets.shape != lead:
        raise ValueError(
            f"targets must have the leading shape {tuple(lead)} of hidden or logits, got {_shape(targets)}"
        )
    _check_device("targets", targets, source.device)
    cu_seqlens = getattr(options, "cu_seqlens", None)
    if cu_seqlens is not None:
        check_packing(cu_seqlens, "targets", targets)
    if isinstance(options.temperature, Tensor):
        check_tensor("temperature", options.temperature, floating=True)
        _check_constant("temperature", options.temperature)
        if options.temperature.dim():
            _check_spread("temperature", options.temperature, targets, cu_seqlens)
        _check_device("temperature", options.temperature, targets.device)
    else:
        _check_scale("temperature", options.temperature)
    _check_scale("logit_scale", options.logit_scale)
    if options.softcap is not None:
        _check_scale("softcap", options.softcap)
    if options.vocab_size is not None:
        _check_integer("vocab_size", options.vocab_size)
        if not 1 <= options.vocab_size <= vocab:
            raise ValueError(f"vocab_size must be in [1, {vocab}], got {options.vocab_size}")
    if options.workspace_bytes is not None:
        _check_integer("workspace_bytes", options.workspace_bytes)
        check_number("workspace_bytes", options.workspace_bytes)
    if options.logits_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"logits_dtype must be None, torch.float32 or torch.bfloat16, got {options.logits_dtype}")
    if options.head_dtype is not None:
        _check_choice("head_dtype", options.head_dtype, FORMATS)
    _check_bool("batch_invariant", options.batch_invariant)
    if source.dtype == torch.float64:
        for name, off in (("logits_dtype", None), ("head_dtype", None), ("batch_invariant", False)):
            if getattr(options, name) != off:
                raise ValueError(f"{name} must be {off} for float64 inputs, got {getattr(options, name)!r}")
    _check_batch_invariant(options)
    for name in ("head_dtype", "main_grad"):
        if getattr(options, name) is not None:
            _check_not_reference(options.backend, name)
    _check_kept_ids(options, targets)
    if options.validate not in (None, True, False):
        raise TypeError(f"validate must be None, True or False, got {options.validate!r}")


def _check_kept_ids(options: LogprobOptions, targets: Tensor) -> None:
    ids = options.kept_ids
    if ids is None:
        return
    check_tensor("kept_ids", ids, floating=False)
    if ids.shape[:-1] != targets.shape or not ids.shape[-1]:
        raise ValueError(
            f"kept_ids must be shaped like targets {_shape(targets)} with one more dimension, the ids that were kept "
            f"for each token padded with -1, got {_shape(ids)}"
        )
    _check_device("kept_ids", ids, targets.device)
    if options.main_grad is not None:
        raise ValueError("main_grad must be None with kept_ids, got a tensor: let weight.grad take the gradient")
    exact = {"logits_dtype": (None, torch.float32), "head_dtype": (None,), "batch_invariant": (False,)}
    for name, allowed in (exact | {"sparse_grad": (0,)}).items():
        value = getattr(options, name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name} must be {allowed[0]!r} with kept_ids, got {value!r}")


def _check_batch_invariant(options: LogprobOptions) -> None:
    if not options.batch_invariant:
        return
    if options.backend not in (None, "triton"):
        raise ValueError(f"backend must be None or 'triton' with batch_invariant, got {options.backend!r}")
    if options.head_dtype is not None:
        raise ValueError(f"head_dtype must be None with batch_invariant, got {options.head_dtype!r}")
    if options.vocab_shard is not None and len(options.vocab_shard.sizes) > 1:
        raise ValueError(
            "vocab_shard must be None with batch_invariant, got a head split over ranks, whose sums have no fixed order"
        )


def check_vocab_shard(shard: VocabShard, weight: Tensor, backend: str | None) -> None:
    """Check the split of the head against `weight`, which holds this rank's rows of it."""
    if not isinstance(shard, VocabShard):
        raise TypeError(f"vocab_shard must be a drpo_kernels.distributed.VocabShard, got {type(shard).__name__}")
    _check_not_reference(backend, "vocab_shard")
    rank = group_rank(shard.group)
    if rank < 0:
        raise ValueError("vocab_shard.group must contain this process, got one of which it is not a member")
    size = group_size(shard.group)
    if len(shard.sizes) != size:
        raise ValueError(f"vocab_shard.sizes must name the {size} ranks of its group, got {shard.sizes}")
    if shard.sizes[rank] != weight.shape[0]:
        raise ValueError(
            f"weight must be the {shard.sizes[rank]} rows that vocab_shard.sizes {shard.sizes} gives rank {rank}, "
            f"got shape {_shape(weight)}"
        )


def check_mask(mask: Tensor | None, targets: Tensor) -> None:
    if mask is not None:
        _check_like_targets("mask", mask, targets)


def check_policy_options(
    options: PolicyOptions, targets: Tensor, old_logprobs: Tensor | None, advantages: Tensor
) -> None:
    """Check the per-token inputs and every field of `PolicyOptions`, without reading the data of a tensor."""
    if not isinstance(options.objective, Objective):
        raise TypeError(f"objective must be an Objective such as DRPO(delta=0.2), got {options.objective!r}")
    for name, value in (("old_logprobs", old_logprobs), ("ref_logprobs", options.ref_logprobs)):
        if value is not None:
            check_tensor(name, value, floating=True)
            _check_like_targets(name, value, targets)
    if options.token_weights is not None:
        _check_like_targets("token_weights", options.token_weights, targets)
    by_sequence = isinstance(options.reduction, str) and options.reduction.startswith("seq-")
    if options.cu_seqlens is None and targets.dim() < 2 and (by_sequence or options.objective.sequence_level):
        name = "reduction" if by_sequence else "objective"
        needs = f"{name} {getattr(options, name)!r}"
        raise ValueError(f"cu_seqlens must be given with {needs} and targets of shape {_shape(targets)}")
    _check_spread("advantages", advantages, targets, options.cu_seqlens)
    _check_reduction(options, targets)
    check_number("kl_coef", options.kl_coef, positive=False)
    check_number("entropy_coef", options.entropy_coef, positive=False)
    check_number("z_loss_coef", options.z_loss_coef, positive=False)
    _check_choice("kl_estimator", options.kl_estimator, KL_ESTIMATORS)
    _check_bool("kl_importance", options.kl_importance)
    if options.kl_cap is not None:
        _check_scale("kl_cap", options.kl_cap)
    _check_choice("compact", options.compact, ("active", "mask", "none"))
    if options.kl_coef and options.ref_logprobs is None:
        raise ValueError(f"ref_logprobs must be given with kl_coef = {options.kl_coef}, got None")
    _check_sparse_grad(options)


def _check_sparse_grad(options: PolicyOptions) -> None:
    check_number("sparse_grad", options.sparse_grad, positive=False)
    if not 0 <= options.sparse_grad < 1:
        raise ValueError(f"sparse_grad must be in [0, 1), got {options.sparse_grad}")
    if not options.sparse_grad:
        return
    shard = options.vocab_shard
    for name, clash in (
        # The probability that is left out does not bound the gradients of these three. A soft-cap may be flat at the
        # target alone.
        ("entropy_coef", options.entropy_coef != 0),
        ("z_loss_coef", options.z_loss_coef != 0),
        ("softcap", options.softcap is not None),
        ("vocab_shard", shard is not None and len(shard.sizes) > 1),
        ("batch_invariant", options.batch_invariant),
        ("backend", options.backend == "reference"),
        ("objective", options.objective.sequence_level),
        ("reduction", options.reduction == "none"),
    ):
        if clash:
            value = getattr(options, name)
            raise ValueError(f"sparse_grad must be 0 with {name} = {value!r}, got {options.sparse_grad}")


def _check_spread(name: str, value: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check a tensor of one value per token or one per sequence."""
    _check_real(name, value)
    _check_device(name, value, targets.device)
    shapes = [_shape(targets)]
    if targets.dim() > 1:
        shapes += [_shape(targets)[:-1], (*_shape(targets)[:-1], 1)]
    if cu_seqlens is not None:
        shapes.append((cu_seqlens.numel() - 1,))
    if _shape(value) not in shapes:
        raise ValueError(f"{name} must have one of the shapes {', '.join(map(str, shapes))}, got {_shape(value)}")


def check_packing(cu_seqlens: Tensor, name: str, tokens: Tensor) -> None:
    """Check the offsets of a packed batch. `tokens` is shaped like targets, and `name` is what messages call it."""
    check_tensor("cu_seqlens", cu_seqlens, floating=False)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [S + 1] offsets of at least one sequence, got shape {_shape(cu_seqlens)}")
    if tokens.shape[:-1].numel() != 1:
        raise ValueError(f"cu_seqlens must come with packed {name} [T] or [1, T], got {name} {_shape(tokens)}")
    _check_device("cu_seqlens", cu_seqlens, tokens.device)


def check_named_reduction(reduction: object) -> None:
    _check_choice("reduction", reduction, REDUCTIONS)


def check_horizon(horizon: float | None, reduction: object) -> None:
    if reduction == "seq-mean-token-sum-norm" and horizon is None:
        raise ValueError("horizon must be given with reduction 'seq-mean-token-sum-norm', got None")
    if horizon is not None:
        check_number("horizon", horizon)


def _check_reduction(options: PolicyOptions, targets: Tensor) -> None:
    if isinstance(options.reduction, TokenCoefficients):
        for field, value in options.reduction._asdict().items():
            if value is not None:
                _check_like_targets(f"reduction.{field}", value, targets)
        if options.normalizer is not None:
            raise ValueError("normalizer must be None with TokenCoefficients: divide the coefficients instead")
    elif options.reduction != "none":
        check_named_reduction(options.reduction)
    elif options.normalizer is not None:
        raise ValueError("normalizer must be None with reduction 'none', got one")
    check_horizon(options.horizon, options.reduction)
    if isinstance(options.normalizer, Tensor):
        _check_real("normalizer", options.normalizer)
        if options.normalizer.dim() > 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {_shape(options.normalizer)}")
    elif options.normalizer is not None:
        check_number("normalizer", options.normalizer, hint=EMPTY_BATCH)
