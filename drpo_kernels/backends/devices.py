"""What a choice of tiles, chunks and buffers may depend on: a device's properties, read once or taken from a preset."""

import functools
from dataclasses import dataclass

import torch

MIB, GIB = 1 << 20, 1 << 30
LEAST_SHARED_MEMORY = 64 * 1024  # gfx942's; every GPU has as much


@dataclass(frozen=True)
class DeviceProperties:
    """One device. The bytes are of the whole device, but shared memory's are what one block may ask for."""

    name: str
    type: str  # of its torch.device: "cpu", "cuda" (ROCm too), "mps", ...
    multiprocessors: int = 0
    warp_size: int = 32
    shared_memory_bytes: int = LEAST_SHARED_MEMORY
    l2_bytes: int = 0
    memory_bytes: int = 0


def _nvidia(name: str, multiprocessors: int, shared: int, l2: int, memory: int) -> DeviceProperties:
    return DeviceProperties(f"NVIDIA {name}", "cuda", multiprocessors, 32, shared, l2 * MIB, memory * GIB)


# as their drivers report them, memory rounded to what is sold
PRESETS = {
    "cpu": DeviceProperties("a CPU", "cpu"),
    "a100": _nvidia("A100", 108, 166_912, 40, 80),
    "h100": _nvidia("H100", 132, 232_448, 50, 80),
    "h200": _nvidia("H200", 132, 232_448, 60, 141),
    "b200": _nvidia("B200", 148, 232_448, 126, 180),
    # an L2 for each of eight dies, a 256 MiB cache behind them
    "mi300x": DeviceProperties("AMD MI300X", "cuda", 304, 64, LEAST_SHARED_MEMORY, 4 * MIB, 192 * GIB),
}
# by the vendor's name of the architecture: what kernels are compiled for where there is no device
ARCHITECTURES = {
    "sm_80": PRESETS["a100"],
    "sm_90": PRESETS["h100"],
    "sm_100": PRESETS["b200"],
    "gfx942": PRESETS["mi300x"],
}
ARCHITECTURES |= {
    name: DeviceProperties(name, "cuda", shared_memory_bytes=101_376) for name in ("sm_86", "sm_89", "sm_120")
}


@functools.cache
def device_properties(device: torch.device) -> DeviceProperties:
    """Of a device that is there."""
    if device.type != "cuda":
        return DeviceProperties(device.type, device.type)
    found = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        found.name,
        device.type,
        found.multi_processor_count,
        found.warp_size,
        getattr(found, "shared_memory_per_block_optin", LEAST_SHARED_MEMORY),  # ROCm does not say
        found.L2_cache_size,
        found.total_memory,
    )
