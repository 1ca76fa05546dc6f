"""The path of the machine, which is plain torch on a CPU, against what people write: the kernels' own tests are tests/interp."""

import pytest
import torch
from cases import DTYPES, MAIN, OPS, TAILS, VALUES, check, eager, fused, make

SHAPE = (2, 5, 3, 7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_dtypes(op, dtype):
    check(op, make(op, SHAPE, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_values(op, values):
    if op.name == "se-gelu" and values.endswith("inf"):
        pytest.skip("torch's gelu of Inf is NaN on some CPUs")
    if values in op.unfit:
        pytest.skip("a BatchNorm in training turns them into rounding errors")
    check(op, make(op, SHAPE, values=values, layout="channels_last", seed=1))


@pytest.mark.parametrize("activation", TAILS)
@pytest.mark.parametrize("op", [op for op in MAIN if op.epilogue], ids=str)
def test_epilogue(op, activation):
    check(op, make(op, SHAPE, residual=True, seed=2), activation)


@pytest.mark.parametrize("op", [op for op in OPS if 5 in op.ranks], ids=str)
def test_ranks(op):
    check(op, make(op, (2, 5, 9), seed=3))
    check(op, make(op, (2, 3, 2, 3, 4), seed=3))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_exact(op):
    """In fp64 to the last digits."""
    inputs = make(op, SHAPE, dtype=torch.float64, seed=4)
    with torch.no_grad():
        expected = eager(op, inputs.x, inputs.to(torch.float64).params)
        torch.testing.assert_close(fused(op, inputs.x, inputs.params), expected, rtol=1e-13, atol=1e-13)
