"""Values and gradients on the device against plain torch in fp64, and the same bits every time."""

import cases
import pytest
import torch
from cases import BY_NAME, DTYPES, MAIN, OPS, check, fused, run
from on_device import LAYOUTS, REAL, SMALL, inputs, real, size
from repeats import check_third_call
from tolerance import assert_close

from perf import choices
from tritattn import _replay, explain, tuning


def test_the_kernels_run(device):
    import tritattn._library as library

    forced, library._forced = library._forced, None
    try:
        for dtype in DTYPES.values():
            assert explain(device, dtype)[0] == "triton"
    finally:
        library._forced = forced


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_real_sizes_and_repeated_runs(device, op):
    case, activation = real(op, device)
    first = check(op, case, activation)
    for _ in range(3):
        again = run(fused, op, case, activation)
        differing = [name for name in first if not name.startswith("norm.running") and not torch.equal(first[name], again[name])]
        assert not differing, f"other bits in {differing}"


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_repeated_calls_have_their_launchers_bits(device, op, monkeypatch):
    monkeypatch.setattr(_replay, "enabled", True)
    check_third_call(op, lambda seed: real(op, device, seed)[0], real(op, device)[1], monkeypatch)


@pytest.mark.parametrize("shape", [(9, 1024, 14, 14), (9, 2048, 7, 7)], ids=str)
@pytest.mark.parametrize("name", ["sse", "scse-max"])
def test_programs_that_wait_for_each_other(device, name, shape):
    """More images than are held at once."""
    op = BY_NAME[name]
    case = inputs(op, shape, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, residual=True)
    with choices.recorded() as found:
        first = check(op, case, "relu")
    assert device.type != "cuda" or all(c.group == tuning.cooperative(device) for asked, c in found.items() if asked.role == "pixel")
    for _ in range(20):
        again = run(fused, op, case, "relu")
        assert all(torch.equal(t, again[key]) for key, t in first.items())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("name", "c"), [("se", 256), ("eca", 256), ("se", 512), ("ese", 512), ("sk", 256), ("splat", 256), ("shuffle", 264), ("simam", 256)]
)
def test_tickets(device, name, c, layout):
    """More programs than run at once, more images than lie between the two passes over one; with weights that a block of images shares, too."""
    op = BY_NAME[name]
    case = inputs(op, (48, c, 28, 28), device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, layout=layout, residual=True)
    with choices.recorded() as found:
        first = check(op, case, "relu")
    assert all(0 < config.lag < 48 for asked, config in found.items() if asked.role == "ticket")
    for _ in range(20):
        again = run(fused, op, case, "relu")
        assert all(torch.equal(t, again[key]) for key, t in first.items())


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_single_precision(device, op):
    check(op, inputs(op, SMALL, device, dtype=torch.float32))


@pytest.mark.parametrize("op, layout", [(op, LAYOUTS[i % 2]) for i, op in enumerate(op for op in OPS if not op.main)], ids=str)
def test_options(device, op, layout):
    check(op, inputs(op, SMALL, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, layout=layout))


@pytest.mark.parametrize("dtype, layout", [("fp16", "channels_last"), ("fp64", "contiguous"), ("fp32", "channels_last")])
@pytest.mark.parametrize("name", ["se", "scse", "cbam-train"])
def test_dtypes(device, name, dtype, layout):
    check(BY_NAME[name], inputs(BY_NAME[name], SMALL, device, dtype=DTYPES[dtype], layout=layout))


@pytest.mark.parametrize("values", ["offset", "ties", "constant"])
@pytest.mark.parametrize("name", ["se", "scse", "cbam", "channel_statistics", "spatial_statistics"])
def test_values(device, name, values):
    op = BY_NAME[name]
    check(op, inputs(op, SMALL, device, dtype=torch.float32, values=values))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["channel_attention", "spatial_attention"])
def test_nan_and_inf_travel(device, name, value):
    """As in torch, through sums and maxima: here the hardware's maximum would drop a NaN."""
    op = BY_NAME[name]
    case = inputs(op, SMALL, device, dtype=torch.float32)
    with torch.no_grad():
        case.x[0, 1, 2, 1] = value
    exact, plain = case.to(torch.float64), case.to(torch.float32)
    with torch.no_grad():
        y, wanted, eager = fused(op, case.x, case.params), op.eager(exact.x, exact.params), op.eager(plain.x, plain.params)
    assert wanted.isnan().any()
    assert_close("y", y, wanted, eager, terms=case.x[0].numel(), accumulator=torch.float32)


@pytest.mark.parametrize("layout", ["sliced", "permuted"])
@pytest.mark.parametrize("name", ["se", "scse", "cbam"])
def test_other_strides(device, name, layout):
    op = BY_NAME[name]
    case = inputs(op, SMALL, device)
    case.x = cases.LAYOUTS[layout](case.x.detach()).requires_grad_()
    assert not case.x.is_contiguous()
    check(op, case)


def test_size_of_the_cases(device):
    """The sizes that the tests above name are those that they run on a GPU."""
    assert size(REAL, torch.device("cuda")) == REAL
