"""`python -m launch_worker GROUP` runs calls of launch_cases.py through Triton's JIT and launcher, as on an sm_90.

The driver is stub_driver.c, and the tensors are on the CPU. The worker prints "call ..." before a call and "asked ..."
before a launch, and the driver prints "launched ...".
"""

import sys

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

import launch_cases
from drpo_kernels import autograd, backends
from drpo_kernels.backends import devices, fp8_head, matmul, sweep
from drpo_kernels.backends.sparse import triton_ops
from drpo_kernels.backends.sparse.torch_ops import TorchEntries
from drpo_kernels.backends.torch_rows import TorchRows
from drpo_kernels.backends.triton import invariant, launch


class Driver(nvidia.CudaDriver):
    """This is Triton's driver of a device that PyTorch does not know."""

    def __init__(self):
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: 0
        self.get_current_stream = self.set_current_device = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class LaunchedRows(launch.TritonRows):
    """A launch computes nothing here, so PyTorch computes the values that decide on further launches."""

    def statistics(self, batch):
        super().statistics(batch)
        return TorchRows().statistics(batch)


class LaunchedEntries(LaunchedRows, triton_ops.TritonEntries):
    def select(self, batch, statistics, tolerance, limit):
        super().select(batch, statistics, tolerance, limit)
        return TorchEntries().select(batch, statistics, tolerance, limit)


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """Multiply as `matmul.product` does on a GPU, where 16-bit operands give float32."""
    assert a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32)
    total = a.float() @ b.float()
    out.copy_(out + total if accumulate else total)


def pretend() -> None:
    """Make CPU tensors take the route of CUDA tensors."""
    triton.runtime.driver.set_active(Driver())
    backends._triton_obstacle = lambda device, dtype: None
    for module in (launch, invariant, sweep):
        module.device_properties = lambda device: devices.PRESETS["h100"]
    matmul.float32_outputs = fp8_head.float32_outputs = lambda device, dtype: (True, True)
    matmul.product = fp8_head.product = product
    launch.TritonRows, triton_ops.TritonEntries = LaunchedRows, LaunchedEntries
    autograd.row_ops = lambda name: LaunchedRows()
    # A launch writes nothing here, but counts are read back, so new tensors must be 0.
    torch.empty, torch.Tensor.new_empty = torch.zeros, torch.Tensor.new_zeros
    run = JITFunction.run

    def asked(self, *arguments, **options):
        print("asked", self.fn.__name__, flush=True)
        return run(self, *arguments, **options)

    JITFunction.run = asked


if __name__ == "__main__":
    pretend()
    for label, call in launch_cases.GROUPS[sys.argv[1]]():
        print("call", label, flush=True)
        call()
