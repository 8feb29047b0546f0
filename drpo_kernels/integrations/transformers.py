"""A fused head inside a causal language model: its forward returns the loss, and never makes the logits.

The loss is computed inside the model's own wrapped forward, and there inside the call of the head module: DDP, FSDP and
ZeRO-3 have gathered the weight by then, and their hooks expect the gradients there. The model's forward runs unchanged
with a small probe in place of the head. So all that it does before the head (padding, packing, images, routers) still
happens, and what it does to the logits is measured with the probe, not guessed from its configuration.
"""

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from drpo_kernels.collectives import VocabShard
from drpo_kernels.integrations.probing import Probe, standing_in, transform_of

if TYPE_CHECKING:  # the import takes a second
    from torch.distributed.tensor import DTensor

_STATE, _WATCHES = "_drpo_fused_head", "_drpo_fused_head_watches"  # attributes that are set on the model
_TENSOR_PARALLEL = "tp"  # the mesh dimension of a head split over its vocabulary, which tells it from FSDP's shards


class WithAuxiliaryLoss(NamedTuple):
    """What a model with a router returns: the fused head's result and the load-balancing loss, 0-d."""

    result: Any
    aux_loss: Tensor


class _State:
    """What `add_fused_head` remembers of a model."""

    def __init__(self, float32: bool, forward: Callable, previous: Callable | None, older: "_State | None"):
        self.float32 = float32
        self.forward = forward  # the function that is the instance's forward now
        self.previous = previous  # the forward that had been set on the instance before, if any
        self.older = older  # the state of an earlier add_fused_head whose forward has been replaced

    def __deepcopy__(self, memo: dict) -> "_State":
        copied = _State.__new__(_State)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)  # a bound method follows its model
        return copied

    def __reduce__(self):
        return type(None), ()  # pickle drops the instance's forward, so a restored model has no fused head


def add_fused_head(model: nn.Module, *, float32: bool = False) -> nn.Module:
    """Let a causal language model of `transformers` compute a loss from its hidden states. -> the same model.

    Afterwards `model(..., fused_head=function)` runs the backbone and returns
    `function(hidden [B, L, H], weight [V, H], bias=..., logit_scale=..., softcap=...)` with the logit scale and the
    soft-cap that this model applies. A model that cuts its logits adds vocab_size=... Without `fused_head` the forward
    and `generate` are the model's own. Adding a fused head twice changes nothing. A deep copy keeps it. After something
    else has replaced the model's forward, and after pickling (`torch.save`), `fused_head=` is an error until the head
    is added again. A `functools.partial` of `linear_policy_loss` or `linear_token_logprobs` is such a function:

        out = model(input_ids=ids[:, :-1], attention_mask=attention_mask[:, :-1], fused_head=partial(
            linear_policy_loss, targets=ids[:, 1:], old_logprobs=old_logprobs, advantages=advantages, mask=mask[:, 1:]))
        out.loss.backward()

    Nothing is shifted: hidden[:, i] predicts token i + 1. `logits_to_keep` selects the last positions, as in the
    model's forward. A model that returns a router's load-balancing loss gives `WithAuxiliaryLoss(result, aux_loss)`.

    Call it before wrapping the model with PEFT, DDP, FSDP or DeepSpeed, and pass everything to the call of the wrapped
    model. FSDP rounds tensors among the arguments to its compute dtype, but leaves tensors inside a `partial` as they
    are. The function must return tensors, or (named) tuples, lists and dicts of them, because the wrappers' hooks find
    no others. If tensor parallelism splits the head over its vocabulary, on a mesh dimension named "tp", the function
    gets this rank's rows together with vocab_shard=...

    If the whole model is under `torch.compile`, a fused call runs uncompiled; compile the decoder (`model.model`)
    instead.

    float32       True: the head's product runs in float32, outside autocast

    Raises TypeError, here or at a fused call, if the head is not a plain `nn.Linear` (LoRA on the head, a quantised
    head, a forward of its own); PEFT's `modules_to_save` around one is allowed. Raises ValueError at a fused call if
    the model does more to the logits than a scale and a soft-cap.
    """
    model = _causal_lm(given := model)
    head = _head_of(model)
    state = model.__dict__.get(_STATE)
    if state is not None and _calls(model.forward, state.forward):
        if state.float32 != float32:
            raise ValueError(
                f"{type(model).__name__} has a fused head with float32={state.float32} already: "
                "remove_fused_head(model) takes it off"
            )
        return given
    _require_plain(head, float32)
    forward = _forward_of(type(model).forward)
    setattr(model, _STATE, _State(float32, forward, model.__dict__.get("forward"), state))
    model.forward = types.MethodType(forward, model)
    if _WATCHES not in model.__dict__:
        watched = {model, getattr(model, "base_model", model)}
        setattr(model, _WATCHES, [m.register_forward_pre_hook(_refuse_lost, with_kwargs=True) for m in watched])
    return given


def remove_fused_head(model: nn.Module) -> nn.Module:
    """Undo `add_fused_head`. -> the same model. Raises ValueError for a model without one, or wrapped since."""
    model = _causal_lm(given := model)
    state = model.__dict__.get(_STATE)
    if state is None:
        raise ValueError(f"{type(model).__name__} has no fused head")
    if getattr(model.__dict__.get("forward"), "__func__", None) is not state.forward:
        raise ValueError(f"the forward of {type(model).__name__} was replaced after add_fused_head: undo that first")
    if state.previous is None:
        del model.forward
    else:
        model.forward = state.previous
    if state.older is not None:
        setattr(model, _STATE, state.older)
        return given
    for watch in model.__dict__[_WATCHES]:
        watch.remove()
    delattr(model, _STATE)
    delattr(model, _WATCHES)
    return given


def _forward_of(original: Callable) -> Callable:
    """The model's forward with a `fused_head` argument."""

    @functools.wraps(original)  # `generate` checks its arguments against this signature
    def forward(self, *args, fused_head: Callable | None = None, **kwargs):
        _refuse_lost(self, args, kwargs)  # PEFT calls this forward without the hooks
        state = self.__dict__[_STATE]
        while state.forward is not forward:
            state = state.older
        plain = state.previous or functools.partial(original, self)
        if fused_head is None:
            return plain(*args, **kwargs)
        if torch.compiler.is_compiling():
            # The import stands here because torch.compiler.disable loads all of torch._dynamo.
            from drpo_kernels.uncompiled import outside_graph

            return outside_graph(_fused_call, self, plain, fused_head, args, kwargs)
        return _fused_call(self, plain, fused_head, args, kwargs)

    return forward


def _refuse_lost(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of the model and of its backbone. It raises if an argument holds a function that the model's own
    forward would silently take into its **kwargs. It can be pickled, so a model that loses its fused head keeps it.
    """
    state, backbone = module.__dict__.get(_STATE), _WATCHES not in module.__dict__
    fused = state is not None and _calls(module.forward, state.forward)
    for name, value in kwargs.items():
        if name == "fused_head" and value is not None and not fused:
            raise RuntimeError(
                f"fused_head must reach the forward of add_fused_head, got to {type(module).__name__} without it: "
                "something replaced model.forward since (such as Liger's fused cross-entropy), or the model was "
                "pickled; call add_fused_head(model) again, after it"
            )
        swallowed = callable(value) and name not in inspect.signature(type(module).forward).parameters
        if name != "fused_head" and (swallowed or (name == "fused_lm_head" and backbone)):
            raise TypeError(
                f"the function of a fused head must be given as fused_head=, got {name}=, which "
                f"{type(module).__name__} would ignore: write model(..., fused_head=function)"
            )


def _calls(forward: Callable | None, function: Callable) -> bool:
    """Whether this forward is the function or wraps it, as Accelerate's autocast does."""
    while forward is not None:
        if getattr(forward, "__func__", forward) is function:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _fused_call(model: nn.Module, plain: Callable, fused_head: Callable, args: tuple, kwargs: dict):
    if not callable(fused_head):
        raise TypeError(
            f"fused_head must be a function of (hidden, weight, bias=..., ...), got {_kind(fused_head)}: write "
            "functools.partial(linear_policy_loss, targets=..., ...)"
        )
    if kwargs.get("labels") is not None:
        raise ValueError("labels must be None with fused_head: give the targets to the function, aligned with hidden")
    if _takes_use_cache(model):
        kwargs["use_cache"] = False
    float32, head = model.__dict__[_STATE].float32, _head_of(model)
    _require_plain(head, float32)
    probe = Probe(head, _linear(head).out_features)
    with standing_in(model, head, probe):
        outputs = _run(model, plain, probe, args, kwargs)
    transform = transform_of(model, outputs.logits, probe.width)
    function = functools.partial(fused_head, **transform.keywords())
    assert probe.hidden is not None  # `_run` has seen its one call
    result = _call_head(head, probe.hidden, function, float32)
    aux_loss = getattr(outputs, "aux_loss", None)
    return result if aux_loss is None else WithAuxiliaryLoss(result, aux_loss)


def _takes_use_cache(model: nn.Module) -> bool:
    """Whether the forward takes use_cache: by name, or through **kwargs if the configuration has a use_cache."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    if any(parameter.name == "use_cache" for parameter in parameters):
        return True
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return hasattr(text_config, "use_cache") and any(p.kind is p.VAR_KEYWORD for p in parameters)


def _run(model: nn.Module, plain: Callable, probe: Probe, args: tuple, kwargs: dict):
    """The model's outputs, in which the probe's values have taken the place of the logits."""
    refused = f"{type(model).__name__} cannot have a fused head: "
    try:
        outputs = plain(*args, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not probe.calls:
            raise
        raise ValueError(f"{refused}what its forward does after the head failed on a probe ({error})") from error
    if not isinstance(getattr(outputs, "logits", None), Tensor):
        raise ValueError(f"{refused}its forward returned no logits, {_kind(outputs)} (return_dict must not be False)")
    if probe.calls != 1:
        raise ValueError(f"{refused}its forward called its output embeddings {probe.calls} times, it must do so once")
    return outputs


def _call_head(head: nn.Module, hidden: Tensor, function: Callable, float32: bool):
    """Call `function(hidden, weight, bias=...)` as the head's forward, inside the hooks that gather its weight."""
    layers, linear = _layers(head), _linear(head)

    def forward(hidden: Tensor):
        weight, bias, shard = _whole_or_shard(linear.weight, linear.bias)
        if not float32:
            return function(hidden, weight, bias=bias, **shard)
        with torch.autocast(hidden.device.type, enabled=False):
            # FSDP may have gathered the weight in its compute dtype.
            return function(hidden.float(), weight.float(), bias=None if bias is None else bias.float(), **shard)

    if _mesh_of(linear.weight) == (_TENSOR_PARALLEL,):
        return forward(hidden)  # the hooks of tensor parallelism would take the result for logits
    # If PEFT wraps the head, TRL's float32 head is the forward of that wrapper.
    layer = next((layer for layer in layers if "forward" in layer.__dict__), linear)
    previous = layer.__dict__.get("forward")
    layer.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return head(hidden)
    finally:
        del layer.forward
        if previous is not None:
            layer.forward = previous


def _mesh_of(weight: Tensor) -> tuple[str, ...]:
    """The names of the dimensions of a DTensor's mesh; () for any other tensor."""
    return getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()


def _whole_or_shard(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, dict]:
    """-> (weight, bias, further keywords of the function), once wrappers have gathered the head."""
    if type(weight) in (Tensor, nn.Parameter):
        return weight, bias, {}
    split, split_bias = cast("DTensor", weight), cast("DTensor | None", bias)
    if _mesh_of(weight) == (_TENSOR_PARALLEL,) and split.placements[0].is_shard(0):
        group, ranks = split.device_mesh.get_group(), split.device_mesh.size()
        sizes = tuple(len(rows) for rows in torch.arange(split.shape[0]).chunk(ranks))  # as DTensor splits
        local_bias = None if split_bias is None else split_bias.to_local()
        return split.to_local(), local_bias, {"vocab_shard": VocabShard(group, sizes)}
    raise TypeError(
        f"the head's weight must be a whole, plain tensor where the head runs, got {type(weight).__name__} (mesh "
        f"{_mesh_of(weight)}): call the wrapped model, so that FSDP gathers it; split a head by tensor parallelism "
        "over its vocabulary, on a 1-d mesh named 'tp'; do not quantise it"
    )


def _causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model itself, taken out of PEFT's wrapper if there is one."""
    for name in ("module", "_orig_mod"):
        if isinstance(getattr(model, name, None), nn.Module):
            raise TypeError(
                f"the fused head belongs to the model that DDP, FSDP, DeepSpeed or torch.compile wrap, got "
                f"{type(model).__name__}: add it before wrapping, or to its .{name}"
            )
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _head_of(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"add_fused_head takes a causal language model of transformers, with get_output_embeddings(), "
            f"got {type(model).__name__}"
        )
    return head


def _layers(head: nn.Module) -> list[nn.Module]:
    """The head, then what FSDP1's and PEFT's wrappers hold inside. The last one is the linear layer."""
    inner = _wrapped_by(head)
    return [head] if inner is None else [head, *_layers(inner)]


def _linear(head: nn.Module) -> nn.Linear:
    """The layer that multiplies, of a head that `_require_plain` has seen."""
    return cast(nn.Linear, _layers(head)[-1])


def _wrapped_by(layer: Any) -> nn.Module | None:
    if not _is_from_peft(layer, "ModulesToSaveWrapper"):
        return getattr(layer, "module", None)  # FSDP1 wraps the head if its policy says so
    active = layer.active_adapters
    if layer.disable_adapters or not active or active[0] not in layer.modules_to_save:
        return layer.original_module
    return layer.modules_to_save[active[0]]


def _is_from_peft(layer: nn.Module, name: str) -> bool:
    peft = sys.modules.get("peft.utils.other")  # a model with such a layer has imported this module
    return peft is not None and isinstance(layer, getattr(peft, name))


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def _require_plain(head: nn.Module, float32: bool) -> None:
    """Raise TypeError unless the head is a plain linear layer. The fused head multiplies with its weight, and would
    silently leave out anything else.
    """
    advice = (
        "take the head out of PEFT's target_modules (modules_to_save trains it whole), do not quantise it, load "
        "without device_map; or use the model's own logits with policy_loss"
    )
    if _is_from_peft(head, "TrainableTokensWrapper"):
        advice = (
            "its trainable_token_indices reach the head, which is tied to the embedding; write "
            "modules_to_save=['embed_tokens'] with ensure_weight_tying=True in their place, or untie the head"
        )
    *wrappers, linear = _layers(head)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise TypeError(f"the head must be a plain nn.Linear, got {_kind(linear)}: {advice}")
    # TRL's float32 head and tensor parallelism set a forward on the head, which the fused head may replace.
    replaced = any("forward" in layer.__dict__ for layer in (*wrappers, linear))
    if replaced and not float32 and _TENSOR_PARALLEL not in _mesh_of(linear.weight):
        raise TypeError(f"the head must be a plain nn.Linear, got one whose forward was replaced: {advice}")
