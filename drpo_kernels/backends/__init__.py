"""The choice of the backend that runs the row operations."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from drpo_kernels.backends.matmul import HeadMatmul, HeadProducts
from drpo_kernels.backends.rows import RowOps
from drpo_kernels.triton_support import HAS_TRITON, INTERPRETING

if TYPE_CHECKING:
    from drpo_kernels.backends.triton.launch import TritonRows

BACKENDS = ("triton", "torch", "reference")


@dataclass(frozen=True)
class BackendChoice:
    """The backend a call runs on, and the reason in words."""

    name: str
    reason: str


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why Triton cannot run here, or None."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the inputs are float64"
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 runs kernels on CPU tensors only" if INTERPRETING else None
    if device.type == "cpu":
        return (
            None if INTERPRETING else "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before the import"
        )
    return f"the Triton kernels do not support device type {device.type!r}"


def choose_backend(
    requested: str | None, device: torch.device, dtype: torch.dtype, batch_invariant: bool = False
) -> BackendChoice:
    """The backend for tensors on `device` with the compute dtype `dtype`.

    None chooses Triton on CUDA and ROCm and chunked PyTorch elsewhere. `batch_invariant` exists only on Triton and
    chooses it everywhere. An explicit request is honoured or refused, never replaced. Raises ValueError for an unknown
    name and RuntimeError for a backend that cannot run here.
    """
    device = torch.device(device)
    if batch_invariant:
        if obstacle := _triton_obstacle(device, dtype):
            raise RuntimeError(f"batch_invariant=True needs backend 'triton', which cannot run: {obstacle}")
        return BackendChoice("triton", "batch_invariant is Triton's alone")
    if requested is None:
        if device.type == "cpu":
            return BackendChoice("torch", "chunked PyTorch is the default on a CPU")
        if obstacle := _triton_obstacle(device, dtype):
            return BackendChoice("torch", obstacle)
        return BackendChoice("triton", f"Triton is available for {device.type} tensors")
    if requested not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {requested!r}")
    if requested == "triton" and (obstacle := _triton_obstacle(device, dtype)):
        raise RuntimeError(f"backend='triton' cannot run: {obstacle}")
    return BackendChoice(requested, "requested")


@overload
def row_ops(name: Literal["triton"]) -> "TritonRows": ...
@overload
def row_ops(name: str) -> RowOps: ...
def row_ops(name: str) -> RowOps:
    if name == "triton":
        from drpo_kernels.backends.triton.launch import TritonRows

        return TritonRows()
    from drpo_kernels.backends.torch_rows import TorchRows

    return TorchRows()


def head_products(weight: Tensor, compute_dtype: torch.dtype, batch_invariant: bool) -> HeadProducts:
    if batch_invariant:
        from drpo_kernels.backends.triton.invariant import InvariantMatmul

        return InvariantMatmul(weight, compute_dtype)
    return HeadMatmul(weight, compute_dtype)
