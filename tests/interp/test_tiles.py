"""Every way of cutting a map into programs gives the same answer: forced tiles, odd sizes, other ranks, and programs in another order."""

import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME, OPS, VALUES, check, fused, make, run
from interpreter import reversed_programs
from tritattn.kernels.excite import arrive

from tritattn import ops, tuning
from tritattn._linear import Tile
from tritattn.ops.convolution import convolve

# several blocks of channels and of positions, two ranges of positions, no tile with all channels of a position
CUT = {"block_c": 2, "block_p": 4, "splits": 2}
# ranges without positions, and all channels in one tile
EMPTY = {"block_c": 8, "block_p": 2, "splits": 16}


@triton.jit
def arrival_kernel(counter_ptr, last_ptr, TOTAL: tl.constexpr):
    last = arrive(counter_ptr, TOTAL)
    tl.store(last_ptr + tl.program_id(0), last.to(tl.int32))


def test_one_program_is_the_last_to_arrive():
    counter, last = torch.zeros(1, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    arrival_kernel[(5,)](counter, last, TOTAL=5)
    assert last.tolist() == [0, 0, 0, 0, 1] and counter.item() == 0
    with reversed_programs():
        arrival_kernel[(5,)](counter, last, TOTAL=5)
    assert last.tolist() == [1, 0, 0, 0, 0] and counter.item() == 0


def same_in_any_order(op, inputs, activation, got):
    """Bit for bit, also when the last program to arrive is another one."""
    with reversed_programs():
        again = run(fused, op, inputs, activation)
    running = {name for name in got if "norm.running" in name}
    assert all(torch.equal(got[name], again[name]) for name in got if name not in running)


LAYOUTS = ("contiguous", "channels_last")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_many_tiles(op, layout):
    if not op.main and LAYOUTS[OPS.index(op) % 2] != layout:
        pytest.skip("variants take turns")
    epilogue = op.epilogue and layout == "contiguous"
    inputs = make(op, (2, 3, 3, 5), layout=layout, residual=epilogue, values="ties" if epilogue else "random")
    activation = "silu" if epilogue else "none"
    with tuning.forced(**CUT):
        got = check(op, inputs, activation)
        if op.main:
            same_in_any_order(op, inputs, activation, got)


@pytest.mark.parametrize("op", [op for op in OPS if op.main or "pools" in op.name or "even" in op.name], ids=str)
def test_more_splits_than_positions(op):
    with tuning.forced(**EMPTY):
        check(op, make(op, (2, 5, 3, 3), residual=op.epilogue, seed=2), "relu" if op.epilogue else "none")


@pytest.mark.parametrize("block_p", [16, 64])
@pytest.mark.parametrize("op", [op for op in OPS if {"axis_squeeze", "local_squeeze"} & set(op.families)], ids=str)
def test_tiles_of_several_rows(op, block_p):
    """Of two rows, or of whole planes, through whose channels two programs walk."""
    inputs = make(op, (2, 5, 5, 5), seed=4)
    with tuning.forced(block_c=2, block_p=block_p, splits=2):
        got = check(op, inputs)
        if op.main:
            same_in_any_order(op, inputs, "none", got)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", ["channel_statistics", "channel_statistics-even", "spatial_statistics-even", "sse", "scse-max", "shuffle"])
def test_values_across_tiles(name, values):
    op = BY_NAME[name]
    with tuning.forced(**CUT):
        check(op, make(op, (2, 3, 3, 5), values=values, seed=3))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 5, 3), (3, 3, 7, 7), (2, 16, 4, 4), (1, 19, 14, 2)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_shapes(op, shape):
    if op.refused(shape):
        pytest.skip("torch's BatchNorm refuses a single value in training")
    check(op, make(op, shape, layout=("contiguous", "channels_last")[sum(shape) % 2], seed=11))


@pytest.mark.parametrize("op", [op for op in OPS if 5 in op.ranks], ids=str)
def test_ranks(op):
    check(op, make(op, (2, 5, 9), residual=op.epilogue, seed=5), "relu" if op.epilogue else "none")
    check(op, make(op, (2, 3, 2, 3, 4), layout="channels_last", seed=6))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_empty_batch(op, launches):
    if op.refused((0, 3, 4, 5)):
        pytest.skip("torch's BatchNorm refuses an empty batch in training")
    got = check(op, make(op, (0, 3, 4, 5), residual=op.epilogue))
    assert got["y"].shape[0] == 0 and not launches


WIDE = ["se", "ese", "channel_attention-pools", "channel_attention-fc", "scse", "cbam", "sk"]


@pytest.mark.parametrize("name", WIDE)
def test_excite_in_blocks_inside(name, launches):
    """More channels than the excite inside the squeeze takes at once."""
    op = BY_NAME[name]
    check(op, make(op, (1, 130, 34, 32), seed=7), wanted=["x", "w2"])
    assert launches[:2].count("linear_kernel") == 0


# how the excite of large weights is done: in launches of its own, or between the two passes in theirs
STRATEGIES = {"launches": {"lag": 0}, "stages": {"lag": 1}}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", WIDE)
def test_excite_in_blocks_batched(name, strategy, launches):
    """More channels, and more images, than one tile of the excite after the squeeze holds."""
    op = BY_NAME[name]
    with tuning.forced(**STRATEGIES[strategy]):
        check(op, make(op, (18, 40, 2, 1), seed=8))
    staged = {kernel for kernel in launches if "stages" in kernel}
    if name in ("cbam", "scse", "sk"):  # which have passes of their own
        assert not staged and (launches[1] == "linear_kernel") == (name != "cbam")  # which saves that launch
    elif strategy == "launches":
        assert not staged and launches[1] == "linear_kernel"
    else:
        assert staged == {"channel_gate_stages_fwd_kernel", "channel_gate_stages_bwd_kernel"} and launches[0] in staged


# on matrix units and in registers, ranges of a sum's terms that follow each other, and more of them than there are terms for
PRODUCTS = [Tile(16, 32, 32, 2, True), Tile(32, 16, 32, 1, True), Tile(8, 32, 16, 4), Tile(16, 8, 32, 8)]


@pytest.mark.parametrize(("strategy", "tile"), [(s, t) for s in STRATEGIES for t in PRODUCTS if s == "launches" or t.units], ids=str)
@pytest.mark.parametrize("name", ["se", "ese", "channel_attention-pools"])
def test_products_of_the_excite(name, tile, strategy):
    op = BY_NAME[name]
    inputs = make(op, (18, 40, 2, 1), dtype=(torch.float32, torch.bfloat16)[PRODUCTS.index(tile) % 2], seed=8)
    with tuning.forced(tile=tile, **STRATEGIES[strategy]):
        got = check(op, inputs)
        if strategy == "launches":  # a launch of stages has no other order than its tickets'
            same_in_any_order(op, inputs, "none", got)


@pytest.mark.parametrize("values", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["se", "ese"])
def test_values_in_products_of_the_excite(name, values):
    with tuning.forced(tile=PRODUCTS[0]):
        check(BY_NAME[name], make(BY_NAME[name], (3, 40, 2, 1), values=values, seed=8))


@pytest.mark.parametrize("values", ["offset", "inf"])
@pytest.mark.parametrize("name", ["covariance", "covariance-relu"])
def test_covariance_in_blocks(name, values):
    """More channels than one program takes; an infinite value that is not among the first positions, which the sums are centred by."""
    with tuning.forced(block_c=16, block_p=16):
        check(BY_NAME[name], make(BY_NAME[name], (2, 37, 5, 7), values=values, seed=10))


def test_covariance_of_a_map_that_begins_elsewhere():
    """The first 16 of 256 positions, which the sums are centred by, are as far from the rest as can be: 16 times the error of centred ones."""
    x = torch.randn(1, 5, 32, 8, generator=torch.Generator().manual_seed(0)) + 3000
    x.flatten(2)[..., :16] = 0
    flat = x.double().flatten(2)
    exact = (flat - flat.mean(2, keepdim=True)) @ (flat - flat.mean(2, keepdim=True)).transpose(1, 2) / 256
    limit = 2 * 16 * torch.finfo(torch.float32).eps
    assert ((ops.covariance(x).double() - exact).abs() <= limit * exact.abs().max()).all()


@pytest.mark.parametrize("name", ["eca", "eca-circular"])
def test_eca_in_blocks(name):
    """More images than one program of its backward takes, and more channels than that one and the excite inside the squeeze do."""
    op = BY_NAME[name]
    inputs = make(op, (9, 1030, 2, 1), seed=9)
    same_in_any_order(op, inputs, "none", check(op, inputs))


def test_a_range_without_positions_adds_nothing_to_a_log_sum():
    """However small the values are: 9 steps in 4 ranges of 3."""
    x = torch.full((2, 3, 6, 6), -100.0, requires_grad=True)
    with tuning.forced(block_c=2, block_p=4, splits=4):
        (z,) = ops.channel_statistics(x, ["lse"]).unbind(1)
        torch.testing.assert_close(z, x.detach().flatten(2).logsumexp(2))
        torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], torch.full_like(x, 1 / 36))


@pytest.mark.parametrize("at", ["map", "weight"])
def test_what_a_strided_convolution_passes_over(at):
    """An infinite value there reaches neither the weight's gradient nor, from the weight, the map's."""
    net = torch.nn.Conv2d(4, 2, 1, 2, bias=False)
    x = torch.randn(1, 4, 6, 6)
    with torch.no_grad():
        if at == "map":
            x[0, 1, 1, 1] = float("inf")
        else:
            net.weight[0, 1] = float("inf")
    found = []
    for convolved in (lambda x: convolve(x, net, "sigmoid")[0], lambda x: net(x.relu())):
        leaf = x.clone().requires_grad_()
        y = convolved(leaf)
        found.append(torch.autograd.grad(y, [leaf, net.weight], torch.ones_like(y)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)
