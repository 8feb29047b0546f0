"""What to compile ahead of time: every kernel with representative argument types, for GPUs that need not be there.

`python -m drpo_kernels compile` compiles each case for each target and fails on a spill to local memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What `triton.compiler.ASTSource` calls an argument's type: "*fp32", "i64", "fp32", "constexpr", or a tuple of these.
ArgumentType = str | tuple["ArgumentType", ...]


@dataclass(frozen=True)
class KernelCase:
    """One kernel, specialised the way its launcher specialises it.

    `signature` names every argument, in order. An argument of type "constexpr" has its value in `constexprs`: a number,
    a `@triton.jit` objective, or None for an optional pointer that is absent. A tuple of run-time floats is a tuple of
    type names, `("fp32", "fp32")`; without any, `()`. `divisible` lists the pointers, strides and sizes that the
    launcher sees as multiples of 16, which is what lets the compiler vectorise.
    """

    name: str
    kernel: Any  # a triton.JITFunction
    signature: Mapping[str, ArgumentType]
    constexprs: Mapping[str, object]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, object] = field(default_factory=dict)  # further launch options, such as maxnreg

    def __post_init__(self) -> None:
        if list(self.signature) != list(self.kernel.arg_names):
            raise ValueError(f"{self.name}: signature {list(self.signature)} is not {list(self.kernel.arg_names)}")
        constant = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constant != set(self.constexprs):
            raise ValueError(f"{self.name}: constexpr arguments {sorted(constant)}, values {sorted(self.constexprs)}")

    def source(self) -> Any:
        """The case as Triton's compiler takes it; the same call from Triton 3.4 to 3.9."""
        from triton.compiler import ASTSource

        paths = (path for name in self.divisible for path in self._leaves(name))
        attributes = {path: [["tt.divisibility", 16]] for path in paths}
        return ASTSource(self.kernel, dict(self.signature), constexprs=dict(self.constexprs), attrs=attributes)

    def launch_options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}

    def _leaves(self, name: str) -> Iterator[tuple[int, ...]]:
        """Paths of an argument's pointers and integers: itself, or the members of a tuple that can have a divisor."""
        position, kind = list(self.signature).index(name), self.signature[name]
        if isinstance(kind, str):
            yield (position,)
        else:
            yield from ((position, i) for i, member in enumerate(kind) if member[0] in "*i")


def kernel_cases() -> list[KernelCase]:
    """Every kernel of this backend, in the specialisations its launchers ask for."""
    raise NotImplementedError
