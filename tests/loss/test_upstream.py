"""Every gradient is multiplied by the factor that a backward brings, is rounded once, and stays as it is if the factor
is 1.
"""

import pytest
import torch

from drpo_kernels.backends import row_ops
from drpo_kernels.backends.triton.tiles import RowTile

BACKENDS = ("torch", "triton")
# The counts are no element, one, a whole tile, whole tiles and a rest, and more tiles than programs.
COUNTS = (0, 1, 16, 37, 16 * 9 + 5)


def ops_of(backend: str):
    ops = row_ops(backend)
    if backend == "triton":
        ops.tile = RowTile(16, 1)
    return ops


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", COUNTS)
def test_every_element_is_scaled_and_rounded_once(backend, dtype, count, device):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = (values.double() * torch.tensor(0.3).double().to(device)).to(dtype)
    ops_of(backend).scale(values, torch.tensor(0.3, device=device))
    # The product is rounded to float32 before it is rounded to 16 bits, so the two are at most an ulp apart.
    torch.testing.assert_close(values, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_factor_of_one_changes_no_bit_and_a_nan_is_not_one(backend, device):
    values = torch.tensor([1.5, float("nan"), float("inf"), -0.0] * 9, device=device).view(4, 9)
    before = values.clone()
    ops_of(backend).scale(values, torch.tensor(1.0, device=device))
    number = ~before.isnan()  # a GPU's multiplication changes the bits of a NaN
    assert torch.equal(values.isnan(), before.isnan())
    assert torch.equal(values[number].view(torch.int32), before[number].view(torch.int32))
    ops_of(backend).scale(values, torch.tensor(float("nan"), device=device))
    assert values.isnan().all()
