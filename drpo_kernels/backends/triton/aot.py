"""What to compile ahead of time: every kernel with representative argument types, for GPUs that need not be there.

`python -m drpo_kernels compile` compiles each case for each target and fails on a spill to local memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from drpo_kernels.backends.triton import invariant, kernels
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS
from drpo_kernels.backends.triton.tiles import MatmulTile, matmul_tile, row_tile
from drpo_kernels.kl import KL_ESTIMATORS
from drpo_kernels.objectives import CISPO, DPPO, DRPO, PPO, SPO, PolicyGradient
from drpo_kernels.triton_support import tl

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
    targets: tuple[str, ...] = ()  # those whose launches look like this; none: all

    def __post_init__(self) -> None:
        if list(self.signature) != list(self.kernel.arg_names):
            raise ValueError(f"{self.name}: signature {list(self.signature)} is not {list(self.kernel.arg_names)}")
        constant = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constant != set(self.constexprs):
            raise ValueError(f"{self.name}: constexpr arguments {sorted(constant)}, values {sorted(self.constexprs)}")

    def source(self) -> Any:
        """The case as Triton's compiler takes it; the same call from Triton 3.4 to 3.9."""
        from triton.compiler import ASTSource

        positions = {name: position for position, name in enumerate(self.signature)}
        attributes = {(positions[name],): [["tt.divisibility", 16]] for name in self.divisible}
        return ASTSource(self.kernel, dict(self.signature), constexprs=dict(self.constexprs), attrs=attributes)

    def launch_options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}


VOCAB = 151936  # Qwen3's: the row the tiles are chosen for

STRIDES = {"row_stride": "i64", "out_stride": "i64", "rows_stride": "i64", "outcome_stride": "i64"}
STRIDES |= {"statistics_stride": "i64", "slopes_stride": "i64", "column_stride": "constexpr"}
PACKED = ("rows", "outcome", "statistics", "slopes")


def _case(
    label: str,
    kernel: Any,
    logits: str,
    out: str,
    hyper: int = 0,
    bias: str | None = None,
    even: bool = True,
    **flags: object,
) -> KernelCase:
    """A launch on contiguous rows, as launch.py types it: stride 1 and an absent bias are constants to the JIT."""
    tile = row_tile(VOCAB, 4 if logits == "fp32" else 2)
    types = STRIDES | dict.fromkeys(PACKED, "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= {"logits": f"*{logits}", "out": f"*{out}", "targets": "*i64", "vocab": "i32", "padded": "i32"}
    types |= {"hyper": ("fp32",) * hyper, "bias": f"*{bias}" if bias else "constexpr"}
    constexprs = {"column_stride": 1, "BLOCK": tile.block, **flags} | ({} if bias else {"bias": None})
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constexprs else types[name] for name in names}
    divisible = ["logits", "out", "bias", "row_stride", "out_stride", "targets"]
    divisible += ["vocab", "padded"] if even else []
    return KernelCase(
        name=f"{kernel.__name__.removesuffix('_kernel')}[{label}]",
        kernel=kernel,
        signature=signature,
        constexprs={name: constexprs[name] for name in names if name in constexprs},
        divisible=tuple(name for name in divisible if signature.get(name, "constexpr") != "constexpr"),
        num_warps=tile.num_warps,
        options=LAUNCH_OPTIONS,
    )


def kernel_cases() -> list[KernelCase]:
    """Every kernel of this backend, in the specialisations its launchers ask for."""
    plain = {"HAS_BIAS": False, "HAS_SOFTCAP": False}
    full = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
    objectives = [DRPO(), SPO(), PPO(), DPPO(), DPPO(divergence="kl"), CISPO(), PolicyGradient()]
    bare = {"KL": None, "KL_IMPORTANCE": False, "HAS_ENTROPY": False, "WRITE": True}
    cases = []
    for objective in objectives:
        flags = {"OBJECTIVE": objective.twin} | bare | plain
        label = f"{objective.twin.__name__} fp32>bf16"
        cases.append(_case(label, kernels.policy_kernel, "fp32", "bf16", len(objective.hyper), **flags))
    drpo = {"OBJECTIVE": DRPO().twin} | bare
    for logits, out in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        cases.append(_case(f"drpo {logits}>{out}", kernels.policy_kernel, logits, out, 1, **drpo, **plain))
    cases.append(_case("drpo odd vocabulary", kernels.policy_kernel, "fp32", "bf16", 1, even=False, **drpo, **plain))
    cases.append(_case("drpo forward", kernels.policy_kernel, "fp32", "fp32", 1, **drpo | plain | {"WRITE": False}))
    for name, estimator in KL_ESTIMATORS.items():
        flags = drpo | full | {"KL": estimator.twin, "KL_IMPORTANCE": True, "HAS_ENTROPY": True}
        label = f"drpo {name} entropy bias softcap"
        cases.append(_case(label, kernels.policy_kernel, "fp32", "bf16", 1, bias="bf16", **flags))
    for logits, out in (("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")):
        cases.append(_case(logits, kernels.statistics_kernel, logits, out, **plain))
        cases.append(_case(f"{logits}>{out}", kernels.gradient_kernel, logits, out, HAS_ENTROPY=True, **plain))
    cases.append(_case("bias softcap", kernels.statistics_kernel, "fp32", "bf16", bias="bf16", **full))
    cases.append(_case("bias softcap", kernels.gradient_kernel, "fp32", "bf16", bias="bf16", HAS_ENTROPY=True, **full))
    return cases + invariant_cases()


# --- the fixed-order products -----------------------------------------------------------------------------------------

# shared memory that one program may have; the tile follows it
SHARED_MEMORY = dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101_376) | {"sm_80": 166_912, "gfx942": 65_536}
SHARED_MEMORY |= dict.fromkeys(("sm_90", "sm_100"), 232_448)
COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# by product: the strides that are 1
UNIT_STRIDES = {
    "logits": ("a_depth_stride", "b_depth_stride"),
    "dX": ("a_depth_stride", "b_column_stride"),
    "dW": ("a_row_stride", "b_column_stride"),
}


def invariant_cases() -> list[KernelCase]:
    """The products of `batch_invariant` with every tile that `matmul_tile` chooses."""
    cases = [
        *_products("logits", "bf16", "bf16", "fp32"),
        *_products("logits", "bf16", "bf16", "fp32", even=False),
        *_products("logits", "fp16", "fp16", "fp32"),
        *_products("logits", "bf16", "fp32", "fp32"),  # fp32 master weights under autocast
        *_products("logits", "fp32", "fp32", "fp32"),
        *_products("dX", "bf16", "bf16", "fp32"),
        *_products("dX", "fp32", "fp32", "fp32"),
        *_products("dW", "bf16", "bf16", "bf16"),
        *_products("dW", "bf16", "bf16", "fp32", accumulate=True),
        *_products("dW", "fp32", "fp32", "fp32", accumulate=True),
    ]
    signature = {"x": "*bf16", "row_stride": "i64", "out": "*fp32", "rows": "i32", "columns": "i32"}
    values = {"ACCUMULATE": True, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": invariant.COLUMN_BLOCK}
    signature |= dict.fromkeys(values, "constexpr")
    even = ("x", "row_stride", "out", "columns")
    return [
        *cases,
        KernelCase(
            "column_sum[db bf16, next chunk]",
            invariant.column_sum_kernel,
            signature,
            values,
            even,
            options=LAUNCH_OPTIONS,
        ),
    ]


def _products(
    product: str, a: str, b: str, out: str, accumulate: bool = False, even: bool = True
) -> Iterator[KernelCase]:
    """One of the three products, multiplied in the dtype of `a`: a case for each tile, and the targets that take it."""
    sizes = [COMPUTE[kind].primitive_bitwidth // 8 for kind in (a, b)]
    tiles: dict[MatmulTile, tuple[str, ...]] = {}
    for target, shared in SHARED_MEMORY.items():
        tile = matmul_tile(sizes[0], max(sizes), shared, accumulates=product == "dW")
        tiles[tile] = (*tiles.get(tile, ()), target)
    kernel = invariant.matmul_kernel
    strides = [name for name in kernel.arg_names if name.endswith("_stride")]
    types = {"a": f"*{a}", "b": f"*{b}", "out": f"*{out}"} | dict.fromkeys(strides, "i64")
    types |= dict.fromkeys(("rows", "columns", "padded", "depth"), "i32")
    unit = UNIT_STRIDES[product]
    divisible = tuple(name for name in ("a", "b", "out", "padded", *strides) if name not in unit)
    for tile, targets in tiles.items():
        values = {"ROUNDED": COMPUTE[a], "COMPUTE": COMPUTE[a], "ACCUMULATE": accumulate, "GROUP": tile.group}
        values |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth}
        values |= dict.fromkeys(unit, 1)
        label = f"{product} {a}" if a == b else f"{product} {a}·{b}"
        label += f">{out} {tile.rows}x{tile.columns}x{tile.depth}"
        yield KernelCase(
            name=f"matmul[{label}{', next chunk' if accumulate else ''}{'' if even else ', odd vocabulary'}]",
            kernel=kernel,
            signature={name: "constexpr" if name in values else types[name] for name in kernel.arg_names},
            constexprs={name: values[name] for name in kernel.arg_names if name in values},
            divisible=(*divisible, "columns") if even else divisible,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            options=LAUNCH_OPTIONS,
            targets=targets,
        )
