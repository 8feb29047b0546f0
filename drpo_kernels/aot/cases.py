"""What to compile ahead of time: every kernel with representative argument types, for GPUs that need not be there.

`python -m drpo_kernels compile` compiles each case for each target and fails where the binary is not what is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypedDict

from drpo_kernels import metrics
from drpo_kernels.aot.case import ArgumentType, Bounds, Expected, KernelCase, places
from drpo_kernels.backends.devices import ARCHITECTURES, PRESETS
from drpo_kernels.backends.sparse import kernels as sparse
from drpo_kernels.backends.sparse.contract import entry_limit
from drpo_kernels.backends.sparse.triton_ops import entry_capacity, gather_tile, select_tile
from drpo_kernels.backends.triton import invariant, kernels
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS, LOSSES_BLOCK, METRICS_BLOCK
from drpo_kernels.backends.triton.tiles import MatmulTile, matmul_tile, row_tile
from drpo_kernels.kl import KL_ESTIMATORS
from drpo_kernels.objective import Objective, built_in_objectives
from drpo_kernels.objectives import DPPO, DRPO, PolicyGradient
from drpo_kernels.triton_support import tl

VOCAB = 151936  # Qwen3's: the row the tiles are chosen for
# the device whose row tiles are compiled for the targets whose names begin so
ROW_DEVICES = {
    "sm_8": PRESETS["a100"], "sm_9": PRESETS["h100"], "sm_10": PRESETS["b200"], "sm_12": ARCHITECTURES["sm_120"],
    "gfx": PRESETS["mi300x"],
}  # fmt: skip

BYTES = {None: 0, "bf16": 2, "fp16": 2, "fp32": 4}
# the types of those arguments whose type is the same in every case
TYPES: dict[str, ArgumentType] = {
    "targets": "*i64", "count": "i32", "logits.row_stride": "i64", "logits.vocab": "i32", "logits.scale": "fp32",
    "logits.softcap": "fp32", "out.row_stride": "i64", "out.padded": "i32", "terms.kl_cap": "fp32",
    "rows": "*fp32", "rows_stride": "i64", "outcome": "*fp32", "outcome_stride": "i64", "statistics": "*fp32",
    "statistics_stride": "i64", "slopes": "*fp32", "slopes_stride": "i64", "factors": "*fp32",
}  # fmt: skip
# what the launcher sees as multiples of 16: of the row kernels where 16 divides the vocabulary, and of gathered rows
DIVISIBLE = (
    "logits.data", "logits.bias", "logits.row_stride", "logits.vocab", "out.data", "out.row_stride", "out.padded",
)  # fmt: skip
GATHERED = (
    "table.data", "table.row_stride", "left.data", "left.row_stride", "right.data", "right.row_stride", "out",
    "out_stride", "base", "width",
)  # fmt: skip
# for an objective with several twins: the settings that choose each of them
OTHER_TWINS: dict[type[Objective], tuple[dict[str, Any], ...]] = {
    DPPO: ({"divergence": "tv"}, {"divergence": "kl"}),
    PolicyGradient: ({}, {"ratio_cap": 1.25}),
}

# What a row kernel may take: the first entry that its case's name begins with. Each is the most that Triton 3.4 to 3.9
# give, instructions rounded up to a half.
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
    "statistics[bias softcap]": Bounds(reading=43, special=3, registers=96),
}


def _bounds(name: str) -> Bounds:
    for start, bounds in BOUNDS.items():
        if name.startswith(start):
            return bounds
    raise ValueError(f"{name}: no entry of BOUNDS fits this row kernel")


class LossTerms(TypedDict):
    """The fields of `kernels.LossTerms` but for `kl_cap`."""

    objective: Callable | None
    hyper: tuple[float, ...]
    kl: Callable | None
    kl_importance: bool
    entropy_bonus: bool
    z_loss: bool


def _row_cases(
    label: str,
    kernel: Any,
    logits: str,
    out: str | None = None,
    bias: str | None = None,
    softcap: bool = False,
    even: bool = True,
    factored: bool = False,
    terms: LossTerms | None = None,
    flags: Mapping[str, object] = {},
) -> Iterator[KernelCase]:
    """Launches on contiguous rows, whose stride of 1 and whose absent pointers are constants to the JIT.

    `out` is the gradient's dtype, or None where none is written; `even` says that 16 divides the vocabulary.
    """
    name = f"{kernel.__name__.removesuffix('_kernel')}[{label}]"
    values: dict[str, object] = {"logits.column_stride": 1, "order": None, **flags}
    types = {**TYPES, "logits.data": f"*{logits}", "logits.bias": f"*{bias}", "out.data": f"*{out}"}
    values |= {} if bias else {"logits.bias": None}
    values |= {} if softcap else {"logits.softcap": None}
    values |= {} if factored else {"factors": None}
    values |= {} if out else {"out": None}
    if terms is not None:
        types["terms.hyper"] = ("fp32",) * len(terms["hyper"])
        values |= {f"terms.{field}": value for field, value in terms.items() if field != "hyper"}
    divisible = DIVISIBLE if even else tuple(x for x in DIVISIBLE if x not in ("logits.vocab", "out.padded"))
    loaded = BYTES[logits] + BYTES[bias]
    # a few values of the row wait while its loops run; none do where every call goes
    local_bytes = 64 if softcap else 0 if even and factored else 16
    for vendor, device in ROW_DEVICES.items():
        tile = row_tile(VOCAB, BYTES[logits], device)
        elements = tile.block // (tile.num_warps * device.warp_size)
        # on AMD each element of a tail may have a branch of its own, which looks like a loop
        tails = 0 if even else 1 if vendor.startswith("sm_") else 16
        expected = Expected(
            128, 128 if out else 0, elements * loaded, tails, local_bytes, element_bytes=loaded, bounds=_bounds(name)
        )
        launch = tile.launch_options(bias is not None)
        yield _case(name, kernel, types, values | {"BLOCK": tile.block}, (vendor,), launch, divisible, expected)


def twin_objectives() -> Iterator[Objective]:
    """The built-in objectives with a Triton twin, once for each twin."""
    for cls in built_in_objectives():
        for settings in OTHER_TWINS.get(cls, ({},)):
            if cls(**settings).twin is not None:
                yield cls(**settings)


def _terms(objective: Objective, kl: str | None = None, kl_importance: bool = False, entropy_bonus: bool = False,
           z_loss: bool = False) -> LossTerms:  # fmt: skip
    return {
        "objective": objective.twin, "hyper": objective.hyper, "kl": None if kl is None else KL_ESTIMATORS[kl].twin,
        "kl_importance": kl_importance, "entropy_bonus": entropy_bonus, "z_loss": z_loss,
    }  # fmt: skip


def kernel_cases() -> list[KernelCase]:
    """Every kernel of this backend, in the specialisations its launchers ask for."""
    row_cases = (*_policy_cases(), *_two_kernel_cases())
    return [*row_cases, *_scale_cases(), *_token_cases(), *invariant_cases(), *sparse_cases()]


def _policy_cases() -> Iterator[KernelCase]:
    def cases(label: str, logits: str, out: str | None, terms: LossTerms, **options) -> Iterator[KernelCase]:
        flags = {"FROM_ROLLOUT": True}
        yield from _row_cases(label, kernels.policy_kernel, logits, out, terms=terms, flags=flags, **options)

    for objective in twin_objectives():
        assert objective.twin is not None
        label = f"{objective.twin.__name__} fp32>bf16"
        yield from cases(label, "fp32", "bf16", _terms(objective), factored=True)
    drpo = DRPO()
    capped: dict[str, Any] = {"bias": "bf16", "softcap": True}
    for logits, out in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32")):
        yield from cases(f"drpo {logits}>{out}", logits, out, _terms(drpo))
    yield from cases("drpo odd vocabulary", "fp32", "bf16", _terms(drpo), even=False, factored=True)
    yield from cases("drpo one read k3 bias softcap", "fp32", "bf16", _terms(drpo, "k3"), factored=True, **capped)
    yield from cases("drpo forward", "fp32", None, _terms(drpo))
    for name in KL_ESTIMATORS:
        terms = _terms(drpo, name, kl_importance=True, entropy_bonus=True, z_loss=True)
        yield from cases(f"drpo {name} entropy z-loss bias softcap", "fp32", "bf16", terms, **capped)
    for logits, bias in (("fp32", "bf16"), ("bf16", "bf16"), ("bf16", None)):  # the last from logits that are ready
        label = f"drpo two reads {logits} {'bias ' if bias else ''}softcap"
        yield from cases(label, logits, "bf16", _terms(drpo, "k3"), bias=bias, softcap=True)
    yield from cases("drpo z-loss", "fp32", "bf16", _terms(drpo, z_loss=True))
    yield from cases("drpo entropy bonus", "fp32", "bf16", _terms(drpo, entropy_bonus=True))


def _two_kernel_cases() -> Iterator[KernelCase]:
    """Statistics, and the gradient from them."""
    statistics, gradient = kernels.statistics_kernel, kernels.gradient_kernel
    every = {"HAS_ENTROPY": True, "HAS_Z_LOSS": True}
    for label, z_loss in (("log-probs", False), ("z-loss", True)):
        flags = {"HAS_ENTROPY": False, "HAS_Z_LOSS": z_loss}
        yield from _row_cases(f"fp32>bf16, {label} alone", gradient, "fp32", "bf16", flags=flags)
    for logits, out in (("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16")):
        yield from _row_cases(logits, statistics, logits)
        yield from _row_cases(f"{logits}>{out}", gradient, logits, out, flags=every)
    yield from _row_cases("bias softcap", statistics, "fp32", bias="bf16", softcap=True)
    yield from _row_cases("bias softcap", gradient, "fp32", "bf16", bias="bf16", softcap=True, flags=every)


def _scale_cases() -> Iterator[KernelCase]:
    """A gradient of more than 2^31 elements, in the dtypes it waits in for the upstream factor."""
    for values in ("bf16", "fp32"):
        for vendor, device in ROW_DEVICES.items():
            tile = row_tile(VOCAB, BYTES[values], device)
            elements = tile.block // (tile.num_warps * device.warp_size)
            types = {"values": f"*{values}", "count": "i64", "factor": "*fp32"}
            expected = Expected(128, 128, elements * BYTES[values], element_bytes=BYTES[values])
            yield _case(
                f"scale[{values}]", kernels.scale_kernel, types, {"BLOCK": tile.block}, (vendor,),
                {"num_warps": tile.num_warps}, types, expected,
            )  # fmt: skip


def _token_cases() -> Iterator[KernelCase]:
    """The kernels of [N]: losses between two kernels, and a batch's metrics."""
    losses = _terms(DRPO(), "k3", kl_importance=True, entropy_bonus=True, z_loss=True)
    types = {**TYPES, "terms.hyper": ("fp32",) * len(losses["hyper"]), "values": "*fp32"}
    types |= {"valid": "*u8", "unscorable": "*u8", "given": "*fp32", "counts": "*i64"}
    terms = {f"terms.{name}": value for name, value in losses.items() if name != "hyper"}
    measured: dict[str, object] = {f"terms.{name}": value for name, value in metrics.metric_constants(DPPO()).items()}
    measured["terms.kl"] = KL_ESTIMATORS["k3"].twin
    for label, kernel, values, block in (
        ("losses[drpo k3 entropy z-loss]", kernels.losses_kernel, terms, LOSSES_BLOCK),
        ("policy_metrics", metrics.policy_metrics_kernel, measured, METRICS_BLOCK),
    ):
        yield _case(label, kernel, types, values | {"BLOCK": block}, (), {"num_warps": block // 32})


# --- some entries of a row --------------------------------------------------------------------------------------------


def sparse_cases() -> Iterator[KernelCase]:
    """The selection of a row's entries, the sums of the rows they name, and dot products of such rows."""
    limit = entry_limit(VOCAB, "cuda")
    for logits, bias in (("fp32", None), ("bf16", None), ("fp32", "bf16")):
        types = {**TYPES, "logits.data": f"*{logits}", "logits.bias": f"*{bias}", "limit": "i32", "tolerance": "fp32"}
        types |= {"most_entropy": "fp32", "out.columns": "*i32", "out.shares": "*fp32", "out.counts": "*i64"}
        types |= {"out.left_out": "*fp32"}
        for vendor, device in ROW_DEVICES.items():
            tile, loaded = select_tile(VOCAB, BYTES[logits], device), BYTES[logits] + BYTES[bias]
            values: dict[str, object] = {"logits.column_stride": 1, "BLOCK": tile.block}
            values |= {"CAPACITY": entry_capacity(limit)}
            values |= {} if bias else {"logits.bias": None, "logits.softcap": None}
            # four columns a thread, or eight of 16 bits; under Triton 3.6 a word may wait on sm_100
            expected = Expected(64 if bias else 128, 0, 4 * (4 + BYTES[bias]), local_bytes=16, element_bytes=loaded)
            yield _case(
                f"select[{logits}{' bias softcap' if bias else ''}]", sparse.select_kernel, types, values, (vendor,),
                {"num_warps": tile.num_warps}, DIVISIBLE, expected,
            )  # fmt: skip
    gather = gather_tile(4096)
    launch = {"num_warps": gather.num_warps}
    sums = dict.fromkeys(("index", "offsets", "places", "left_index", "right_index"), "*i64") | {"width": "i32"}
    sums |= dict.fromkeys(("factors", "base_factors", "base"), "*fp32")
    sums |= dict.fromkeys(("table.row_stride", "left.row_stride", "right.row_stride", "out_stride"), "i64")
    unit = dict.fromkeys(("table.column_stride", "left.column_stride", "right.column_stride"), 1)
    for table, out, based in (("bf16", "bf16", True), ("bf16", "fp32", False), ("fp32", "fp32", False)):
        values = {**unit, "ROUNDED": COMPUTE[table], "ROWS": gather.rows, "COLUMNS": gather.columns}
        values |= {} if based else {"base": None, "base_factors": None}
        tables = {"table.data": f"*{table}", "out": f"*{out}"}
        label = f"gathered_sums[{table}>{out}{' base' if based else ''}]"
        yield _case(label, sparse.gathered_sums_kernel, sums | tables, values, (), launch, GATHERED)
    for table in ("bf16", "fp32"):
        values = {**unit, "ROUNDED": COMPUTE[table], "COLUMNS": gather.columns}
        tables = {"left.data": f"*{table}", "right.data": f"*{table}", "out": "*fp32"}
        label = f"gathered_dots[{table}]"
        yield _case(label, sparse.gathered_dots_kernel, sums | tables, values, (), launch, GATHERED)


def _case(
    label: str,
    kernel: Any,
    types: Mapping[str, ArgumentType],
    values: Mapping[str, object],
    targets: tuple[str, ...],
    launch: Mapping[str, int],
    divisible: Collection[str] = (),
    expected: Expected = KernelCase.expected,
) -> KernelCase:
    """A launch whose constants are `values`. Of types, values and divisible names the kernel's own are taken."""
    names = places(kernel, values)
    return KernelCase(
        name=label,
        kernel=kernel,
        signature={name: "constexpr" if name in values else types[name] for name in names},
        constexprs={name: values[name] for name in names if name in values},
        divisible=tuple(name for name in names if name in divisible and name not in values),
        num_warps=launch["num_warps"],
        num_stages=launch.get("num_stages", KernelCase.num_stages),
        options=LAUNCH_OPTIONS | {name: launch[name] for name in launch if not name.startswith("num_")},
        targets=targets,
        expected=expected,
    )


# --- the fixed-order products -----------------------------------------------------------------------------------------

COMPUTE = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# by product: the strides that are 1
UNIT_STRIDES = {
    "logits": ("a.column_stride", "b.row_stride"),
    "dX": ("a.column_stride", "b.column_stride"),
    "dW": ("a.row_stride", "b.column_stride"),
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
    types = {"x": "*bf16", "row_stride": "i64", "out": "*fp32", "rows": "i32", "columns": "i32"}
    values = {"ACCUMULATE": True, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": invariant.COLUMN_BLOCK}
    column_sum = _case(
        "column_sum[db bf16, next chunk]", invariant.column_sum_kernel, types, values, (), {"num_warps": 4},
        ("x", "row_stride", "out", "columns"), Expected(load_bits=128),
    )  # fmt: skip
    return [*cases, column_sum]


def _products(
    product: str, a: str, b: str, out: str, accumulate: bool = False, even: bool = True
) -> Iterator[KernelCase]:
    """One of the three products, multiplied in the dtype of `a`: a case for each tile, and the targets that take it."""
    tiles: dict[tuple[MatmulTile, int], tuple[str, ...]] = {}
    for target, device in ARCHITECTURES.items():
        tile = matmul_tile(BYTES[a], max(BYTES[a], BYTES[b]), device, accumulates=product == "dW")
        chosen = tile, device.warp_size
        tiles[chosen] = (*tiles.get(chosen, ()), target)
    strides = [f"{matrix}.{side}_stride" for matrix in ("a", "b") for side in ("row", "column")] + ["out.row_stride"]
    types = {"a.data": f"*{a}", "b.data": f"*{b}", "out.data": f"*{out}"} | dict.fromkeys(strides, "i64")
    types |= dict.fromkeys(("rows", "columns", "padded", "depth"), "i32")
    divisible = ("a.data", "b.data", "out.data", "padded", *strides, *(["columns"] if even else []))
    label = f"{product} {a}" if a == b else f"{product} {a}·{b}"
    ending = f"{', next chunk' if accumulate else ''}{'' if even else ', odd vocabulary'}"
    for (tile, warp_size), targets in tiles.items():
        values = {"ROUNDED": COMPUTE[a], "COMPUTE": COMPUTE[a], "ACCUMULATE": accumulate, "GROUP": tile.group}
        values |= {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns, "BLOCK_DEPTH": tile.depth}
        values |= dict.fromkeys((*UNIT_STRIDES[product], "out.column_stride"), 1)
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        yield _case(
            f"matmul[{label}>{out} {tile.rows}x{tile.columns}x{tile.depth}{ending}]", invariant.matmul_kernel, types,
            values, targets, launch, divisible, _expected_of(tile, warp_size, a, b, out, accumulate),
        )  # fmt: skip


def _expected_of(tile: MatmulTile, warp_size: int, a: str, b: str, out: str, accumulate: bool) -> Expected:
    if warp_size == 64:
        # an MFMA leaves four consecutive results in a lane; and LLVM unrolls the loop, by a factor that is not told
        return Expected(128, min(128, 4 * 8 * BYTES[out]))
    loaded = tile.depth * (tile.rows * BYTES[a] + tile.columns * BYTES[b])
    waiting = 16 if accumulate else 0  # Triton 3.4: two addresses of the totals, during the loop
    return Expected(128, 128, loaded // (tile.num_warps * warp_size), local_bytes=waiting)
