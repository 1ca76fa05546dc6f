"""What the kernels move and how often they are launched: numbers that no noise touches, held to the bars that the ops promise.

Small maps with rows of whole sectors; tiles as they are chosen for a batch of 256. `python -m perf traffic` counts the stages of SE-ResNet-50.
"""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from perf.cases import make_case
from perf.choices import for_batch
from perf.counting import Counter, MapOrder, interpreted, map_order
from perf.features import SITE, counted_case
from perf.interpret import count
from perf.ops import OPS
from perf.shapes import SETS, STAGES, Site
from tritattn import ops, tuning
from tritattn._spec import Spec
from tritattn.ops import _excite
from tritattn.ops._launch import Map

# launches forward while the excite's weights are small
LAUNCHES = {"sse": 1, "scse": 1, "scse_max": 1}
LAUNCHES |= {"cbam": 3, "spatial_attention": 3, "gc": 8, "gc_scale": 8, "gsop": 10, "shuffle": 1, "simam": 1, "sk": 1, "splat": 1}
LAUNCHES |= {"coord": 17, "strip": 8, "triplet": 15, "bam": 24}
LAUNCHES |= {"norm_se": 10, "norm_silu_se": 8}  # half of them for the running statistics
LAUNCHES |= {"mscam": 9, "aff": 9, "iaff": 18}


@pytest.fixture(autouse=True)
def poison():
    """Not here: the poison's own writes would be counted."""


@pytest.fixture(scope="module", autouse=True)
def warm():
    """What a process allocates once is not counted."""
    count(make_case("cbam", "bf16", "contiguous", 1, Site(1, 8, 4, 4, 2)), 1)


LAYOUTS = ("contiguous", "channels_last")


# an epilogue in one layout, in turns
@pytest.mark.parametrize(("name", "layout"), [(op, LAYOUTS[j]) for i, op in enumerate(OPS) for j in (0, 1) if "+" not in op or i % 2 == j])
def test_traffic_and_launches_stay_within_the_bars(name, layout):
    case = counted_case(name, layout)
    moved = count(case, 256)
    map_bytes = map_order(case).map_numel * case.itemsize
    for mode, bar in zip(("fwd", "bwd"), case.op.bar_u, strict=True):
        found = moved[mode].in_u(map_bytes)
        # 0.03: the shares of a channel's gradient that column kernels leave, in fp32, one for every 64 positions
        assert found["total_u"] == pytest.approx(bar, abs=0.03), f"{mode}: {found}"
    assert moved["fwd"].launches <= LAUNCHES.get(case.op.block_name, 2), moved["fwd"].names


@pytest.mark.parametrize("name, dram", [("shuffle+residual+relu", False), ("simam", True)])
def test_planes_that_do_not_fit_on_chip_are_read_twice(name, dram):
    """The second time from L2."""
    case = make_case(name, "bf16", "channels_last", 2, Site(1, 32, 32, 64, 4))
    moved = count(case, 768, dram=dram)
    map_bytes = map_order(case).map_numel * case.itemsize
    for mode, once in zip(("fwd", "bwd"), case.op.bar_u, strict=True):
        again = 1 if mode == "fwd" else 2  # x; and da, or g
        assert moved[mode].in_u(map_bytes)["total_u"] == pytest.approx(once + again, abs=0.03)
        assert not dram or moved[mode].dram_u == pytest.approx(once, abs=0.02)


@pytest.mark.parametrize("op, site", [("sse+residual+relu", STAGES[2]), ("scse_max+residual+relu", Site(1, 576, 7, 7, 2))])
def test_short_rows_of_many_channels(op, site):
    """An image is held by programs that wait for each other: none of them reads it twice, or a part of a sector."""
    case = make_case(op, "bf16", "contiguous", 2, site)
    moved = count(case, 256)
    assert any("group" in name for name in moved["fwd"].names) and any("group" in name for name in moved["bwd"].names)
    for mode, bar in zip(("fwd", "bwd"), case.op.bar_u, strict=True):
        # 0.02: sectors that two programs share
        assert moved[mode].in_u(map_order(case).map_numel * case.itemsize)["total_u"] == pytest.approx(bar, abs=0.02)
    assert moved["fwd"].launches <= (1 if op.startswith("sse") else 4)


@pytest.mark.parametrize("site", [SITE, Site(1, 64, 4, 4, 64)], ids=["small weights", "large weights"])
@pytest.mark.parametrize("name", ["se", "ese", "cse", "eca", "se+residual+relu"])
def test_launches_of_channel_gates(name, site):
    moved = count(make_case(name, "bf16", "channels_last", 2, site), 2)
    assert moved["fwd"].launches == 1, moved["fwd"].names
    assert moved["bwd"].launches <= 2, moved["bwd"].names


SMALL_MAPS = sorted({site for shapes in SETS.values() if {"se", "ese", "cse"} & set(shapes.blocks) for site in shapes.sites}, key=str)


@pytest.mark.parametrize("layers", ["two", "one"])
def test_every_small_map_takes_one_launch(layers):
    """Of every network's sites where SE, ESE or cSE stands, at every batch of at most a million elements."""
    counted = 0
    for site, dtype in itertools.product(SMALL_MAPS, (torch.bfloat16, torch.float32)):
        w1 = torch.empty(site.rd, site.c, dtype=dtype) if layers == "two" else None
        w2 = torch.empty(site.c, site.rd if layers == "two" else site.c, dtype=dtype)
        spec = Spec("avg", "fc" if w1 is None else "mlp", "relu", "sigmoid")
        for n in (1, 2, 3, 8, 20, 64):
            if n * site.c * site.h * site.w <= 1 << 20:
                x = torch.empty(n, site.c, site.h, site.w, dtype=dtype)
                for layout, backward in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
                    assert _excite.one_launch(Map(x.to(memory_format=layout)), w1, w2, spec, backward), (site, n, dtype, layout)
                    counted += 1
    assert counted > 500


@pytest.mark.parametrize("size", [14, 7])
@pytest.mark.parametrize("op", ["coord", "strip", "triplet", "ge"])
def test_rows_that_are_no_whole_sectors(op, size, monkeypatch):
    """Of the map alone, because the statistics of so few rows and columns are no small part of it."""
    monkeypatch.setattr("perf.interpret.map_order", lambda case: MapOrder(4 * math.prod(case.shape)))
    case = make_case(op, "bf16", "contiguous", 2, Site(1, 128, size, size, 8))
    moved = count(case, 256)
    for mode, bar in zip(("fwd", "bwd"), case.op.bar_u, strict=True):
        assert moved[mode].in_u(map_order(case).map_numel * case.itemsize)["total_u"] == bar


@pytest.mark.parametrize("c, size", [(1024, 8), (1024, 14), (1032, 7)])
@pytest.mark.parametrize("op", ["gc", "gc_scale"])
def test_a_context_of_many_channels_takes_one_read(op, c, size, monkeypatch):
    """Of channels-first maps too: a sector's positions at a time, or an image held by programs that wait for each other."""
    monkeypatch.setattr("perf.interpret.map_order", lambda case: MapOrder(4 * math.prod(case.shape)))
    case = make_case(op, "bf16", "contiguous", 2, Site(1, c, size, size, 8))
    moved = count(case, 256)
    found = [moved[mode].in_u(map_order(case).map_numel * case.itemsize)["total_u"] for mode in ("fwd", "bwd")]
    assert found == pytest.approx(case.op.bar_u, abs=0.02)  # sectors that two programs share


@pytest.mark.parametrize("norm, limit", [("none", 4), ("batch", 6)])
def test_launches_of_cbam_with_large_weights(norm, limit):
    case = make_case("cbam", "bf16", "contiguous", 2, Site(1, 64, 4, 4, 64), norm=norm)
    assert count(case, 256)["fwd"].launches <= limit


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_covariances_of_128_channels_take_one_read(layout):
    x = torch.randn(2, 128, 8, 32, dtype=torch.bfloat16).to(memory_format=layout).requires_grad_()
    of_map = MapOrder(x.numel(), frozenset({2 * 128 * 128}))  # what they are
    with for_batch(256):
        with Counter(of_map) as forward, interpreted(forward):
            y = ops.covariance(x, before="relu")
        with Counter(of_map) as backward, interpreted(backward):
            torch.autograd.grad(y, x, torch.ones_like(y))
    assert forward.moved.in_u(2 * x.numel())["total_u"] == pytest.approx(1)
    assert backward.moved.in_u(2 * x.numel())["total_u"] == pytest.approx(3)  # and x once more for its ReLU, and dx


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("site", [Site(1, 32, 16, 32, 4), Site(1, 64, 4, 4, 64)], ids=["one launch", "large weights"])
def test_what_stands_before_a_channel_gate_takes_no_passes(site, layout):
    """A BatchNorm in evaluation and a SiLU would read and write the map twice, as separate passes, before the 3 U forward."""
    c, rd = site.c, site.rd
    x = torch.randn(2, c, site.h, site.w, dtype=torch.bfloat16).to(memory_format=layout).requires_grad_()
    layers = [torch.randn(size, dtype=torch.bfloat16) for size in ((rd, c), (rd,), (c, rd), (c,))]
    norm = torch.nn.BatchNorm2d(c).eval().requires_grad_(False)
    of_map = MapOrder(x.numel(), frozenset({c * rd}))
    with for_batch(256):
        with Counter(of_map) as forward, interpreted(forward):
            y = ops.se(x, *layers, before="silu", before_norm=norm)
        g = torch.ones_like(y)
        with Counter(of_map) as backward, interpreted(backward):
            torch.autograd.grad(y, x, g)
    assert forward.moved.in_u(2 * x.numel())["total_u"] == 3
    assert backward.moved.in_u(2 * x.numel())["total_u"] == 5  # x and g for the gate's gradient, again for dx


def test_large_weights_are_read_once_per_batch():
    case = make_case("se", "bf16", "contiguous", 2, Site(1, 64, 4, 4, 64))
    with tuning.forced(lag=0):
        moved = count(case, 256)
    assert moved["fwd"].launches <= 4 and moved["fwd"].names.count("linear_kernel") == 2


def test_large_weights_are_read_once_per_block_of_images():
    """Two at a time, whose second read finds them in L2."""
    case = make_case("ese", "bf16", "channels_last", 2, Site(1, 256, 16, 32, 4))
    moved = count(case, 768, dram=True)
    for mode, bar, floor in zip(("fwd", "bwd"), case.op.bar_u, case.op.floor_u, strict=True):
        assert moved[mode].in_u(map_order(case).map_numel * case.itemsize)["total_u"] == pytest.approx(bar, abs=0.03)
        assert moved[mode].dram_u == pytest.approx(floor, abs=0.05)
    assert (moved["fwd"].launches, moved["bwd"].launches) == (1, 2)


@pytest.mark.parametrize(("name", "layout"), [("sk", "contiguous"), ("splat", "channels_last")])
def test_branches_reach_dram_once(name, layout):
    case = make_case(name, "bf16", layout, 2, Site(1, 64, 16, 64, 4))
    moved = count(case, 768, dram=True)
    for mode, floor, launches in zip(("fwd", "bwd"), case.op.floor_u, (1, 3), strict=True):
        # 0.07: a sample of the sectors is not the same share of maps of two sizes
        assert moved[mode].dram_u == pytest.approx(floor, abs=0.07) and moved[mode].launches == launches, (mode, moved[mode])


@pytest.mark.parametrize("name, batch, expected", [("ge", 128, 2), ("ge", 768, 2.75), ("se", 768, 2), ("scse", 768, 2), ("cbam", 768, 2.75)])
def test_what_reaches_dram(name, batch, expected):
    """A batch of 16 MB is read from L2 the second time; one of 101 MB where an image is read again before the next ones are. Otherwise L2 has half
    of it, what was read last, and half of that when its turn comes, because y takes as much."""
    case = make_case(name, "bf16", "contiguous", 2, Site(1, 32, 32, 64, 4))
    moved = count(case, batch, dram=True)["fwd"]
    assert moved.in_u(map_order(case).map_numel * case.itemsize)["total_u"] == pytest.approx(4 if name == "cbam" else 3, abs=0.03)
    assert moved.dram_u == pytest.approx(expected, abs=0.05)


@triton.jit
def copy_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 32)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def test_accesses_without_a_mask_count_once():
    x = torch.randn(32)
    with Counter(MapOrder(1)) as counter, interpreted(counter):
        copy_kernel[(1,)](x, torch.empty_like(x))
    assert counter.moved.map_read == counter.moved.map_write == 128


def test_the_count_sees_a_copy():
    """A map in another layout than contiguous or channels_last costs its copy, and the count shows it."""
    x = torch.randn(2, 16, 8, 16)[..., ::2]
    with Counter(MapOrder(x.numel())) as counter, interpreted(counter):
        ops.sse(x, torch.randn(1, 16, 1, 1))
    moved = counter.moved.in_u(x.numel() * 4)
    assert moved["total_u"] >= 4
