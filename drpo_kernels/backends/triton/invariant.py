"""The head's products with additions in one fixed order, for `batch_invariant` of the linear functions.

A general GEMM library picks its tiles, and whether to split the inner sum, from the number of rows, so a row's logits
depend on how many rows stand beside it. Here an element of a product is one chain of additions in ascending order along
the inner dimension, in steps of `MatmulTile.depth`, by one program. The tile is chosen from the dtype and the device
alone. The number of rows and a row's place decide which program computes an element and how wide its loads are. They do
not decide the order.
"""

import torch
from torch import Tensor

from drpo_kernels.backends.devices import device_properties
from drpo_kernels.backends.triton.launch import LAUNCH_OPTIONS, TRITON_TYPES, on_device
from drpo_kernels.backends.triton.softmax import Matrix
from drpo_kernels.backends.triton.tiles import MatmulTile, matmul_tile
from drpo_kernels.triton_support import INTERPRETING, jit, tl, triton

# In the interpreter tl.dot multiplies the bits of 16-bit operands, and NumPy adds in an order that follows a row's
# place in the tile.
INTERPRETED = tl.constexpr(INTERPRETING)
# The interpreter truncates to bf16, and the hardware rounds.
TRUNCATES = INTERPRETING
# A load may take so many consecutive elements, and so read past an edge. `LinearSweep` pads the rows of its buffers to
# a multiple of it.
VECTOR = tl.constexpr(16)
COLUMN_BLOCK = 256


@jit
def multiply_add(a, b, total, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr):
    """total + a @ b in fp32. b is rounded to ROUNDED, then both are multiplied in COMPUTE, and fp32 without TF32."""
    a = a.to(COMPUTE)
    b = b.to(ROUNDED).to(COMPUTE)
    if INTERPRETED:
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def readable(index, size):
    """The index, or 0 where it is beyond `size`; results there are not stored. A mask would make loads narrow."""
    return tl.max_contiguous(tl.multiple_of(tl.where(index < size, index, 0), VECTOR), VECTOR).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "depth"])  # one binary for every number of rows
def matmul_kernel(
    a: Matrix, b: Matrix, out: Matrix, rows, columns, padded, depth, ROUNDED: tl.constexpr, COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, columns] = a [rows, depth] @ b [depth, columns], or += with ACCUMULATE (fp32 `out`).

    a and b are fp32, bf16 or fp16 with any strides, and out is contiguous along a row. b is rounded to ROUNDED, and
    both are multiplied in COMPUTE. An element has one fp32 total, which is added to in ascending order of depth,
    BLOCK_DEPTH at a time, and rounded to out's dtype at the end. Continuing from an fp32 `out` after a multiple of
    BLOCK_DEPTH gives the bits of one pass. Columns [columns, padded) of `out` get anything. One program computes one
    tile; GROUP tiles of rows share a tile of columns while it is in L2.
    """
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    group = GROUP * tl.cdiv(columns, BLOCK_COLUMNS)
    first = tl.program_id(0) // group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    within = tl.program_id(0) % group
    row = (first + within % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = within // height * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_DEPTH).to(tl.int64)
    a_block = a.data + readable(row, rows)[:, None] * a.row_stride + k[None, :] * a.column_stride
    b_block = b.data + k[:, None] * b.row_stride + readable(column, columns)[None, :] * b.column_stride
    step = tl.full((), BLOCK_DEPTH, tl.int64)  # BLOCK_DEPTH times an int32 stride may not be an int32
    out_block = out.data + row.to(tl.int64)[:, None] * out.row_stride + column[None, :]
    stored = (row < rows)[:, None] & (column < padded)[None, :]
    if ACCUMULATE:
        total = tl.load(out_block, mask=stored, other=0.0)
    else:
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    whole = depth // BLOCK_DEPTH * BLOCK_DEPTH  # read without a mask, so that loads are wide for any depth
    for _ in range(0, whole, BLOCK_DEPTH):
        total = multiply_add(tl.load(a_block), tl.load(b_block), total, ROUNDED, COMPUTE)
        a_block += step * a.column_stride
        b_block += step * b.row_stride
    if whole < depth:
        inside = k < depth - whole
        tail = tl.load(a_block, mask=inside[None, :], other=0.0)
        total = multiply_add(tail, tl.load(b_block, mask=inside[:, None], other=0.0), total, ROUNDED, COMPUTE)
    tl.store(out_block, total.to(out.data.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def column_sum_kernel(
    x, row_stride, out, rows, columns,
    ACCUMULATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [columns] fp32 = Σ_rows x [rows, columns], or += with ACCUMULATE. BLOCK_ROWS rows are added at a time."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    stored = column < columns
    if ACCUMULATE:
        total = tl.load(out + column, mask=stored, other=0.0)
    else:
        total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & stored[None, :]
        values = tl.load(x + row.to(tl.int64)[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    tl.store(out + column, total, mask=stored)


class InvariantMatmul:
    """A `HeadMatmul` in which a row's logits and dX do not depend on other rows, and dW and db not on the chunks.

    Chunks that start at multiples of `row_multiple` leave dW and db as one chunk would. float16 dlogits would need a
    scale that depends on all rows of a chunk, so dlogits and their products are float32.
    """

    def __init__(self, weight: Tensor, compute_dtype: torch.dtype):
        if TRUNCATES and compute_dtype == torch.bfloat16:
            weight = weight.to(compute_dtype)
        self.weight, self.compute_dtype, self.accumulator = weight, compute_dtype, torch.float32
        self.operand_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.hidden_gradient_dtypes: tuple[torch.dtype, ...] = (self.accumulator, self.operand_dtype)
        self.row_multiple = self._tile(self.operand_dtype, self.operand_dtype, accumulates=True).depth

    def operand(self, x: Tensor) -> Tensor:
        return x.to(self.compute_dtype)

    def cast_bytes(self, dtype: torch.dtype) -> int:
        return self.compute_dtype.itemsize if dtype != self.compute_dtype else 0

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """out [n, V] = hidden [n, H] @ weight.T, rounded once to out's dtype."""
        tile = self._tile(self.compute_dtype, self.weight.dtype)
        return self._product(hidden, self.weight.T, out, self.compute_dtype, tile)

    def hidden_gradient(self, dlogits: Tensor, out: Tensor) -> None:
        """out [n, H] = dlogits [n, V] @ weight, rounded once to out's dtype."""
        tile = self._tile(self.operand_dtype, self.weight.dtype)
        self._product(dlogits, self.weight, out, self.operand_dtype, tile)

    def add_weight_gradient(
        self, dlogits: Tensor, hidden: Tensor, out: Tensor, first: bool, unscale: Tensor | None
    ) -> None:
        """out [V, H] += dlogits.T @ hidden, or = for the first chunk. `unscale` is None, because nothing was scaled."""
        assert unscale is None
        tile = self._tile(self.operand_dtype, self.operand_dtype, accumulates=True)
        self._product(dlogits.T, hidden, out, self.operand_dtype, tile, accumulate=not first)

    def add_bias_gradient(self, dlogits: Tensor, out: Tensor, first: bool, unscale: Tensor | None) -> None:
        """out [V] += Σ_rows dlogits [n, V], or = for the first chunk."""
        assert unscale is None
        rows, columns = dlogits.shape
        with on_device(dlogits):
            column_sum_kernel[(triton.cdiv(columns, COLUMN_BLOCK),)](
                dlogits, dlogits.stride(0), out, rows, columns,
                ACCUMULATE=not first, BLOCK_ROWS=self.row_multiple, BLOCK_COLUMNS=COLUMN_BLOCK,
                **LAUNCH_OPTIONS,
            )  # fmt: skip

    def _tile(self, compute: torch.dtype, stored: torch.dtype, accumulates: bool = False) -> MatmulTile:
        widest = max(stored.itemsize, compute.itemsize)
        device = device_properties(self.weight.device)
        return matmul_tile(compute.itemsize, widest, device, accumulates=accumulates)

    def _product(
        self, a: Tensor, b: Tensor, out: Tensor, compute: torch.dtype, tile: MatmulTile, accumulate: bool = False
    ) -> Tensor:
        """out = a @ b, or out += a @ b; out's last axis is contiguous, and what lies between its rows is padding."""
        if TRUNCATES and out.dtype == torch.bfloat16:
            return out.copy_(self._product(a, b, torch.empty_like(out, dtype=torch.float32), compute, tile))
        (rows, depth), columns = a.shape, b.shape[1]
        # Padding keeps stores wide for an odd vocabulary. The stride of a single row promises no memory behind it.
        padded = min(triton.cdiv(columns, VECTOR.value) * VECTOR.value, out.stride(0)) if rows > 1 else columns
        with on_device(a):
            matmul_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
                Matrix(a, *a.stride()), Matrix(b, *b.stride()), Matrix(out, out.stride(0), 1), rows, columns, padded,
                depth, ROUNDED=TRITON_TYPES[self.compute_dtype], COMPUTE=TRITON_TYPES[compute],
                ACCUMULATE=accumulate, BLOCK_ROWS=tile.rows, BLOCK_COLUMNS=tile.columns, BLOCK_DEPTH=tile.depth,
                GROUP=tile.group, num_warps=tile.num_warps, num_stages=tile.num_stages, **LAUNCH_OPTIONS,
            )  # fmt: skip
        return out
