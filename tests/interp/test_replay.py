"""A call's plan does what its launcher did: the same kernels in the same order, and the same bits."""

from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME, MAIN, fused, make, run
from repeats import check_third_call, no_launcher, plans
from torch import nn

from tritattn import _library, _replay, ops, tuning

SHAPE = (2, 5, 3, 4)
X = torch.arange(2.0 * 5 * 3 * 4).view(SHAPE).sin()


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """Plans are made in the interpreter too; how many there are, and why others could not be made."""
    monkeypatch.setattr(_replay, "enabled", True)
    return plans(monkeypatch)


def weights():
    return [torch.full((2, 5), 0.1), None, torch.full((5, 2), 0.2), None]


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_the_third_call_repeats_the_second(op, monkeypatch):
    layout = ("contiguous", "channels_last")[MAIN.index(op) % 2]
    activation, options = ("silu", {"residual": True}) if op.epilogue else ("none", {})
    check_third_call(op, lambda seed: make(op, SHAPE, dtype=torch.bfloat16, layout=layout, seed=seed, **options), activation, monkeypatch)


def test_the_same_kernels_in_the_same_order(launches):
    every = []
    inputs = make(BY_NAME["cbam"], SHAPE)
    for _ in range(3):
        launches.clear()
        run(fused, BY_NAME["cbam"], inputs)
        every.append(list(launches))
    assert every[0] == every[1] == every[2]


def test_without_gradients_only_the_result_is_kept(found, monkeypatch):
    x, params = X.clone(), weights()
    expected = [ops.se(x + i, *params) for i in range(3)]
    (plan,) = _library._families["channel_gate"].plans.values()
    assert len(plan.results) == 1 and found() == (1, [])
    no_launcher(monkeypatch)
    for i, y in enumerate(expected):
        assert ops.se(x + i, *params).equal(y)


def test_one_tensor_in_two_places_is_two_in_the_plan(monkeypatch):
    x, residual = X.clone(), X.cos()
    expected = ops.se(x, *weights(), residual=residual)
    _library._families["channel_gate"].plans.clear()
    for _ in range(2):
        ops.se(x, *weights(), residual=x)
    no_launcher(monkeypatch)
    assert ops.se(x, *weights(), residual=residual).equal(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:, :, :, :3],
        lambda x: x.double(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(SHAPE),  # begins 4 bytes further
    ],
    ids=["shape", "dtype", "layout", "alignment"],
)
def test_another_kind_of_input_takes_the_launcher(change, monkeypatch):
    for _ in range(3):
        ops.se(X, *weights())
    x = change(X)
    y = ops.se(x, *weights())
    with _replay.off():
        assert y.equal(ops.se(x, *weights()))
    no_launcher(monkeypatch)
    with pytest.raises(AssertionError, match="a launcher ran"):
        ops.se(x, *weights())


def test_forced_tiles_take_the_launcher(launches):
    x = torch.ones(2, 5, 8, 8)  # so large that one launch is chosen
    for _ in range(3):
        ops.se(x, *weights())
    with tuning.forced(lag=0):
        launches.clear()
        ops.se(x, *weights())
        assert launches == ["channel_squeeze_fwd_kernel", "gate_fwd_kernel"]
    launches.clear()
    ops.se(x, *weights())
    assert launches == ["channel_gate_ticket_fwd_kernel"]


def test_results_are_new_every_time():
    first, second = [ops.se(X, *weights()) for _ in range(4)][2:]
    assert first.data_ptr() != second.data_ptr()
    x = X.clone().requires_grad_()
    grads = [torch.autograd.grad(ops.se(x, *weights()).sum(), x)[0] for _ in range(4)]
    assert grads[2].equal(grads[3]) and grads[2].data_ptr() != grads[3].data_ptr()


def test_operators_between_kernels_are_repeated(found, monkeypatch):
    """torch's own convolution in CBAM's spatial half with a BatchNorm that trains, and its gradients, which come as a tuple."""
    op = BY_NAME["cbam"]
    inputs = make(op, SHAPE)
    expected = run(fused, op, inputs)
    for _ in range(2):
        run(fused, op, inputs)
    assert found()[0] and not found()[1]
    no_launcher(monkeypatch)
    got = run(fused, op, inputs)
    assert all(got[name].equal(value) for name, value in expected.items() if "running" not in name)


def test_flags_around_an_operator_are_set_again(monkeypatch):
    seen = []
    gradients = torch.ops.aten.convolution_backward.default

    def watched(*args):
        seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return gradients(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", watched)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    op = BY_NAME["cbam"]
    inputs = make(op, SHAPE)
    for _ in range(3):
        run(fused, op, inputs)
    assert seen == [(True, False)] * 3


def test_norms_that_train_are_called_each_time():
    norm = nn.BatchNorm2d(5)
    for i in range(4):
        ops.se(X, *weights(), before_norm=norm)
        assert norm.num_batches_tracked == i + 1
    assert not norm.running_mean.equal(torch.zeros(5))


def test_what_a_plan_cannot_hold_takes_the_no_launcher(monkeypatch):
    family = _library._families["channel_gate"]
    launch = family.launch
    elsewhere = torch.ones(())

    def meddling(*args):
        y, *rest = launch(*args)
        return (y + elsewhere, *rest)

    monkeypatch.setattr(family, "launch", meddling)
    expected = ops.se(X, *weights())
    for _ in range(3):
        assert ops.se(X, *weights()).equal(expected)
    assert list(family.plans.values()) == ["a tensor from elsewhere"]


@triton.jit
def doubling_kernel(x_ptr, y_ptr):
    i = tl.arange(0, 8)
    tl.store(y_ptr + i, 2 * tl.load(x_ptr + i))


def test_parts_of_a_tensor_are_found_again():
    def call(tensors):
        (x,) = tensors
        kernels, recording = SimpleNamespace(doubling_kernel=doubling_kernel), _replay.current()
        kernels = kernels if recording is None else recording.watched(kernels)
        memory = x.new_empty(16)
        kernels.doubling_kernel[(1,)](x, memory[8:])
        kernels.doubling_kernel[(1,)](memory[8:], memory[:8])
        return (memory,)

    made: dict = {}
    for i in range(4):
        x = torch.arange(8.0) + i
        (y,) = _replay.repeated(made, (), (x,), call)
        assert y.equal(torch.cat([4 * x, 2 * x]))
    assert [type(plan) for plan in made.values()] == [_replay.Plan]


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_replay, "MOST", 3)
    for width in range(1, 9):
        ops.se(torch.ones(1, 5, 2, width), *weights())
    assert len(_library._families["channel_gate"].plans) <= 3
