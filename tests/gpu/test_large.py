"""Maps beyond 2**31 elements, where 32-bit offsets would wrap: a small map repeated, whose result is the small one's, repeated."""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from cases import BY_NAME, Op, eager, fused
from on_device import inputs
from rows.op import join, mlp
from rows.spatial import _cbam, _spatial
from tolerance import assert_close

# A 1x1 convolution, because no border may break the repetition, and no maximum over positions, whose gradient goes to the first repeat alone.
CBAM = _cbam("cbam-repeatable", join(mlp(), _spatial(1)), pools=("avg",))


@pytest.fixture(autouse=True)
def alone():
    """One of these tests at a time, where several processes run tests on one GPU."""
    fcntl = pytest.importorskip("fcntl")
    with open(Path(tempfile.gettempdir()) / "tritattn-large-maps.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def enough_memory(device, elements):
    """For x, y, the gradient of y, the gradient of x in bfloat16, and what the small map takes in fp64."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if free < 20 * elements:
            pytest.skip(f"needs {20 * elements / 2**30:.0f} GiB of free memory")


def clear_maxima(case) -> None:
    """One channel of every position far above the others, and gates near 1/2: among millions of positions some maxima would otherwise be so close
    that rounding chooses between them."""
    n, c, h, w = case.x.shape
    with torch.no_grad():
        chosen = torch.arange(h * w, device=case.x.device).view(1, h, w) % c
        case.x.scatter_add_(1, chosen.expand(n, 1, h, w), torch.full((n, 1, h, w), 8.0, device=case.x.device).to(case.x))
        for name in ("w2", "b2"):
            case.params[name] *= 0.1


def repeated(op: Op, device, shape, along: int, layout: str) -> None:
    """`along` is repeated until the map has more than 2**31 elements."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    times = 2**31 // math.prod(shape) + 1 if on_gpu else 2
    enough_memory(device, times * math.prod(shape))
    case = inputs(op, shape, device, dtype=dtype)
    shape = case.x.shape
    if op is CBAM:
        clear_maxima(case)
    parameters = {name: t for name, t in case.tensors().items() if name != "x"}
    g = torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(1))

    def small(accumulator):
        copy = case.to(accumulator)
        copy.x.grad = None
        y = eager(op, copy.x, copy.params)
        dx, *dp = torch.autograd.grad(y, [copy.x, *(copy.tensors()[name] for name in parameters)], g.to(accumulator))
        return y.detach(), dx, dp

    exact, plain = small(torch.float64), small(torch.float32)
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    counts = [times if d == along else 1 for d in range(4)]
    x = case.x.detach().repeat(counts).contiguous(memory_format=memory).requires_grad_()
    assert x.numel() > 2**31 or not on_gpu
    y = fused(op, x, case.params)
    assert y.stride() == x.stride()
    grown = g.repeat(counts).contiguous(memory_format=memory)
    dx, *dp = torch.autograd.grad(y, [x, *parameters.values()], grown)
    del grown
    terms = math.prod(shape) * times
    size = shape[along]
    for i in range(times):
        for name, got, index in (("y", y.detach(), 0), ("x", dx, 1)):
            part = got.narrow(along, i * size, size)
            assert_close(f"{name}, repeat {i} of {times}", part, exact[index], plain[index].to(dtype), terms=terms, accumulator=torch.float32)
    for name, got, wanted, cast in zip(parameters, dp, exact[2], plain[2], strict=True):
        assert_close(name, got, times * wanted, (times * cast).to(got.dtype), terms=terms, accumulator=torch.float32)


IMAGES = [("se", "contiguous"), ("scse", "contiguous"), ("sse", "channels_last"), ("cbam", "contiguous"), ("cbam", "channels_last")]


@pytest.mark.parametrize("name, layout", IMAGES)
def test_one_large_image(device, name, layout):
    repeated(CBAM if name == "cbam" else BY_NAME[name], device, (1, 64, 512, 4096), 2, layout)


@pytest.mark.parametrize("name", ["se", "cbam"])
def test_many_images(device, name):
    repeated(BY_NAME[name], device, (8, 256, 64, 64), 0, "contiguous")
