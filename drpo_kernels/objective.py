"""What an objective is: the class that every policy loss derives from, and the registry that graphs find it in."""

import ast
import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from drpo_kernels.keywords import with_known_keywords
from drpo_kernels.tokens import Tokens

ObjectiveClass = TypeVar("ObjectiveClass", bound=type["Objective"])

_REGISTRY: dict[str, type["Objective"]] = {}
# For each `token_loss` marked `built_in`, the function that chooses its Triton twin by an objective's settings, or None
_TWINS: dict[Callable, Callable | None] = {}


@dataclass(frozen=True)
class Objective:
    """A per-token loss. Subclass as a frozen dataclass and write `token_loss`; that is all a new objective needs.

    `token_loss` gives one loss per token for any number of tokens and keeps no state. A token's loss depends on that
    token alone, unless `sequence_level` is True. Only log π gets a gradient; other tensors in the loss are constants.
    An objective of your own is tried at its first use with these settings, on made-up tokens and on some of the call's
    own (`drpo_kernels.token_losses`), which reads a few results back from the device. If numbers among the settings
    change from call to call, only the first values are tried.

    zero_if_no_advantage  True if A = 0 makes loss and gradient exactly 0, so that such rows need not be computed. A
                          subclass that overrides `token_loss` does not inherit this, nor the `twin`: it sets them again
    sequence_level        True if a token's loss needs the log-probs of other tokens (`tokens.sequences`). The call then
                          computes the logits twice and costs 8·T·V·H FLOP in place of 6·T·V·H
    clips                 True if clipping or masking takes the gradient from some tokens (see `drpo/clip_share`)
    """

    zero_if_no_advantage: ClassVar[bool] = False
    sequence_level: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        order = cls.__mro__
        down_to_formula = order[: 1 + next(i for i, base in enumerate(order) if "token_loss" in vars(base))]
        for name in ("twin", "zero_if_no_advantage"):
            # A class states these two for its own formula, so they do not apply to the formula of a subclass.
            if not any(name in vars(base) for base in down_to_formula):
                setattr(cls, name, vars(Objective)[name])

    def token_loss(self, tokens: Tokens) -> Tensor:
        """ℓ of each token, [N], differentiable in `tokens.logprobs`."""
        raise NotImplementedError(f"{type(self).__name__} must implement token_loss(tokens)")

    @property
    def remark(self) -> str | None:
        """A sentence that `drpo_kernels.diagnose` tells whoever chose these hyper-parameters, or None."""
        return None

    @property
    def twin(self) -> Callable | None:
        """The `@triton.jit` function (logp, old, adv, hyper) -> (ℓ, dℓ/dlogπ), or None. It is looked up by the
        `token_loss` that it belongs to, so a class that overrides `token_loss` does not get it.
        """
        choose = _TWINS.get(type(self).token_loss)
        return None if choose is None else choose(self)

    @property
    def hyper(self) -> tuple[float, ...]:
        """The numeric hyper-parameters in their order, which a twin reads at run time; None ("no bound") is +inf."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(math.inf if value is None else float(value) for value in values if not isinstance(value, str))


def built_in(twin_of: Callable[..., Callable] | None = None) -> Callable[[Callable], Callable]:
    """Decorator of a `token_loss` that our tests cover, so calls do not try it on made-up tokens. `twin_of` chooses its
    Triton twin by the objective's settings.
    """

    def enter(token_loss: Callable) -> Callable:
        _TWINS[token_loss] = twin_of
        return token_loss

    return enter


def is_built_in(objective: Objective) -> bool:
    """Whether the objective's `token_loss` is marked `built_in`."""
    return type(objective).token_loss in _TWINS


def built_in_objectives() -> list[type[Objective]]:
    """The registered objectives whose formula belongs to this package."""
    return [cls for cls in _REGISTRY.values() if cls.token_loss in _TWINS]


def register_objective(cls: ObjectiveClass) -> ObjectiveClass:
    """Class decorator: makes an objective reachable by its class name inside `torch.compile(fullgraph=True)` graphs.

    The class must be a frozen dataclass whose fields are numbers, bools, None or strings. A float may change from call
    to call in one graph. A registered class refuses an unknown keyword with a TypeError that names the known ones.
    Raises ValueError if the name is taken.
    """
    if _REGISTRY.setdefault(cls.__name__, cls) is not cls:
        raise ValueError(f"an objective named {cls.__name__!r} is already registered")
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    if "__init__" in vars(cls) and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        names = tuple(parameter.name for parameter in parameters)
        cls.__init__ = with_known_keywords(cls.__init__, cls.__name__, names)  # type: ignore[method-assign]
    return cls


def encode_objective(objective: Objective) -> tuple[str, list[float]]:
    """Encode an objective for the schema of a custom op: its name and its fields that are no floats as one string, and
    its floats as a list.
    """
    words, numbers = [type(objective).__name__], []
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, str):
            value = str(value)  # turns the member of a string enumeration into its value
            if not value.isidentifier():
                raise ValueError(f"{words[0]}.{field.name} must be an identifier inside a graph, got {value!r}")
        elif isinstance(value, int) and not isinstance(value, bool):
            value = int(value)
        if value is None or isinstance(value, (str, int)):  # a graph of PyTorch 2.8 does not know `str | int`
            words.append(f"{field.name}={value!r}")
        else:
            numbers.append(float(value))
    return " ".join(words), numbers


def decode_objective(words: str, numbers: list[float]) -> Objective:
    """The inverse of `encode_objective`, for registered objectives."""
    name, *pairs = words.split(" ")
    cls = _REGISTRY[name]
    values = {key: ast.literal_eval(value) for key, value in (pair.split("=") for pair in pairs)}
    rest = iter(numbers)
    return cls(**{f.name: values[f.name] if f.name in values else next(rest) for f in dataclasses.fields(cls)})


def registered_objective(name: str) -> type[Objective]:
    """The objective class registered under this name. Raises ValueError, listing the known ones, if there is none."""
    if name not in _REGISTRY:
        raise ValueError(f"no objective is registered as {name!r}; there are {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def is_registered(objective: Objective) -> bool:
    return _REGISTRY.get(type(objective).__name__) is type(objective)
