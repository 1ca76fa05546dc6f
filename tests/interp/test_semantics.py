"""Whose gradient a maximum is, what a BatchNorm between squeeze and gate keeps doing, and tensors as networks really hand them over."""

import pytest
import torch
import torch.nn.functional as F
from cases import BY_NAME, MAIN, Op, check, eager, fused, make, run
from eager_blocks import GATES
from torch import nn

from tritattn import ops, tuning

SHAPE = (2, 5, 3, 4)

# -- ties -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ties(layout):
    """All equal: "first" gives the gradient of a maximum to one element, "even" the same share to each."""
    x = torch.ones(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    (first,) = torch.autograd.grad(ops.channel_statistics(x, ["max"]).sum(), x)
    assert first[:, :, 0, 0].eq(1).all() and first.sum() == 2 * 3
    (even,) = torch.autograd.grad(ops.channel_statistics(x, ["max"], max_grad="even").sum(), x)
    torch.testing.assert_close(even, torch.full_like(x, 1 / 20))
    (first,) = torch.autograd.grad(ops.spatial_statistics(x, ["max"]).sum(), x)
    assert first[:, 0].eq(1).all() and first.sum() == 2 * 4 * 5
    (even,) = torch.autograd.grad(ops.spatial_statistics(x, ["max"], max_grad="even").sum(), x)
    torch.testing.assert_close(even, torch.full_like(x, 1 / 3))


@pytest.mark.parametrize("tiles", [{}, {"block_c": 1, "block_p": 2, "splits": 3}])
@pytest.mark.parametrize("max_grad", ["first", "even"])
def test_the_lowest_value_can_be_the_maximum(max_grad, tiles):
    x = torch.full((1, 2, 3, 3), -torch.inf, requires_grad=True)
    with tuning.forced(**tiles):
        for statistics, dim in ((ops.channel_statistics, (2, 3)), (ops.spatial_statistics, 1)):
            y = statistics(x, ["max"], max_grad=max_grad)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert y.eq(-torch.inf).all() and dx.sum(dim).allclose(torch.ones(()))
            assert dx.flatten()[0] == (1 if max_grad == "first" else dx.flatten()[-1])


# -- BatchNorm --------------------------------------------------------------------------------------------------------------------------------

NORMS = {
    "cumulative": {"momentum": None},
    "no affine": {"affine": False},
    "no bias": {"bias": False},
    "no weight": {"weight": False},
    "no statistics": {"track_running_stats": False},
    "nothing": {"affine": False, "track_running_stats": False},
    "large eps": {"eps": 0.1},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["cbam-train", "spatial_attention-train"])
def test_batchnorm(name, norm, training):
    op = BY_NAME[name]
    inputs = make(op, SHAPE, residual=True)
    inputs.params["norm"] = _norm(training, **NORMS[norm])
    check(op, inputs, "relu")


def _norm(training, bias=True, weight=True, **options):
    norm = nn.BatchNorm2d(1, **options).train(training)
    if not bias:
        norm.bias = None  # no argument of older torch
    if not weight:
        norm.weight = None
    if norm.weight is not None:
        nn.init.constant_(norm.weight, 1.5)
    if norm.running_mean is not None:
        norm.running_mean.fill_(-0.5)
        norm.running_var.fill_(2.0)
    return norm


def test_batchnorm_counts_batches_and_runs_its_hooks():
    op = BY_NAME["cbam-train"]
    inputs = make(op, SHAPE)
    norm, seen = inputs.params["norm"], []
    norm.register_forward_hook(lambda *_: seen.append("forward"))
    run(fused, op, inputs)
    run(fused, op, inputs)
    assert norm.num_batches_tracked == 2 and seen == ["forward"] * 2
    norm.eval()
    run(fused, op, inputs)
    assert norm.num_batches_tracked == 2 and len(seen) == 3


def test_batchnorm_in_eval_is_part_of_the_convolution(launches, monkeypatch):
    op = BY_NAME["cbam-eval"]
    inputs = make(op, SHAPE)
    monkeypatch.delattr(nn.functional, "batch_norm")  # what calling it would call
    with torch.no_grad():
        fused(op, inputs.x, inputs.params)
    assert launches[-3:] == ["spatial_squeeze_fwd_kernel", "spatial_convolution_fwd_kernel", "gate_fwd_kernel"]


FUSED = "pointwise_convolution_fwd_kernel"


def test_convolution_of_second_order_pooling(launches):
    """Fused with the ReLU before it: for two-byte maps, and where a call of the layer would compute in the map's dtype and do nothing else."""

    def fused(dtype, layer, autocast=False):
        launches.clear()
        x = torch.ones(1, 4, 2, 3, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ops.gsop(x, (layer, nn.BatchNorm2d(2, dtype=layer.weight.dtype).eval()), lambda s: s.repeat(1, 2, 1, 1)[:, :, :1])
        return FUSED in launches

    layer = nn.Conv2d(4, 2, 1)
    assert not fused(torch.float32, layer) and not fused(torch.bfloat16, layer) and not fused(torch.float32, layer, autocast=True)
    assert fused(torch.bfloat16, layer, autocast=True) and fused(torch.float16, layer.half()) and not fused(torch.bfloat16, nn.Conv2d(4, 2, 1, 3))
    layer.register_forward_hook(lambda *_: None)
    assert not fused(torch.float16, layer)


# -- tensors ----------------------------------------------------------------------------------------------------------------------------------


def _strided(t):
    """The same values, not contiguous, not even where there is one dimension."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("op", [op for op in MAIN if op.shapes(SHAPE)], ids=str)
def test_strided_parameters(op):
    inputs = make(op, SHAPE)
    for name, t in inputs.params.items():
        if isinstance(t, torch.Tensor):
            inputs.params[name] = _strided(t.detach()).requires_grad_()
    check(op, inputs)


@pytest.mark.parametrize("op", [op for op in MAIN if op.shapes(SHAPE).get("w1") and op.shapes(SHAPE).get("w2", (0,))[0] == SHAPE[1]], ids=str)
def test_transposed_and_expanded_parameters(op):
    inputs = make(op, SHAPE)
    w2 = inputs.params["w2"].detach()
    inputs.params["w1"] = w2.transpose(0, 1).detach().requires_grad_()
    inputs.params["b1"] = torch.ones(1).expand(len(inputs.params["w1"])).detach().requires_grad_() if inputs.params["b1"] is not None else None
    check(op, inputs)


WEIGHTS = [(), (1,), (4,), (5, 1, 1), (3, 4), (2, 1, 1, 1), (1, 5, 1, 1), (1, 1, 3, 4), (2, 5, 1, 4), (1, 5, 3, 1), (2, 1, 3, 1), SHAPE]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", WEIGHTS, ids=str)
def test_weights_of_any_broadcastable_shape(size, layout):
    op = Op(
        "gate", lambda s: {"weights": size}, lambda x, p, **more: ops.gate(x, p["weights"], gate="hard_sigmoid", **more),
        lambda x, p: x * GATES["hard_sigmoid"](p["weights"]), (), ("gate",),
    )  # fmt: skip
    check(op, make(op, SHAPE, layout=layout, residual=True), "silu")


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("last", [True, False])
def test_weights_of_other_ranks(shape, last):
    size = (1, 1, *shape[2:]) if last else (shape[0], 1, *(1,) * (len(shape) - 3), shape[-1])
    op = BY_NAME["gate-whole"]
    inputs = make(op, shape)
    inputs.params["weights"] = torch.linspace(-1, 1, torch.Size(size).numel()).view(size).requires_grad_()
    check(op, inputs)


def test_changing_the_map_before_backward_is_an_error():
    op = BY_NAME["se"]
    inputs = make(op, SHAPE)
    x = 1 * inputs.x
    y = fused(op, x, inputs.params)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_reference_path(op):
    """The same calls with the kernels switched off."""
    import tritattn

    with tritattn.backend("reference"):
        check(op, make(op, SHAPE, dtype=torch.bfloat16, residual=op.epilogue), "gelu" if op.epilogue else "none")
        with torch.no_grad():
            inputs = make(op, SHAPE, dtype=torch.float64)
            expected = eager(op, inputs.x, inputs.to(torch.float64).params)
            torch.testing.assert_close(fused(op, inputs.x, inputs.params), expected, rtol=1e-12, atol=1e-12)


# -- selection --------------------------------------------------------------------------------------------------------------------------------


SPLAT = torch.randn(4, 3), None, torch.randn(6, 4), None
MLP = torch.randn(4, 6), None, torch.randn(6, 4), None
PRECEDED = {
    "splat": (
        lambda x, **more: ops.splat(x, *SPLAT, **{"before": "none", **more}),
        ["select_squeeze_fwd_kernel", "linear_kernel", "linear_kernel", "select_gate_fwd_kernel"],
    ),
    "se": (lambda x, **more: ops.se(x, *MLP, **more), ["channel_gate_stages_fwd_kernel"]),
    "se-norm": (lambda x, **more: ops.se(x, *MLP, norm=nn.Identity(), **more), ["channel_squeeze_fwd_kernel", "gate_fwd_kernel"]),
    "eca": (lambda x, **more: ops.eca(x, MLP[0][:1, None, :3], **more), ["channel_gate_ticket_fwd_kernel"]),
}


@pytest.mark.parametrize("affine", ["weight and bias", "weight", "nothing"])
@pytest.mark.parametrize("name", PRECEDED)
def test_batchnorm_in_eval_before_a_block_is_part_of_its_passes(name, affine, launches, monkeypatch):
    call, kernels = PRECEDED[name]
    norm = nn.BatchNorm2d(6, affine=affine != "nothing").eval()
    if affine == "weight":
        norm.bias = None
    with torch.no_grad():
        for t in (*norm.parameters(), norm.running_mean, norm.running_var):
            t.uniform_(0.5, 1.5)
    x = torch.randn(2, 6, 3, 4).to(memory_format=(torch.contiguous_format, torch.channels_last)[len(affine) % 2]).requires_grad_()
    expected = call(F.silu(norm(x)))
    g = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(expected, x, g)
    called = call(x, before="silu", before_norm=norm)  # its parameters need gradients
    for t in norm.parameters():
        assert torch.autograd.grad(called, t, g, retain_graph=True)[0].any()
    launches.clear()
    monkeypatch.delattr(nn.functional, "batch_norm")  # what calling it would call
    with torch.no_grad():
        torch.testing.assert_close(call(x, before="silu", before_norm=norm), expected)
    assert launches == kernels
    y = call(x, before="silu", before_norm=norm.requires_grad_(False))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, g)[0], dx)


def test_split_attention_of_many_slices():
    """More than a launch takes maps: slices are not bound by that."""
    x = torch.randn(2, 30, 3, 4, dtype=torch.float64, requires_grad=True)
    layers = torch.randn(3, 5, dtype=torch.float64), None, torch.randn(30, 3, dtype=torch.float64), None
    y = ops.splat(x, *layers, radix=6)
    slices = x.relu().view(2, 6, 5, 3, 4)
    logits = torch.relu(slices.sum(1).mean((2, 3)) @ layers[0].T) @ layers[2].T
    expected = (slices * logits.view(2, 6, 5, 1, 1).softmax(1)).sum(1)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))


@pytest.mark.parametrize("values", ["inf", "-inf"])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_two_gates_of_an_infinite_value(seed, values):
    """x s + x q is NaN where x is infinite and one gate is zero, which x (s + q) is not."""
    check(BY_NAME["scse"], make(BY_NAME["scse"], (2, 8, 3, 3), values=values, seed=seed))
