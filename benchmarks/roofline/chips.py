"""Published figures of the chips that the model knows, and the shares of them that are assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Figure:
    """A number and where it is published."""

    value: float
    source: str


@dataclass(frozen=True)
class Assumption:
    """The share of a published rate that is assumed to be reached, and the reason."""

    share: float
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"an efficiency must be in (0, 1], got share={self.share}")


@dataclass(frozen=True)
class Chip:
    """Published dense rates, never those "with sparsity", which are twice as large.

    matrix      FLOP/s of 16-bit operands with float32 accumulation
    vector      FLOP/s of float32 operands, without TF32
    bandwidth   bytes/s of the memory
    capacity    bytes of memory
    cache       bytes of the last cache that all processors share
    processors  SMs or compute units; each works on one tile of a product, or one row, at a time
    lanes       float32 results of a processor in a clock, which give the clock; None if instructions are not charged
    """

    name: str
    matrix: Figure
    vector: Figure
    bandwidth: Figure
    capacity: Figure
    cache: Figure
    processors: Figure
    matmul_efficiency: Assumption
    memory_efficiency: Assumption
    lanes: int | None = None

    @property
    def preset(self) -> str:
        """Its name among the devices that the planning knows."""
        return self.name.lower()

    @property
    def clock(self) -> float | None:
        """In Hz, from a multiplication and an addition in every lane."""
        return None if self.lanes is None else self.vector.value / (2 * self.lanes * self.processors.value)

    def flops_per_second(self, itemsize: int) -> float:
        """The rate that products of operands of this size are assumed to reach."""
        return (self.matrix if itemsize < 4 else self.vector).value * self.matmul_efficiency.share

    def seconds_for_bytes(self, count: float) -> float:
        return count / (self.bandwidth.value * self.memory_efficiency.share)

    def keeps(self, row_bytes: float) -> bool:
        """Whether the cache holds one row per processor, so that a row's second read need not go to memory."""
        return self.processors.value * row_bytes <= self.cache.value

    def with_efficiency(self, matmul: float | None, memory: float | None) -> Chip:
        chip = self
        if matmul is not None:
            chip = replace(chip, matmul_efficiency=Assumption(matmul, "as asked for"))
        if memory is not None:
            chip = replace(chip, memory_efficiency=Assumption(memory, "as asked for"))
        return chip


MIB, GB, TB, TERA = 1 << 20, 1e9, 1e12, 1e12
A100_PAGE = "https://www.nvidia.com/en-us/data-center/a100/"
H100_PAGE = "https://www.nvidia.com/en-us/data-center/h100/"
H200_PAGE = "https://www.nvidia.com/en-us/data-center/h200/"
DGX_B200_SHEET = "https://resources.nvidia.com/en-us-dgx-systems/dgx-b200-datasheet"
MI300X_PAGE = "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"
AMPERE_PAPER = "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf"
AMPERE_GUIDE = "https://docs.nvidia.com/cuda/ampere-tuning-guide/index.html"
HOPPER_PAPER = "https://resources.nvidia.com/en-us-hopper-architecture/nvidia-h100-tensor-c"
HOPPER_GUIDE = "https://docs.nvidia.com/cuda/hopper-tuning-guide/index.html"
BLACKWELL_GUIDE = "https://docs.nvidia.com/cuda/blackwell-tuning-guide/index.html"
# a device query of a B200: NVIDIA publishes no count of SMs for it
B200_QUERY = "https://github.com/pytorch/ao/pull/4002"
# NVIDIA's pages have the cache of an H100, which has a sixth of the same die's switched off
DRIVER = "`l2_bytes` of drpo_kernels/backends/devices.py, as the driver reports it"
ROCM_SPECIFICATIONS = "https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"
# the fastest bf16 products that a search over shapes found, cuBLAS and hipBLASLt
BEST_PRODUCTS = "https://github.com/stas00/ml-engineering/tree/master/compute/accelerator"


def _best_product(teraflops: float, published: float) -> Assumption:
    return Assumption(teraflops / published, BEST_PRODUCTS)


COPIES = Assumption(0.9, "copies at about 4.3 of an H200's 4.8 TB/s, assumed of every NVIDIA chip")
HOPPER_PRODUCTS = _best_product(794.5, 989)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "A100",
            matrix=Figure(312 * TERA, A100_PAGE),
            vector=Figure(19.5 * TERA, A100_PAGE),
            bandwidth=Figure(2.039 * TB, A100_PAGE),
            capacity=Figure(80 * GB, A100_PAGE),
            cache=Figure(40 * MIB, AMPERE_GUIDE),
            processors=Figure(108, AMPERE_PAPER),
            matmul_efficiency=_best_product(271.2, 312),
            memory_efficiency=COPIES,
            lanes=64,
        ),
        Chip(
            "H100",
            matrix=Figure(989 * TERA, H100_PAGE),
            vector=Figure(67 * TERA, H100_PAGE),
            bandwidth=Figure(3.35 * TB, H100_PAGE),
            capacity=Figure(80 * GB, H100_PAGE),
            cache=Figure(50 * MIB, HOPPER_GUIDE),
            processors=Figure(132, HOPPER_PAPER),
            matmul_efficiency=HOPPER_PRODUCTS,
            memory_efficiency=COPIES,
            lanes=128,
        ),
        Chip(
            "H200",
            matrix=Figure(989 * TERA, H200_PAGE),
            vector=Figure(67 * TERA, H200_PAGE),
            bandwidth=Figure(4.8 * TB, H200_PAGE),
            capacity=Figure(141 * GB, H200_PAGE),
            cache=Figure(60 * MIB, DRIVER),
            processors=Figure(132, HOPPER_PAPER),
            matmul_efficiency=HOPPER_PRODUCTS,
            memory_efficiency=COPIES,
            lanes=128,
        ),
        Chip(
            "B200",
            matrix=Figure(2250 * TERA, DGX_B200_SHEET),
            vector=Figure(80 * TERA, DGX_B200_SHEET),
            bandwidth=Figure(8 * TB, DGX_B200_SHEET),
            capacity=Figure(180 * GB, DGX_B200_SHEET),
            cache=Figure(126 * MIB, BLACKWELL_GUIDE),
            processors=Figure(148, B200_QUERY),
            matmul_efficiency=_best_product(1745.0, 2250),
            memory_efficiency=COPIES,
            lanes=128,
        ),
        Chip(
            "MI300X",
            matrix=Figure(1307.4 * TERA, MI300X_PAGE),
            vector=Figure(163.4 * TERA, MI300X_PAGE),
            bandwidth=Figure(5.3 * TB, MI300X_PAGE),
            capacity=Figure(192 * GB, MI300X_PAGE),
            cache=Figure(256 * MIB, ROCM_SPECIFICATIONS),
            processors=Figure(304, ROCM_SPECIFICATIONS),
            matmul_efficiency=_best_product(668.4, 1307.4),
            memory_efficiency=Assumption(0.79, "BabelStream's copy at 4.18 of 5.3 TB/s, AMD's threshold for a MI300X"),
        ),
    )
}
