"""Products of fp32 matrices from bf16 parts, as matrix units make them; the interpreter takes them whole otherwise."""

import pytest
import torch
import triton
import triton.language as tl
from tritattn.kernels.product import add_product

SIZE = 16


@triton.jit
def product_kernel(left_ptr, right_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    total = add_product(tl.zeros([SIZE, SIZE], tl.float32), tl.load(left_ptr + at), tl.load(right_ptr + at), False, tl.float32)
    tl.store(out_ptr + at, total)


def product(left, right):
    out = torch.empty(SIZE, SIZE)
    product_kernel[(1,)](left, right, out, SIZE=SIZE)
    return out


def matrices(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(SIZE, SIZE, generator=generator) * scale for _ in range(2))


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_hold_every_digit(scale, dtype):
    left, right = matrices(scale)
    right = right.to(dtype)
    exact = left.double() @ right.double().T
    limit = 2 * torch.finfo(torch.float32).eps * (left.double().abs() @ right.double().abs().T)
    assert ((product(left, right) - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_and_nan_elements(dtype):
    """Also where the other factor is one that bf16 holds, of which nothing is left for the parts that follow."""
    left, right = matrices()
    right[::2] = right[::2].bfloat16().float()
    left[2, 3], left[5, 1], right[7, 4] = torch.inf, -torch.inf, torch.nan
    right[9, 2] = -torch.inf
    right = right.to(dtype)
    found, expected = product(left, right), left @ right.float().T
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(found), kind(expected))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
def test_the_largest_elements_are_not_infinite(value):
    left, right = matrices(1e-10)
    left[2, 3] = value
    torch.testing.assert_close(product(left, right), left @ right.T)
    right = right.bfloat16()
    torch.testing.assert_close(product(left, right), left @ right.float().T)
