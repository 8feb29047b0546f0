"""What to compile ahead of time: every kernel with representative argument types, for GPUs that need not be there.

`python -m drpo_kernels compile` compiles each case for each target and fails where the binary is not what is expected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from drpo_kernels import metrics
from drpo_kernels.backends.devices import ARCHITECTURES, PRESETS
from drpo_kernels.backends.sparse import kernels as sparse
from drpo_kernels.backends.sparse.plan import entry_limit
from drpo_kernels.backends.triton import invariant, kernels
from drpo_kernels.backends.triton.kernels import WRITE_FACTORED, WRITE_GRADIENT, WRITE_NOTHING
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS, LOSSES_BLOCK, METRICS_BLOCK
from drpo_kernels.backends.triton.tiles import (
    MatmulTile,
    RowTile,
    entry_capacity,
    gather_tile,
    matmul_tile,
    row_tile,
    select_tile,
)
from drpo_kernels.evidence import FAR_BELOW_ONE
from drpo_kernels.kl import KL_ESTIMATORS
from drpo_kernels.objectives import CISPO, DPPO, DRPO, PPO, SPO, PolicyGradient
from drpo_kernels.tokens import LEAST_LOGPROB
from drpo_kernels.triton_support import tl

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
    targets: tuple[str, ...] = ()  # how the names of those begin whose launches look like this; none: all
    expected: Expected = Expected()

    def __post_init__(self) -> None:
        if list(self.signature) != list(self.kernel.arg_names):
            raise ValueError(f"{self.name}: signature {list(self.signature)} is not {list(self.kernel.arg_names)}")
        constant = {name for name, kind in self.signature.items() if kind == "constexpr"}
        if constant != set(self.constexprs):
            raise ValueError(f"{self.name}: constexpr arguments {sorted(constant)}, values {sorted(self.constexprs)}")

    def launched_on(self, target: str) -> bool:
        return not self.targets or target.startswith(self.targets)

    def source(self) -> Any:
        """The case as Triton's compiler takes it; the same call from Triton 3.4 to 3.9."""
        from triton.compiler import ASTSource

        positions = {name: position for position, name in enumerate(self.signature)}
        attributes = {(positions[name],): [["tt.divisibility", 16]] for name in self.divisible}
        return ASTSource(self.kernel, dict(self.signature), constexprs=dict(self.constexprs), attrs=attributes)

    def launch_options(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}


VOCAB = 151936  # Qwen3's: the row the tiles are chosen for
# whose row tiles the targets with such names take
ROW_DEVICES = {
    "sm_8": PRESETS["a100"], "sm_9": PRESETS["h100"], "sm_10": PRESETS["b200"], "sm_12": ARCHITECTURES["sm_120"],
    "gfx": PRESETS["mi300x"],
}  # fmt: skip

STRIDES = {"row_stride": "i64", "out_stride": "i64", "rows_stride": "i64", "outcome_stride": "i64"}
STRIDES |= {"statistics_stride": "i64", "slopes_stride": "i64", "column_stride": "constexpr"}
BYTES = {None: 0, "bf16": 2, "fp16": 2, "fp32": 4}
PACKED = ("rows", "outcome", "statistics", "slopes", "factors")

# Of the row kernels, by how a case's name begins, the first that fits: what they take at most under Triton 3.4 to 3.9,
# instructions to the next half
BOUNDS = {
    "policy[drpo fp32>fp32]": Bounds(reading=8, writing=8, registers=64),
    "policy[drpo bf16>bf16]": Bounds(reading=9, writing=8.5, registers=64),
    "policy[drpo fp16>fp32]": Bounds(reading=8.5, writing=8.5, registers=64),
    "policy[drpo forward]": Bounds(reading=8, registers=64),
    "policy[drpo z-loss]": Bounds(reading=8, writing=7.5, registers=64),
    "policy[drpo entropy bonus]": Bounds(reading=8, writing=11.5, registers=64),
    "policy[drpo one read k": Bounds(writing=56, special=4, registers=80),  # bias softcap
    "policy[drpo two reads": Bounds(reading=45, writing=60, special=4, registers=96),
    "policy[drpo k": Bounds(reading=43, writing=58.5, special=4, registers=64),
    "policy[": Bounds(writing=9, registers=64),  # one read
    "gradient[fp32>bf16, ": Bounds(writing=7.5, registers=32),  # of log-probs alone, or with the z-loss
    "gradient[fp32>bf16]": Bounds(writing=11.5, registers=32),
    "gradient[bf16>bf16]": Bounds(writing=13, registers=64),
    "gradient[fp16>fp16]": Bounds(writing=12.5, registers=64),
    "gradient[bias softcap]": Bounds(writing=58.5, special=4, registers=64),
    "statistics[fp32]": Bounds(reading=8, registers=64),
    "statistics[bf16]": Bounds(reading=9, registers=64),
    "statistics[fp16]": Bounds(reading=8.5, registers=64),
    "statistics[bias softcap]": Bounds(reading=42.5, special=3, registers=88),
}


def _bounds(name: str) -> Bounds:
    return next(bounds for start, bounds in BOUNDS.items() if name.startswith(start))


def _row_cases(
    label: str,
    kernel: Any,
    logits: str,
    out: str,
    hyper: int = 0,
    bias: str | None = None,
    even: bool = True,
    **flags: object,
) -> Iterator[KernelCase]:
    """A launch on contiguous rows, as launch.py types it: stride 1 and an absent bias are constants to the JIT."""
    types = STRIDES | dict.fromkeys(PACKED, "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types |= {"logits": f"*{logits}", "out": f"*{out}", "targets": "*i64", "vocab": "i32", "padded": "i32"}
    types |= {"hyper": ("fp32",) * hyper, "kl_cap": "fp32", "bias": f"*{bias}" if bias else "constexpr"}
    names = kernel.arg_names
    divisible = ["logits", "out", "bias", "row_stride", "out_stride", "targets"]
    divisible += ["vocab", "padded"] if even else []
    for vendor, device in ROW_DEVICES.items():
        tile = row_tile(VOCAB, BYTES[logits], device)
        constexprs = {"column_stride": 1, "BLOCK": tile.block, "order": None, "HAS_ORDER": False, **flags}
        constexprs |= {} if bias else {"bias": None}
        constexprs |= {} if flags.get("WRITE") == WRITE_FACTORED else {"factors": None}
        signature = {name: "constexpr" if name in constexprs else types[name] for name in names}
        elements = tile.block // (tile.num_warps * device.warp_size)
        loaded = BYTES[logits] + BYTES[bias]
        stored = "out" in names and flags.get("WRITE", True)
        # on AMD each element of a tail may have a branch of its own, which looks like a loop
        tails = 0 if even else 1 if vendor.startswith("sm_") else 16
        name = f"{kernel.__name__.removesuffix('_kernel')}[{label}]"
        # a few values of the row, which wait while its loops run; none do where every call goes
        one_read = even and flags.get("WRITE") == WRITE_FACTORED
        local_bytes = 64 if flags["HAS_SOFTCAP"] else 0 if one_read else 16
        yield KernelCase(
            name=name,
            kernel=kernel,
            signature=signature,
            constexprs={name: constexprs[name] for name in names if name in constexprs},
            divisible=tuple(name for name in divisible if signature.get(name, "constexpr") != "constexpr"),
            num_warps=tile.num_warps,
            options=LAUNCH_OPTIONS | {k: v for k, v in tile.launch_options(bool(bias)).items() if k != "num_warps"},
            targets=(vendor,),
            expected=Expected(
                128, 128 if stored else 0, elements * loaded, tails, local_bytes, element_bytes=loaded,
                bounds=_bounds(name),
            ),
        )


def kernel_cases() -> list[KernelCase]:
    """Every kernel of this backend, in the specialisations its launchers ask for."""
    plain = {"HAS_BIAS": False, "HAS_SOFTCAP": False}
    full = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
    objectives = [DRPO(), SPO(), PPO(), DPPO(), DPPO(divergence="kl"), CISPO(), PolicyGradient()]
    bare = {"KL": None, "KL_IMPORTANCE": False, "HAS_ENTROPY": False, "HAS_Z_LOSS": False, "FROM_ROLLOUT": True}
    bare |= {"WRITE": WRITE_GRADIENT}
    cases = []
    for objective in objectives:
        flags = {"OBJECTIVE": objective.twin} | bare | plain | {"WRITE": WRITE_FACTORED}
        label = f"{objective.twin.__name__} fp32>bf16"
        cases.extend(_row_cases(label, kernels.policy_kernel, "fp32", "bf16", len(objective.hyper), **flags))
    drpo = {"OBJECTIVE": DRPO().twin} | bare
    for logits, out in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        cases.extend(_row_cases(f"drpo {logits}>{out}", kernels.policy_kernel, logits, out, 1, **drpo, **plain))
    one_read = drpo | {"WRITE": WRITE_FACTORED}
    cases.extend(
        _row_cases("drpo odd vocabulary", kernels.policy_kernel, "fp32", "bf16", 1, even=False, **one_read, **plain)
    )
    label, flags = "drpo one read k3 bias softcap", one_read | full | {"KL": KL_ESTIMATORS["k3"].twin}
    cases.extend(_row_cases(label, kernels.policy_kernel, "fp32", "bf16", 1, bias="bf16", **flags))
    cases.extend(
        _row_cases("drpo forward", kernels.policy_kernel, "fp32", "fp32", 1, **drpo | plain | {"WRITE": WRITE_NOTHING})
    )
    for name, estimator in KL_ESTIMATORS.items():
        flags = drpo | full | {"KL": estimator.twin, "KL_IMPORTANCE": True, "HAS_ENTROPY": True, "HAS_Z_LOSS": True}
        label = f"drpo {name} entropy z-loss bias softcap"
        cases.extend(_row_cases(label, kernels.policy_kernel, "fp32", "bf16", 1, bias="bf16", **flags))
    for logits, bias in (("fp32", "bf16"), ("bf16", "bf16"), ("bf16", None)):  # the last from logits that are ready
        flags = drpo | full | {"HAS_BIAS": bias is not None, "KL": KL_ESTIMATORS["k3"].twin}
        label = f"drpo two reads {logits} {'bias ' if bias else ''}softcap"
        cases.extend(_row_cases(label, kernels.policy_kernel, logits, "bf16", 1, bias=bias, **flags))
    entropy = {"HAS_ENTROPY": True, "HAS_Z_LOSS": True}
    for z_loss in (False, True):
        label = f"fp32>bf16, {'z-loss' if z_loss else 'log-probs'} alone"
        alone = {"HAS_ENTROPY": False, "HAS_Z_LOSS": z_loss}
        cases.extend(_row_cases(label, kernels.gradient_kernel, "fp32", "bf16", **alone, **plain))
    for term, flag in (("z-loss", "HAS_Z_LOSS"), ("entropy bonus", "HAS_ENTROPY")):
        cases.extend(
            _row_cases(f"drpo {term}", kernels.policy_kernel, "fp32", "bf16", 1, **drpo | plain | {flag: True})
        )
    for logits, out in (("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")):
        cases.extend(_row_cases(logits, kernels.statistics_kernel, logits, out, **plain))
        cases.extend(_row_cases(f"{logits}>{out}", kernels.gradient_kernel, logits, out, **entropy, **plain))
    cases.extend(_row_cases("bias softcap", kernels.statistics_kernel, "fp32", "bf16", bias="bf16", **full))
    cases.extend(_row_cases("bias softcap", kernels.gradient_kernel, "fp32", "bf16", bias="bf16", **entropy, **full))
    return [*cases, *_scale_cases(), *_token_cases(), *invariant_cases(), *sparse_cases()]


def _scale_cases() -> Iterator[KernelCase]:
    """A gradient of more than 2^31 elements, in the dtypes it waits in for the upstream factor."""
    for values in ("bf16", "fp32"):
        for vendor, device in ROW_DEVICES.items():
            tile = row_tile(VOCAB, BYTES[values], device)
            elements = tile.block // (tile.num_warps * device.warp_size)
            yield KernelCase(
                name=f"scale[{values}]",
                kernel=kernels.scale_kernel,
                signature={"values": f"*{values}", "count": "i64", "factor": "*fp32", "BLOCK": "constexpr"},
                constexprs={"BLOCK": tile.block},
                divisible=("values", "count", "factor"),
                num_warps=tile.num_warps,
                options=LAUNCH_OPTIONS,
                targets=(vendor,),
                expected=Expected(128, 128, elements * BYTES[values], element_bytes=BYTES[values]),
            )


def _token_cases() -> Iterator[KernelCase]:
    """The kernels of [N]: losses between two kernels, and a batch's metrics."""
    types = STRIDES | dict.fromkeys((*PACKED, "values"), "*fp32")
    types |= {"count": "i32", "hyper": ("fp32",), "kl_cap": "fp32"}
    types |= {"valid": "*u8", "unscorable": "*u8", "given": "*fp32", "counts": "*i64"}
    terms = {"OBJECTIVE": DRPO().twin, "KL": KL_ESTIMATORS["k3"].twin, "KL_IMPORTANCE": True}
    terms |= {"HAS_ENTROPY": True, "HAS_Z_LOSS": True}
    clips = {"CLIPS": metrics.WEIGHT_CLIPS, "UNCLIPPED": metrics.UNCLIPPED, "FAR_BELOW": metrics.FAR_BELOW}
    clips |= {"FAR_BELOW_ONE": FAR_BELOW_ONE, "LEAST": LEAST_LOGPROB, "VALUES": metrics.MEASURES + 1}
    clips |= {"KL": KL_ESTIMATORS["k3"].twin}
    for vendor in ROW_DEVICES:
        for label, kernel, values, block in (
            ("losses[drpo k3 entropy z-loss]", kernels.losses_kernel, terms, LOSSES_BLOCK),
            ("policy_metrics", metrics.policy_metrics_kernel, clips, METRICS_BLOCK),
        ):
            tile = RowTile(block, block // 32)
            yield _case(label, kernel, types, values | {"BLOCK": block}, vendor, tile, (), Expected())


# --- sparse gradients -------------------------------------------------------------------------------------------------


def sparse_cases() -> Iterator[KernelCase]:
    """The selection of a row's entries, and the sums of the rows they name."""
    limit = entry_limit(VOCAB, "cuda")
    strides = {"row_stride": "i64", "column_stride": "constexpr", "rows_stride": "i64", "statistics_stride": "i64"}
    for logits, bias in (("fp32", None), ("bf16", None), ("fp32", "bf16")):
        types = strides | dict.fromkeys(("rows", "statistics", "shares", "left_out"), "*fp32")
        types |= {"logits": f"*{logits}", "bias": f"*{bias}" if bias else "constexpr", "vocab": "i32", "limit": "i32"}
        types |= {"targets": "*i64", "columns": "*i32", "counts": "*i64"}
        types |= dict.fromkeys(("scale", "softcap", "tolerance", "most_entropy"), "fp32")
        for vendor, device in ROW_DEVICES.items():
            tile, loaded = select_tile(VOCAB, BYTES[logits], device), BYTES[logits] + BYTES[bias]
            values = {"column_stride": 1, "BLOCK": tile.block, "CAPACITY": entry_capacity(limit)}
            values |= {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": bias is not None} | ({} if bias else {"bias": None})
            yield _case(
                f"select[{logits}{' bias softcap' if bias else ''}]", sparse.select_kernel, types, values, vendor, tile,
                ("logits", "bias", "row_stride", "vocab"),
                # four columns a thread, or eight of 16 bits; under Triton 3.6 a word may wait on sm_100
                Expected(64 if bias else 128, 0, 4 * (4 + BYTES[bias]), local_bytes=16, element_bytes=loaded),
            )  # fmt: skip
    types = dict.fromkeys(("index", "offsets", "places"), "*i64") | {"width": "i32", "column_stride": "constexpr"}
    types |= dict.fromkeys(("factors", "base_factors", "base"), "*fp32")
    types |= dict.fromkeys(("row_stride", "out_stride"), "i64")
    for table, out, based in (("bf16", "bf16", True), ("bf16", "fp32", False), ("fp32", "fp32", False)):
        for vendor in ROW_DEVICES:
            tile = gather_tile(4096)
            values = {"column_stride": 1, "ROUNDED": COMPUTE[table], "HAS_BASE": based, "ROWS": tile.rows}
            values |= {"COLUMNS": tile.columns} | ({} if based else {"base": None, "base_factors": None})
            yield _case(
                f"gathered_sums[{table}>{out}{' base' if based else ''}]", sparse.gathered_sums_kernel,
                types | {"table": f"*{table}", "out": f"*{out}"}, values, vendor, tile,
                ("table", "out", "base", "row_stride", "out_stride", "width"), Expected(),
            )  # fmt: skip
    strides = ("left_stride", "right_stride")
    types = {"width": "i32", "out": "*fp32"} | dict.fromkeys(strides, "i64")
    types |= dict.fromkeys(("left_index", "right_index"), "*i64")
    for table in ("bf16", "fp32"):
        for vendor in ROW_DEVICES:
            tile = gather_tile(4096)
            values = {"left_column_stride": 1, "right_column_stride": 1, "ROUNDED": COMPUTE[table]}
            yield _case(
                f"gathered_dots[{table}]", sparse.gathered_dots_kernel,
                types | {"left": f"*{table}", "right": f"*{table}"}, values | {"COLUMNS": tile.columns}, vendor, tile,
                ("left", "right", *strides, "width"), Expected(),
            )  # fmt: skip


def _case(
    label: str, kernel: Any, types: dict, values: dict, vendor: str, tile: Any, divisible: tuple, expected: Expected
) -> KernelCase:
    """A launch whose constants are `values`."""
    names = kernel.arg_names
    return KernelCase(
        name=label,
        kernel=kernel,
        signature={name: "constexpr" if name in values else types[name] for name in names},
        constexprs={name: values[name] for name in names if name in values},
        divisible=tuple(name for name in divisible if name in names and name not in values),
        num_warps=tile.num_warps,
        options=LAUNCH_OPTIONS,
        targets=(vendor,),
        expected=expected,
    )


# --- the fixed-order products -----------------------------------------------------------------------------------------

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
        *_products("dX", "bf16", "bf16", "bf16"),
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
            expected=Expected(load_bits=128),
        ),
    ]


def _products(
    product: str, a: str, b: str, out: str, accumulate: bool = False, even: bool = True
) -> Iterator[KernelCase]:
    """One of the three products, multiplied in the dtype of `a`: a case for each tile, and the targets that take it."""
    tiles: dict[tuple[MatmulTile, int], tuple[str, ...]] = {}
    for target, device in ARCHITECTURES.items():
        tile = matmul_tile(BYTES[a], max(BYTES[a], BYTES[b]), device, accumulates=product == "dW")
        chosen = tile, device.warp_size
        tiles[chosen] = (*tiles.get(chosen, ()), target)
    kernel = invariant.matmul_kernel
    strides = [name for name in kernel.arg_names if name.endswith("_stride")]
    types = {"a": f"*{a}", "b": f"*{b}", "out": f"*{out}"} | dict.fromkeys(strides, "i64")
    types |= dict.fromkeys(("rows", "columns", "padded", "depth"), "i32")
    unit = UNIT_STRIDES[product]
    divisible = tuple(name for name in ("a", "b", "out", "padded", *strides) if name not in unit)
    for (tile, warp_size), targets in tiles.items():
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
            expected=_expected_of(tile, warp_size, a, b, out, accumulate),
        )


def _expected_of(tile: MatmulTile, warp_size: int, a: str, b: str, out: str, accumulate: bool) -> Expected:
    if warp_size == 64:
        # an MFMA leaves four consecutive results in a lane; and LLVM unrolls the loop, by a factor that is not told
        return Expected(128, min(128, 4 * 8 * BYTES[out]))
    loaded = tile.depth * (tile.rows * BYTES[a] + tile.columns * BYTES[b])
    waiting = 16 if accumulate else 0  # Triton 3.4: two addresses of the totals, during the loop
    return Expected(128, 128, loaded // (tile.num_warps * warp_size), local_bytes=waiting)
