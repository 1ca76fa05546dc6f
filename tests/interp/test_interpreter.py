"""The interpreter does what a GPU does where the other tests rely on it."""

import warnings

import torch
import triton
import triton.language as tl


@triton.jit
def cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def bounds_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, tl.minimum(tl.maximum(x, 1.0), 2.0))


@triton.jit
def loop_kernel(y_ptr, bound, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    for j in range(0, tl.minimum(bound, SIZE)):
        tl.store(y_ptr + i, j, mask=i == j)


def test_conversions_round_to_nearest():
    halfway = [1 + 2**-8, 1 + 3 * 2**-8, 65520, -1.005]
    values = torch.tensor([*halfway, 1, 7, 0, -0.0, 0.1, 3.3895e38, 1e-40, 1e-7, 65504, torch.inf, -torch.inf, torch.nan])
    for source in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for target in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x = values.to(source)
            y = torch.empty(16, dtype=target)
            cast_kernel[(1,)](x, y, SIZE=16)
            torch.testing.assert_close(y, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_maximum_and_minimum_drop_nan():
    y = torch.empty(4)
    bounds_kernel[(1,)](torch.tensor([torch.nan, 0.0, 1.5, 3.0]), y, SIZE=4)
    assert y.tolist() == [1.0, 1.0, 1.5, 2.0]


def test_computed_bounds_of_loops():
    y = torch.full((4,), -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_kernel[(1,)](y, 3, SIZE=4)
    assert y.tolist() == [0.0, 1.0, 2.0, -1.0]
