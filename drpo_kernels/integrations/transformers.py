"""A fused head inside a causal language model: its forward returns the loss, and never makes the logits.

The loss is computed inside the model's own wrapped forward and inside its head module's call, which is where DDP, FSDP
and ZeRO-3 have gathered the weight and where their hooks expect the gradients. The model's forward runs unchanged, with
a small probe standing in for the logits: whatever it does before the head (padding, packing, images, routers) it still
does, and what it does to logits after the head is read off the probe instead of being guessed from its configuration.
"""

import contextlib
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_STATE = "_drpo_fused_head"
# Stand-ins for logits: small ones show a scale, the largest one the limit of a soft-cap. The first is the unit.
_PROBE = (1.0, 0.0, -1.0, 0.1, -0.1, 5.0, -5.0, 20.0, -40.0, 1e6)


class HeadTransform(NamedTuple):
    """What a model does to its head's output: softcap(logit_scale · x), as in `linear_policy_loss`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.logit_scale * x
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


class WithAuxiliaryLoss(NamedTuple):
    """What a model with a router returns: the fused head's result and the load-balancing loss, 0-d."""

    result: Any
    aux_loss: Tensor


class _State:
    """What `add_fused_head` remembers of a model; the transform is known after the first fused call."""

    def __init__(self, float32: bool):
        self.float32 = float32
        self.transform: HeadTransform | None = None


class _Probe(nn.Module):
    """Stands in for the head during a fused forward: keeps the hidden states and returns the probe, [1, .., 10]."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.hidden: Tensor | None = None
        self._in_place_of = (head,)  # in a tuple: not a submodule

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._in_place_of[0], name)  # Mamba reads its head's weight.dtype

    def forward(self, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        dtype = torch.float32 if hidden.device.type == "mps" else torch.float64
        values = torch.tensor(_PROBE, dtype=dtype, device=hidden.device)
        return values.view(*(1,) * (hidden.dim() - 1), -1)


def add_fused_head(model: nn.Module, *, float32: bool = False) -> nn.Module:
    """Let a causal language model of `transformers` compute a loss from its hidden states. -> the same model.

    Afterwards `model(..., fused_head=function)` runs the backbone and returns
    `function(hidden [B, L, H], weight [V, H], bias=..., logit_scale=..., softcap=...)`, with the logit scale and the
    soft-cap that this model applies; without `fused_head` the forward is the model's own, and so is `generate`. Adding
    it twice changes nothing.
    `functools.partial` of `linear_policy_loss` or `linear_token_logprobs` is such a function:

        out = model(input_ids=ids[:, :-1], attention_mask=attention_mask[:, :-1], fused_head=partial(
            linear_policy_loss, targets=ids[:, 1:], old_logprobs=old_logprobs, advantages=advantages, mask=mask[:, 1:]))
        out.loss.backward()

    Nothing is shifted: hidden[:, i] predicts token i + 1. `logits_to_keep` selects the last positions, as in the
    model's forward. A model that returns a router's load-balancing loss gives `WithAuxiliaryLoss(result, aux_loss)`.

    Call it before wrapping the model with PEFT, DDP, FSDP or DeepSpeed, and hand everything to the wrapped model's
    call. Tensors inside a `partial` stay as they are: FSDP and DeepSpeed round bare arguments to the compute dtype.

    float32       True: the head's product runs in float32, outside autocast; its weight must be float32

    Raises TypeError for a model whose head is not a plain `nn.Linear` (LoRA on the head, quantised, a forward of its
    own), and ValueError, at the first fused call, where what follows the head is not a scale and a soft-cap.
    """
    head = _head_of(model)
    state = getattr(model, _STATE, None)
    if state is not None:
        if state.float32 != float32:
            raise ValueError(f"{type(model).__name__} has a fused head with float32={state.float32} already")
        return model
    _require_plain(head, ignore_forward=float32)
    setattr(model, _STATE, _State(float32))
    head.forward = types.MethodType(_head_forward(head.__dict__.get("forward"), float32), head)
    model.forward = types.MethodType(_model_forward(type(model).forward, model.__dict__.get("forward")), model)
    return model


def remove_fused_head(model: nn.Module) -> nn.Module:
    """Undo `add_fused_head`. -> the same model. Raises ValueError for a model without one."""
    if not hasattr(model, _STATE):
        raise ValueError(f"{type(model).__name__} has no fused head")
    for module in (model, _head_of(model)):
        previous = module.forward.__func__.previous
        if previous is None:
            del module.forward
        else:
            module.forward = previous
    delattr(model, _STATE)
    return model


def _model_forward(original: Callable, previous: Callable | None) -> Callable:
    """The model's forward with a `fused_head` argument; `previous` is a forward somebody set on the instance."""

    @functools.wraps(original)  # `generate` checks its arguments against this signature
    def forward(self, *args, fused_head: Callable | None = None, **kwargs):
        plain = functools.partial(original, self) if previous is None else previous
        if fused_head is None:
            return plain(*args, **kwargs)
        return _fused_call(self, plain, fused_head, args, kwargs)

    forward.previous = previous
    return forward


def _head_forward(previous: Callable | None, float32: bool) -> Callable:
    """The head's forward with a `fused_head` argument, by which it is called through the hooks of its wrappers."""

    def forward(self, hidden: Tensor, fused_head: Callable | None = None):
        if fused_head is None:
            return type(self).forward(self, hidden) if previous is None else previous(hidden)
        _require_plain(self, ignore_forward=True)
        _require_plain_weight(self.weight)
        if not float32:
            return fused_head(hidden, self.weight, bias=self.bias)
        with torch.autocast(hidden.device.type, enabled=False):
            return fused_head(hidden.float(), self.weight, bias=self.bias)

    forward.previous = previous
    return forward


def _fused_call(model: nn.Module, plain: Callable, fused_head: Callable, args: tuple, kwargs: dict):
    if kwargs.get("labels") is not None:
        raise ValueError("labels must be None with fused_head: the targets belong to the function")
    parameters = inspect.signature(type(model).forward).parameters
    if "use_cache" in parameters:
        kwargs["use_cache"] = False
    state: _State = getattr(model, _STATE)
    head = _head_of(model)
    with _probing(model, head) as probe:
        outputs = _run(model, plain, probe, args, kwargs)
    if state.transform is None:
        state.transform = _transform_of(model, outputs.logits)
    call = functools.partial(fused_head, **state.transform._asdict())
    result = head(probe.hidden, fused_head=call)
    aux_loss = getattr(outputs, "aux_loss", None)
    return result if aux_loss is None else WithAuxiliaryLoss(result, aux_loss)


def _run(model: nn.Module, plain: Callable, probe: _Probe, args: tuple, kwargs: dict):
    name = type(model).__name__
    try:
        outputs = plain(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if probe.hidden is None:
            raise
        raise ValueError(
            f"{name} cannot have a fused head: what its forward does after the head failed on a probe of "
            f"{len(_PROBE)} logits"
        ) from error
    if probe.hidden is None or not isinstance(getattr(outputs, "logits", None), Tensor):
        raise ValueError(
            f"{name} cannot have a fused head: its forward did not call its output embeddings, or returned no logits "
            "(return_dict must not be False)"
        )
    return outputs


@contextlib.contextmanager
def _probing(model: nn.Module, head: nn.Module) -> Iterator[_Probe]:
    """The probe in the head's place, and the head back in it whatever happens."""
    places = [(parent, name) for parent in model.modules() for name, m in parent._modules.items() if m is head]
    probe = _Probe(head)
    try:
        for parent, name in places:
            parent._modules[name] = probe
        yield probe
    finally:
        for parent, name in places:
            parent._modules[name] = head


def _transform_of(model: nn.Module, logits: Tensor) -> HeadTransform:
    """The transform that turns the probe into these logits. Reads them: one synchronisation per model."""
    x = torch.tensor(_PROBE, dtype=torch.float64)
    y = logits.detach().reshape(-1).to(device="cpu", dtype=torch.float64)
    if y.shape == x.shape:
        unit, limit = y[0].item(), y[-1].item()
        candidates = [HeadTransform(unit)]
        if 0 < unit < limit:
            candidates.append(HeadTransform(limit * math.atanh(unit / limit), limit))
        for transform in candidates:
            if transform.logit_scale > 0 and torch.allclose(transform(x), y, rtol=1e-6, atol=1e-9):
                return transform
    raise ValueError(
        f"{type(model).__name__} cannot have a fused head: what its forward does to the logits is neither a scale nor "
        f"a soft-cap (probe {list(_PROBE)} became {y.tolist()[: len(_PROBE)]})"
    )


def _head_of(model: nn.Module) -> nn.Module:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"add_fused_head takes a causal language model of transformers, with get_output_embeddings(), "
            f"got {type(model).__name__}"
        )
    return head


def _require_plain(head: nn.Module, ignore_forward: bool = False) -> None:
    """The fused head multiplies with `head.weight`: anything else in the head would silently be left out."""
    advice = "train without it on the head (LoRA: take the head out of target_modules), or use the model's own logits"
    kind = f"{type(head).__module__}.{type(head).__name__}"
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(f"the head must be a plain nn.Linear, got {kind}: {advice}")
    if not ignore_forward and "forward" in head.__dict__:
        raise TypeError(f"the head must be a plain nn.Linear, got one whose forward was replaced: {advice}")


def _require_plain_weight(weight: Tensor) -> None:
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(
            f"the head's weight must be a whole, plain tensor where the head runs, got {type(weight).__name__}: call "
            "the wrapped model, so that FSDP gathers it; a head split over its vocabulary by tensor parallelism goes "
            "to linear_policy_loss(..., vocab_shard=...)"
        )
