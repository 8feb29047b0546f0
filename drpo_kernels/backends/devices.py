"""Properties of a device that the choice of tiles, chunks and buffers depends on: read once, or taken from a preset."""

import functools
from dataclasses import dataclass

import torch

MIB, GIB = 1 << 20, 1 << 30
LEAST_SHARED_MEMORY = 64 * 1024  # every GPU has at least this much, which is what gfx942 has


@dataclass(frozen=True)
class DeviceProperties:
    """One device, its name and its `torch.device.type`."""

    name: str
    type: str  # "cpu", "cuda" (ROCm too), "mps", ...
    multiprocessors: int = 0
    warp_size: int = 32
    shared_memory_bytes: int = LEAST_SHARED_MEMORY  # the most that one thread block may ask for
    l2_bytes: int = 0
    memory_bytes: int = 0


def _nvidia(name: str, multiprocessors: int, shared: int, l2: int, memory: int) -> DeviceProperties:
    return DeviceProperties(f"NVIDIA {name}", "cuda", multiprocessors, 32, shared, l2 * MIB, memory * GIB)


# The properties are as drivers report them; memory is rounded to the size that is sold.
PRESETS = {
    "cpu": DeviceProperties("a CPU", "cpu"),
    "a100": _nvidia("A100", 108, 166_912, 40, 80),
    "h100": _nvidia("H100", 132, 232_448, 50, 80),
    "h200": _nvidia("H200", 132, 232_448, 60, 141),
    "b200": _nvidia("B200", 148, 232_448, 126, 180),
    # Each of its eight dies has an L2; a cache of 256 MiB lies behind them.
    "mi300x": DeviceProperties("AMD MI300X", "cuda", 304, 64, LEAST_SHARED_MEMORY, 4 * MIB, 192 * GIB),
}
# The device that kernels are compiled for ahead of time, by the vendor's name of the architecture.
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
    """The properties of a device of this machine."""
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
