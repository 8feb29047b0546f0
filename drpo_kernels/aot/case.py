"""A kernel to compile ahead of time, and what is expected of its binary."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# What `triton.compiler.ASTSource` calls an argument's type: "*fp32", "i64", "fp32", "constexpr", or a tuple of these.
ArgumentType = str | tuple["ArgumentType", ...]


@dataclass(frozen=True)
class Bounds:
    """The most that a row kernel may take on `targets`, whose row tiles the numbers are of; None: any number.

    Instructions are those that a thread executes for an element, in a loop over whole blocks.
    """

    reading: float | None = None  # instructions in a loop that loads and does not store: the first of two passes
    writing: float | None = None  # in one that loads and stores
    special: float = 1  # special-function instructions among them, in either
    registers: int | None = None
    targets: tuple[str, ...] = ("sm_90", "sm_100")


@dataclass(frozen=True)
class Expected:
    """What a binary must show, as far as it is said. Loops are the innermost ones."""

    load_bits: int = 0  # of a thread's every load in a loop
    store_bits: int = 0
    loop_load_bytes: int | None = None  # the most that a thread may load in an iteration: each element once
    tails: int = 0  # loops that a mask keeps narrow
    local_bytes: int = 0  # of a thread's registers that may wait in memory while a loop runs
    element_bytes: int = 0  # that a row kernel loads for an element; 0: no row kernel
    bounds: Bounds | None = None


@dataclass(frozen=True)
class KernelCase:
    """One kernel, specialised the way its launcher specialises it.

    `signature` gives the type of every argument, in order; of an argument that the kernel annotates with a NamedTuple,
    the type of every field, as "argument.field". What has the type "constexpr" has its value in `constexprs`: a number,
    a `@triton.jit` objective, or None for what is absent, be it a pointer or a whole NamedTuple. A tuple of run-time
    floats is a tuple of type names, `("fp32", "fp32")`; without any, `()`. `divisible` lists the pointers, strides and
    sizes that the launcher sees as multiples of 16, which is what lets the compiler vectorise.
    """

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, ArgumentType]
    constexprs: Mapping[str, object]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, object] = field(default_factory=dict)  # further launch options, such as maxnreg
    targets: tuple[str, ...] = ()  # prefixes of the targets that are launched with these types and options; none: all
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        names = list(places(self.kernel, self.constexprs))
        if list(self.signature) != names:
            raise ValueError(f"{self.name}: signature {list(self.signature)} is not {names}")
        constant = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constant != set(self.constexprs):
            raise ValueError(f"{self.name}: constexpr arguments {sorted(constant)}, values {sorted(self.constexprs)}")

    def launched_on(self, target: str) -> bool:
        return not self.targets or target.startswith(self.targets)

    def source(self) -> Any:
        """The case as Triton's compiler takes it; the same call from Triton 3.4 to 3.9."""
        from triton.compiler import ASTSource

        at = places(self.kernel, self.constexprs)
        signature: dict[str, ArgumentType] = {}
        for name, parameter in inspect.signature(self.kernel.fn).parameters.items():
            if name in at:
                signature[name] = self.signature[name]
            else:
                fields = parameter.annotation._fields
                signature[name] = parameter.annotation(*(self.signature[f"{name}.{part}"] for part in fields))
        constexprs = {at[name]: value for name, value in self.constexprs.items()}
        attributes = {at[name]: [["tt.divisibility", 16]] for name in self.divisible}
        return ASTSource(self.kernel, signature, constexprs=constexprs, attrs=attributes)

    def launch_options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}


def places(kernel: Any, constants: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The names in a kernel's signature, in order, with the place of each: (argument,), or (argument, field) within a
    NamedTuple that is not itself one of the `constants`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for i, (name, parameter) in enumerate(inspect.signature(kernel.fn).parameters.items()):
        fields = getattr(parameter.annotation, "_fields", ())
        if fields and name not in constants:
            found |= {f"{name}.{part}": (i, j) for j, part in enumerate(fields)}
        else:
            found[name] = (i,)
    return found
