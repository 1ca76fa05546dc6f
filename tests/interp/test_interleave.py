"""Programs that wait for each other: every order of theirs gives the same bits, and they need no more of them at once than a launch guarantees."""

import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME, DTYPES, VALUES, check, fused, make, run
from tritattn.kernels.excite import arrive, wait
from triton.runtime.errors import InterpreterError

from perf.interleave import interleaved
from tritattn import _linear, ops, tuning
from tritattn.ops import _launch

OPS = [BY_NAME[name] for name in ("sse", "sse-hard", "scse", "scse-max", "gc", "gc-both")]
# rows of whole vectors, rows that only together have vectors, and neither; channels that fill no block
SHAPES = [(3, 5, 2, 4), (2, 8, 3, 3), (2, 7, 3, 5)]
FORCED = {"group": True, "block_c": 4, "splits": 2}


@triton.jit
def meeting_kernel(x_ptr, y_ptr, counter_ptr, TOTAL: tl.constexpr):
    """y_i = x_(i+1), once every program has stored its x."""
    i = tl.program_id(0)
    tl.store(x_ptr + i, i)
    if not arrive(counter_ptr, TOTAL):
        wait(counter_ptr + 1)
    arrive(counter_ptr + 1, TOTAL)
    tl.store(y_ptr + i, tl.load(x_ptr + (i + 1) % TOTAL))


def meet(programs, **bounds):
    x, y, counter = torch.full((programs,), -1), torch.zeros(programs, dtype=torch.int64), torch.zeros(2, dtype=torch.int32)
    with interleaved(**bounds):
        meeting_kernel[(programs,)](x, y, counter, TOTAL=programs, launch_cooperative_grid=True)
    return y.tolist(), counter.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_meeting_of_all_programs(seed):
    assert meet(5, seed=seed, resident=5) == ([1, 2, 3, 4, 0], [0, 0])


def test_a_meeting_that_one_cannot_attend():
    with pytest.raises(InterpreterError, match="no progress: 4 programs wait for each other, 1 have not started"):
        meet(5, resident=4)


def test_a_program_that_waits_for_a_later_one():
    """In a launch that is not cooperative: an error, and not a test that never ends."""
    x, y, counter = torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="no progress: a program waits for another"):
        meeting_kernel[(2,)](x, y, counter, TOTAL=2)


def test_an_error_in_a_program_ends_the_launch():
    with pytest.raises(InterpreterError, match="unsupported operand"), interleaved():
        meeting_kernel[(2,)](torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.int32), TOTAL="two", launch_cooperative_grid=True)


@pytest.mark.parametrize("op", [op for op in OPS if op.main], ids=str)
def test_the_same_bits_in_any_order(op):
    inputs = make(op, (3, 8, 3, 3), residual=True)
    found = []
    with tuning.forced(**FORCED):
        for seed in range(3):
            with interleaved(seed, resident=4):  # two blocks of channels, two images at once
                found.append(run(fused, op, inputs, "relu"))
    assert all(torch.equal(t, found[0][name]) for got in found for name, t in got.items())
    assert not any(counter.any() for counter in _launch._counters.values())


def test_a_group_needs_all_of_its_programs():
    x, w = torch.randn(2, 12, 3, 3), torch.randn(1, 12, 1, 1)
    with tuning.forced(**{**FORCED, "splits": 1}):
        with interleaved(resident=3):
            ops.sse(x, w)
        with pytest.raises(InterpreterError, match="no progress"), interleaved(resident=2):
            ops.sse(x, w)
    _launch._counters.clear()  # which the programs that were given up left as they stood


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_dtypes(op, dtype, launches):
    turn = OPS.index(op) + list(DTYPES).index(dtype)
    with tuning.forced(**FORCED):
        check(op, make(op, SHAPES[turn % 3], dtype=DTYPES[dtype], residual=turn % 2 == 0), ("relu", "silu")[turn % 2])
    family = "context" if str(op).startswith("gc") else "pixel_gate"
    assert f"{family}_group_fwd_kernel" in launches and f"{family}_group_bwd_kernel" in launches


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("op", [BY_NAME["sse"], BY_NAME["scse-max"], BY_NAME["gc"]], ids=str)
def test_values(op, values):
    shape = SHAPES[len(values) % 3]
    with tuning.forced(**FORCED):
        check(op, make(op, shape, values=values, residual=len(values) % 2 == 0, seed=2), "silu" if len(values) > 3 else "none")


# every kind of excite, one or two pools, whose maximum's ties share its gradient, a norm and an activation before, branches, and planes
# that do not fit on chip
NAMES = ("se", "ese", "eca", "channel_attention", "se-even", "se-before", "scse", "scse-max", "cbam", "sk", "sk-external", "splat")
PLANES = ("shuffle", "simam")
TICKETED = [BY_NAME[name] for name in (*NAMES, *PLANES)]
BOTH = "channel_gate_ticket_fwd_kernel", "channel_gate_ticket_bwd_kernel"
# of the others the forward pass alone
KERNELS = dict.fromkeys(("scse", "scse-max"), ("concurrent_gate_ticket_fwd_kernel",)) | {"cbam": ("both_squeezes_ticket_fwd_kernel",)}
KERNELS |= dict.fromkeys(PLANES, ("plane_ticket_fwd_kernel", "plane_ticket_bwd_kernel"))
KERNELS |= dict.fromkeys(("sk", "sk-external", "splat"), ("select_ticket_fwd_kernel", "select_ticket_bwd_kernel"))

IMAGE = (8, 6, 8)  # whose bytes are more than four times its weights
TICKETS = {"lag": 2, "splits": 2, "block_c": 4, "block_p": 32}


def tickets(op, **fields):
    """scSE's second pass needs all channels at once."""
    return tuning.forced(**{**TICKETS, **({"block_c": 8} if str(op) in ("scse", "scse-max") else {}), **fields})


def step(op, inputs, **bounds):
    with tickets(op), interleaved(every=True, **bounds):
        return run(fused, op, inputs, "relu")


@pytest.mark.parametrize("op", TICKETED, ids=str)
def test_tickets_in_any_order(op, launches):
    inputs = make(op, (3, *IMAGE), residual=True)
    want = step(op, inputs, resident=1)
    assert set(KERNELS.get(str(op), BOTH)) <= set(launches)
    for seed, resident in enumerate((2, 5, None)):
        found = step(op, inputs, seed=seed, resident=resident)
        assert all(torch.equal(t, want[name]) for name, t in found.items()), resident
    assert not any(counter.any() for counter in _launch._counters.values())


@pytest.mark.parametrize(("op", "values"), [(op, v) for i, op in enumerate(TICKETED) for j, v in enumerate(VALUES) if (i + j) % 2], ids=str)
def test_values_of_ticketed_maps(op, values, launches):
    """Shares of an image that end within a block, and more images between the passes than there are; each block takes every other kind of values."""
    turn = TICKETED.index(op) + len(values)
    with tickets(op, lag=1 + turn % 4, block_p=16):
        layout = ("contiguous", "channels_last")[turn // 2 % 2]
        check(op, make(op, (2, *IMAGE), values=values, layout=layout, residual=turn % 2 == 0, seed=2), ("none", "relu", "silu")[turn % 3])
    assert set(KERNELS.get(str(op), BOTH)) <= set(launches)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANES)
def test_dtypes_of_ticketed_planes(name, dtype, launches):
    """Channels-last rows, which a shuffled map reads as two runs; more ranges than there are blocks of positions."""
    op = BY_NAME[name]
    with tickets(op, splits=5, block_p=16, lag=0 if dtype == "fp16" else 3):
        check(op, make(op, (2, *IMAGE), dtype=DTYPES[dtype], layout="channels_last", residual=dtype == "bf16"), "relu")
    assert launches[:2] == list(KERNELS[name])


@pytest.mark.parametrize("name", ["cweight", "norm_bias", "residual"])
def test_ticketed_planes_without_the_gradient_of_the_map(name, launches):
    op = BY_NAME["shuffle"]
    inputs = make(op, (2, *IMAGE), residual=True)
    for other, t in inputs.tensors().items():
        t.requires_grad_(other == name)
    with tickets(op):
        check(op, inputs, "relu", [name])
    assert not any(counter.any() for counter in _launch._counters.values())


# every kind of excite whose weights can be large
STAGED = [BY_NAME[name] for name in ("se", "ese", "channel_attention", "channel_attention-pools", "channel_attention-fc", "se-even", "se-before")]
STAGES = {"channel_gate_stages_fwd_kernel", "channel_gate_stages_bwd_kernel"}


def stages(monkeypatch, images, lag):
    """Blocks of so many images, tiles that cut the products' rows and columns, and ranges of their sums."""
    monkeypatch.setattr(_linear, "blocks", lambda *_: (images, lag))
    return tuning.forced(_linear.Tile(2, 4, 4, 2), lag=1, splits=2, block_c=4, block_p=4)


@pytest.mark.parametrize(("name", "lag"), [("se", 1), ("ese", 2), ("channel_attention", 1)])
def test_stages_in_any_order(name, lag, launches, monkeypatch):
    """Blocks of two images, the last of one."""
    op = BY_NAME[name]
    inputs = make(op, (3, 8, 2, 3), residual=True)
    found = []
    with stages(monkeypatch, 2, lag):
        for seed, resident in enumerate((1, 3, None)):
            with interleaved(seed, resident, every=True):
                found.append(run(fused, op, inputs, "relu"))
    assert set(launches) >= STAGES
    assert all(torch.equal(t, found[0][name]) for got in found for name, t in got.items())
    assert not any(counter.any() for counter in _launch._counters.values())


@pytest.mark.parametrize(("op", "values"), [(STAGED[(i + j) % len(STAGED)], v) for i, v in enumerate(VALUES) for j in (0, 3)], ids=str)
def test_values_of_maps_with_stages(op, values, launches, monkeypatch):
    """A block that is larger than the batch, as large, or smaller."""
    turn = STAGED.index(op) + len(values)
    inputs = make(op, (3, 8, 2, 3), values=values, residual=turn % 2 == 0, seed=2)
    # where there are two pools w2's gradient takes the sum of what they make of the hidden layer, so Inf does not meet the zero of one of them
    wanted = [name for name in inputs.tensors() if name != "w2" or "inf" not in values]
    with stages(monkeypatch, 1 + turn % 4, 1):
        check(op, inputs, ("none", "relu", "silu")[turn % 3], wanted)
    assert set(launches) >= STAGES


@pytest.mark.parametrize(("op", "name"), [("se", "x"), ("se", "w1"), ("se", "b2"), ("se", "residual"), ("eca", "x"), ("eca", "w"), ("ese", "x")])
def test_tickets_for_the_gradient_of_the_map_alone(op, name, launches):
    op = BY_NAME[op]
    inputs = make(op, (2, *IMAGE), residual=True)
    for other, t in inputs.tensors().items():
        t.requires_grad_(other == name)
    check(op, inputs, "relu", [name])
    forward, *backward = launches
    assert forward == "channel_gate_ticket_fwd_kernel"
    assert backward == ["channel_gate_ticket_bwd_kernel"] if name == "x" else "channel_gate_ticket_bwd_kernel" not in backward


@pytest.mark.parametrize("name", ["se", "eca"])
def test_the_excites_products_in_any_order(name):
    """Ranges of their sums, and blocks of a convolution's gradient, which the last program to arrive adds."""
    op = BY_NAME[name]
    inputs = make(op, (9, 6, 2, 1) if name == "se" else (9, 300, 2, 1))
    found = []
    for seed, resident in enumerate((1, 3, None)):
        with tuning.forced(_linear.Tile(4, 4, 4, 2)), interleaved(seed, resident, every=True):
            found.append(run(fused, op, inputs))
    assert all(torch.equal(t, found[0][key]) for got in found for key, t in got.items())
    assert not any(counter.any() for counter in _launch._counters.values())
