"""A call's plan does what its launcher did: the same kernels in the same order, and the same bits."""

import pytest
import torch
from cases import BY_NAME, MAIN, fused, make, run
from torch import nn

from tritattn import _library, _replay, ops, tuning

SHAPE = (2, 5, 3, 4)
X = torch.arange(2.0 * 5 * 3 * 4).view(SHAPE).sin()


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    """A function that says how many plans there are, and why others could not be made."""
    monkeypatch.setattr(_replay, "enabled", True)
    for family in _library._families.values():
        monkeypatch.setattr(family, "plans", {})

    def found():
        every = [plan for family in _library._families.values() for plan in family.plans.values()]
        return sum(isinstance(plan, _replay.Plan) for plan in every), [plan for plan in every if isinstance(plan, str)]

    return found


def launcher(monkeypatch):
    """From now on no launcher runs."""

    def refuse(*args):
        raise AssertionError("a launcher ran")

    for family in _library._families.values():
        monkeypatch.setattr(family, "launch", refuse)
        monkeypatch.setattr(family, "backward", refuse)


def weights():
    return [torch.full((2, 5), 0.1), None, torch.full((5, 2), 0.2), None]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_the_third_call_repeats_the_second(op, layout, plans, launches, monkeypatch):
    activation, options = ("silu", {"residual": True}) if op.epilogue else ("none", {})

    def made(seed):
        return make(op, SHAPE, dtype=torch.bfloat16, layout=layout, seed=seed, **options)

    inputs, others = made(1), made(2)
    for module, other in zip(inputs.modules().values(), others.modules().values(), strict=True):
        other.load_state_dict(module.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(_replay, "enabled", False)
        expected = run(fused, op, others.to(torch.bfloat16), activation)
    usual, launches[:] = list(launches), []
    for seed in (3, 1):
        run(fused, op, made(seed), activation)
    launches.clear()
    count, problems = plans()
    assert count and not problems, problems
    launcher(monkeypatch)
    found = run(fused, op, others, activation)
    assert list(launches) == usual
    for name, value in expected.items():
        assert found[name].equal(value) and found[name].stride() == value.stride(), name


def test_without_gradients_only_the_result_is_kept(plans, monkeypatch):
    x, params = X.clone(), weights()
    expected = [ops.se(x + i, *params) for i in range(3)]
    (plan,) = _library._families["channel_gate"].plans.values()
    assert len(plan.results) == 1 and plans() == (1, [])
    launcher(monkeypatch)
    for i, y in enumerate(expected):
        assert ops.se(x + i, *params).equal(y)


def test_one_tensor_in_two_places_is_two_in_the_plan(monkeypatch):
    x, residual = X.clone(), X.cos()
    expected = ops.se(x, *weights(), residual=residual)
    _library._families["channel_gate"].plans.clear()
    for _ in range(2):
        ops.se(x, *weights(), residual=x)
    launcher(monkeypatch)
    assert ops.se(x, *weights(), residual=residual).equal(expected)
    assert ops.se(residual, *weights(), residual=residual).equal(residual * (expected - residual) / x + residual) is False


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
    found = ops.se(x, *weights())
    with monkeypatch.context() as patch:
        patch.setattr(_replay, "enabled", False)
        assert found.equal(ops.se(x, *weights()))
    launcher(monkeypatch)
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


def test_operators_between_kernels_are_repeated(plans, monkeypatch):
    """torch's own convolution in CBAM's spatial half with a BatchNorm that trains, and its gradients, which come as a tuple."""
    op = BY_NAME["cbam"]
    inputs = make(op, SHAPE)
    expected = run(fused, op, inputs)
    for _ in range(2):
        run(fused, op, inputs)
    assert plans()[0] and not plans()[1]
    launcher(monkeypatch)
    found = run(fused, op, inputs)
    assert all(found[name].equal(value) for name, value in expected.items() if "running" not in name)


def test_norms_that_train_are_called_each_time():
    norm = nn.BatchNorm2d(5)
    for i in range(4):
        ops.se(X, *weights(), before_norm=norm)
        assert norm.num_batches_tracked == i + 1
    assert not norm.running_mean.equal(torch.zeros(5))


def test_what_a_plan_cannot_hold_takes_the_launcher(monkeypatch):
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


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(_replay, "MOST", 3)
    for width in range(1, 9):
        ops.se(torch.ones(1, 5, 2, width), *weights())
    assert len(_library._families["channel_gate"].plans) <= 3
