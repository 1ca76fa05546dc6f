"""Values and gradients of the kernels against plain torch in fp64: every op, dtype, layout and kind of input."""

import pytest
import torch
from cases import BY_NAME, DTYPES, MAIN, OPS, VALUES, check, make

LAYOUTS = ("contiguous", "channels_last")
# the excite's weights are under a quarter of an image: it runs inside the squeeze; and not: it follows, batched over images
INSIDE, BATCHED = (2, 5, 5, 7), (2, 5, 3, 7)


def both_layouts(ops, axis):
    """(op, a value of `axis`, layout): both layouts for the main ops, one or the other for their variants."""
    for i, op in enumerate(ops):
        for j, value in enumerate(axis):
            for layout in LAYOUTS if op.main else (LAYOUTS[(i + j) % 2],):
                yield pytest.param(op, value, layout, id=f"{op}-{value}-{layout}")


@pytest.mark.parametrize(("op", "dtype", "layout"), list(both_layouts(OPS, DTYPES)))
def test_dtypes(op, dtype, layout, launches):
    check(op, make(op, INSIDE, dtype=DTYPES[dtype], layout=layout))
    assert launches


@pytest.mark.parametrize(("op", "values"), [pytest.param(o, v, id=f"{o}-{v}") for o in OPS for v in VALUES if v not in ("random", *o.unfit)])
def test_values(op, values, launches):
    check(op, make(op, BATCHED, values=values, layout=LAYOUTS[len(values) % 2], seed=1))
    assert launches


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_half_precision_offset(op, dtype):
    """A mean of 1000, which half precisions can just hold."""
    check(op, make(op, BATCHED, dtype=DTYPES[dtype], parameters=torch.float32, values="offset", seed=3))


# (map, parameters): what autocast and half-precision models bring together
MIXED = [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32"), ("fp32", "fp64"), ("fp64", "fp32"), ("fp64", "bf16")]


@pytest.mark.parametrize(("dtype", "parameters"), MIXED)
@pytest.mark.parametrize("op", [op for op in MAIN if op.shapes(BATCHED)], ids=str)
def test_mixed_dtypes(op, dtype, parameters):
    check(op, make(op, INSIDE, dtype=DTYPES[dtype], parameters=DTYPES[parameters], seed=3))


# -- residual and activation ------------------------------------------------------------------------------------------------------------------

EPILOGUES = [(r, a) for r in (False, True) for a in ("none", "relu", "silu", "hardswish", "gelu") if r or a != "none"]


@pytest.mark.parametrize(("residual", "activation"), EPILOGUES)
@pytest.mark.parametrize("op", [op for op in MAIN if op.epilogue], ids=str)
def test_epilogue(op, residual, activation):
    layout = LAYOUTS[len(activation) % 2]
    check(op, make(op, BATCHED, layout=layout, residual=residual, seed=4), activation)
    if residual and activation in ("none", "relu"):
        check(op, make(op, INSIDE, dtype=torch.bfloat16, layout=layout, residual=True, seed=5), activation)


def test_epilogue_of_a_zero_gate():
    """With the map gated off y is the residual alone, and the activation's kink is where the residual is zero."""
    op = BY_NAME["gate-whole"]
    inputs = make(op, BATCHED, residual=True, values="ties")
    with torch.no_grad():
        inputs.params["weights"].fill_(-1e4)
        inputs.residual[inputs.x == 0] = 0
    got = check(op, inputs, "relu")
    assert got["y"].equal(inputs.residual.relu()) and not got["residual"][inputs.x == 0].any()
