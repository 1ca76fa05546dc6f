"""What is refused, before any launch and by its name; what is computed when little is asked for; shapes, strides and dtypes at random."""

import re

import pytest
import torch
from cases import BY_NAME, DTYPES, LAYOUTS, MAIN, TAILS, check, fused, make, y_like
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritattn import ops, tuning

X = torch.zeros(2, 4, 3, 5)
W1, B1, W2, B2 = torch.zeros(2, 4), torch.zeros(2), torch.zeros(4, 2), torch.zeros(4)
MLP = W1, B1, W2, B2
PIXEL = torch.zeros(1, 4, 1, 1)
KERNEL = torch.zeros(1, 2, 3, 3)
HALF = torch.zeros(2)
COORD = W1, B1, W2, B2, W2, B2
ROWS, COLUMNS = torch.zeros(4, 1, 3, 1), torch.zeros(4, 1, 1, 3)
CALLS = {
    "se": lambda x=X, **more: ops.se(x, *MLP, **more),
    "ese": lambda x=X, **more: ops.ese(x, torch.zeros(4, 4), **more),
    "eca": lambda x=X, **more: ops.eca(x, torch.zeros(1, 1, 3), **more),
    "cse": lambda x=X, **more: ops.cse(x, *MLP, **more),
    "sse": lambda x=X, **more: ops.sse(x, PIXEL, **more),
    "scse": lambda x=X, **more: ops.scse(x, *MLP, PIXEL, **more),
    "channel_attention": lambda x=X, **more: ops.channel_attention(x, *MLP, **more),
    "spatial_attention": lambda x=X, **more: ops.spatial_attention(x, KERNEL, **more),
    "cbam": lambda x=X, **more: ops.cbam(x, *MLP, KERNEL, **more),
    "gc": lambda x=X, **more: ops.gc(x, PIXEL, add=torch.relu, **more),
    "ge": lambda x=X, **more: ops.ge(x, **more),
    "shuffle": lambda x=X, **more: ops.shuffle(x, HALF, HALF, HALF, HALF, **{"groups": 1, **more}),
    "simam": lambda x=X, **more: ops.simam(x, **more),
    "gsop": lambda x=X, **more: ops.gsop(x, torch.relu, lambda s: s[:, :, :1], **more),
    "covariance": lambda x=X, **more: ops.covariance(x, **more),
    "sk": lambda x=X, **more: ops.sk((x, X), W1, None, torch.zeros(8, 2), None, **more),
    "splat": lambda x=X, **more: ops.splat(x, *MLP, **{"radix": 1, **more}),
    "coord": lambda x=X, **more: ops.coord(x, *COORD, **more),
    "strip": lambda x=X, **more: ops.strip(x, ROWS, None, COLUMNS, None, **more),
    "triplet": lambda x=X, **more: ops.triplet(x, *(KERNEL,) * 3, **more),
    "bam": lambda x=X, **more: ops.bam(x, torch.relu, lambda x: x[:, :1], **more),
    "mscam": lambda x=X, **more: ops.mscam(x, torch.relu, torch.relu, **more),
    "aff": lambda x=X, **more: ops.aff(x, X, torch.relu, torch.relu, **more),
    "iaff": lambda x=X, **more: ops.iaff(x, X, *(torch.relu,) * 4, **more),
    "blend": lambda x=X, **more: ops.blend(x, X, X, **more),
    "gate": lambda x=X, **more: ops.gate(x, torch.zeros(1), **more),
    "channel_statistics": lambda x=X, **more: ops.channel_statistics(x, **more),
    "spatial_statistics": lambda x=X, **more: ops.spatial_statistics(x, **more),
}
GATED = [name for name in CALLS if name != "covariance" and not name.endswith("statistics")]


def refused(error, argument, call):
    with pytest.raises(error) as caught:
        call()
    assert re.match(rf"{argument}\b", str(caught.value)), f"{caught.value} does not name {argument}"
    assert ": got " in str(caught.value)


def quantised():
    return torch.quantize_per_tensor(torch.zeros(2, 4, 3, 5), 0.1, 0, torch.quint8)


BAD_MAPS = {
    "list": (TypeError, [[1.0]]),
    "none": (TypeError, None),
    "integer": (TypeError, torch.zeros(2, 4, 3, 5, dtype=torch.int64)),
    "bool": (TypeError, torch.zeros(2, 4, 3, 5, dtype=torch.bool)),
    "complex": (TypeError, torch.zeros(2, 4, 3, 5, dtype=torch.complex64)),
    "float8": (TypeError, torch.zeros(2, 4, 3, 5, dtype=torch.float8_e4m3fn)),
    "sparse": (TypeError, torch.zeros(2, 4, 3, 5).to_sparse()),
    "quantised": (TypeError, quantised),
    "matrix": (ValueError, torch.zeros(2, 4)),
    "rank 6": (ValueError, torch.zeros(1, 4, 1, 1, 1, 1)),
    "no channels": (ValueError, torch.zeros(2, 0, 3, 5)),
    "no positions": (ValueError, torch.zeros(2, 4, 0, 5)),
}


@pytest.mark.parametrize("bad", BAD_MAPS)
@pytest.mark.parametrize("name", CALLS)
def test_map(name, bad, launches):
    error, x = BAD_MAPS[bad]
    refused(error, "x", lambda: CALLS[name](x() if callable(x) else x))
    assert not launches


FOUR = ("sse", "scse", "spatial_attention", "cbam", "spatial_statistics", "gc", "gsop", "coord", "strip", "triplet", "ge", "bam")
FOUR += ("mscam", "aff", "blend")


@pytest.mark.parametrize("name", FOUR)
def test_map_of_another_rank(name, launches):
    for shape in ((2, 4, 3), (2, 4, 3, 5, 2)):
        refused(ValueError, "x", lambda shape=shape: CALLS[name](torch.zeros(shape)))
    assert not launches


@pytest.mark.parametrize("name", GATED)
def test_epilogue(name, launches):
    call = CALLS[name]
    refused(ValueError, "residual", lambda: call(residual=torch.zeros(2, 4, 5, 3)))
    refused(ValueError, "residual", lambda: call(residual=torch.zeros(4, 3, 5)))
    refused(TypeError, "residual", lambda: call(residual=torch.zeros(2, 4, 3, 5, dtype=torch.float64)))
    refused(TypeError, "residual", lambda: call(residual=torch.zeros(2, 4, 3, 5).to_sparse()))
    refused(TypeError, "residual", lambda: call(residual=torch.zeros(2, 4, 3, 5, dtype=torch.complex64)))
    refused(TypeError, "residual", lambda: call(residual=1.0))
    refused(ValueError, "residual", lambda: call(residual=torch.zeros(2, 4, 3, 5, device="meta")))
    refused(ValueError, "activation", lambda: call(activation="tanh"))
    refused(ValueError, "gate", lambda: call(gate="tanh"))
    assert not launches


OPTIONS = {
    "se": {"pool": "max", "hidden": "tanh", "max_grad": "last", "before": "tanh"},
    "ese": {"before": "tanh"},
    "eca": {"padding": "reflect", "before": "tanh"},
    "cse": {"hidden": "tanh", "before": "tanh"},
    "scse": {"combine": "mean", "hidden": "tanh"},
    "bam": {"combine": "max"},
    "channel_attention": {"pools": ("avg", "median"), "hidden": "tanh", "max_grad": "last", "before": "tanh"},
    "spatial_attention": {"order": "mean", "max_grad": "last"},
    "cbam": {"order": "mean", "max_grad": "last", "spatial_gate": "softmax", "hidden": "tanh", "pools": ()},
    "ge": {"extent": 3, "hidden": "tanh", "max_grad": "last", "pool": "max"},
    "shuffle": {"groups": 3, "eps": 0.0},
    "simam": {"e_lambda": -1.0},
    "sk": {"hidden": "tanh", "before": "tanh", "gate": "tanh"},
    "splat": {"hidden": "tanh", "before": "tanh", "gate": "tanh", "radix": 0, "cardinality": 0},
    "coord": {"hidden": "tanh", "combine": "mean"},
    "strip": {"hidden": "tanh", "combine": "sum"},
    "triplet": {"order": "mix", "max_grad": "last"},
    "aff": {"factor": 3},
    "blend": {"factor": 0},
    "covariance": {"before": "tanh"},
    "gsop": {"convolution": "own"},
    "channel_statistics": {"pools": "avg", "max_grad": "last"},
    "spatial_statistics": {"kinds": ("mean", "min"), "max_grad": "last"},
}


@pytest.mark.parametrize(("name", "option", "value"), [(n, o, v) for n, options in OPTIONS.items() for o, v in options.items()])
def test_option(name, option, value, launches):
    refused(ValueError, option, lambda: CALLS[name](**{option: value}))
    assert not launches


def test_pools_that_exclude_each_other():
    for pools in (("avg", "avg"), ("avg", "avg_max"), "max", ()):
        refused(ValueError, "pools", lambda pools=pools: ops.channel_statistics(X, pools))
    for kinds in ("max", ()):
        refused(ValueError, "kinds", lambda kinds=kinds: ops.spatial_statistics(X, kinds))


def test_a_gate_takes_no_epilogue():
    for more in ({"residual": X}, {"activation": "relu"}):
        refused(ValueError, "apply", lambda more=more: ops.channel_attention(X, *MLP, apply=False, **more))
        refused(ValueError, "apply", lambda more=more: ops.spatial_attention(X, KERNEL, apply=False, **more))


SK = W1, B1, torch.zeros(8, 2), torch.zeros(8)
SPLAT = torch.zeros(2, 2), B1, torch.zeros(4, 2), B2


def test_maps_of_selective_kernels(launches):
    for error, bad in ((TypeError, X), (TypeError, None), (TypeError, [X]), (TypeError, [X, 1.0]), (TypeError, [X, X.double()])):
        refused(error, "x", lambda bad=bad: ops.sk(bad, *SK))
    for bad in (torch.zeros(2, 4, 5, 3), torch.zeros(1, 4, 3, 5), torch.zeros(2, 4, 3, 5, device="meta")):
        refused(ValueError, "x", lambda bad=bad: ops.sk([X, bad], *SK))
    for options in ({"radix": 3}, {"cardinality": 4}):
        refused(ValueError, "x", lambda options=options: ops.splat(X, *SPLAT, **options))
    assert not launches


# argument -> calls whose error must name it
PARAMETERS = {
    "w1": [
        lambda: ops.se(X, torch.zeros(2, 5), B1, W2, B2),
        lambda: ops.se(X, torch.zeros(8), B1, W2, B2),
        lambda: ops.se(X, torch.zeros(0, 4), B1, W2, B2),
        lambda: ops.cbam(X, torch.zeros(2, 5), B1, W2, B2, KERNEL),
        lambda: ops.scse(X, torch.zeros(2, 5, 1, 1), B1, W2, B2, PIXEL),
        lambda: ops.coord(X, torch.zeros(2, 5), *COORD[1:]),
        lambda: ops.channel_attention(X, torch.zeros(2, 4, 3, 3), B1, W2, B2),
        lambda: ops.sk([X, X], None, *SK[1:]),
        lambda: ops.splat(X, torch.zeros(3, 1), None, torch.zeros(4, 1), None, cardinality=2),
    ],
    "b1": [
        lambda: ops.ge(X, None, B1),
        lambda: ops.se(X, W1, torch.zeros(3), W2, B2),
        lambda: ops.se(X, W1, torch.zeros(2, 1), W2, B2),
        lambda: ops.channel_attention(X, None, B1, torch.zeros(4, 4), B2),
        lambda: ops.sk([X, X], W1, B2, *SK[2:]),
    ],
    "w2": [
        lambda: ops.se(X, W1, B1, torch.zeros(2, 4), B2),
        lambda: ops.channel_attention(X, None, None, torch.zeros(4, 3), B2),
        lambda: ops.sk([X, X], *MLP),
        lambda: ops.splat(X, *SPLAT[:2], W2[:2], None),
    ],
    "b2": [lambda: ops.se(X, W1, B1, W2, torch.zeros(2)), lambda: ops.cbam(X, W1, B1, W2, torch.zeros(1), KERNEL)],
    "w": [
        lambda: ops.ese(X, torch.zeros(4, 2)),
        lambda: ops.eca(X, torch.zeros(1, 1, 4)),
        lambda: ops.eca(X, torch.zeros(1, 2, 3)),
        lambda: ops.eca(X, torch.zeros(3)),
        lambda: ops.sse(X, torch.zeros(4)),
        lambda: ops.sse(X, torch.zeros(1, 3, 1, 1)),
        lambda: ops.scse(X, *MLP, torch.zeros(4, 1, 1, 1)),
        lambda: ops.gc(X, torch.zeros(1, 3, 1, 1), add=torch.relu),
    ],
    "b": [
        lambda: ops.ese(X, torch.zeros(4, 4), torch.zeros(1)),
        lambda: ops.eca(X, torch.zeros(1, 1, 3), torch.zeros(4)),
        lambda: ops.sse(X, PIXEL, torch.zeros(4)),
        lambda: ops.scse(X, *MLP, PIXEL, torch.zeros(4)),
        lambda: ops.gc(X, PIXEL, torch.zeros(4), add=torch.relu),
        lambda: ops.gc(X, None, torch.zeros(1), add=torch.relu),
    ],
    "add": [lambda: ops.gc(X, PIXEL), lambda: ops.gc(X, PIXEL, add=1.0)],
    "reduce": [lambda: ops.gsop(X, None, torch.relu), lambda: ops.gsop(X, (torch.relu, None), torch.relu)],
    "excite": [lambda: ops.gsop(X, torch.relu, W1)],
    "scale": [lambda: ops.gc(X, PIXEL, scale=PIXEL)],
    "channel": [lambda: ops.bam(X, B2, torch.relu)],
    "spatial": [lambda: ops.bam(X, torch.relu, None)],
    "weight": [
        lambda: ops.spatial_attention(X, torch.zeros(1, 2, 4, 4)),
        lambda: ops.spatial_attention(X, torch.zeros(1, 2, 3, 5)),
        lambda: ops.spatial_attention(X, torch.zeros(1, 1, 3, 3)),
        lambda: ops.spatial_attention(X, KERNEL, order="mix"),
        lambda: ops.spatial_attention(X, torch.zeros(2, 3, 3)),
        lambda: ops.cbam(X, *MLP, torch.zeros(1, 2, 2, 2)),
    ],
    "bias": [lambda: ops.spatial_attention(X, KERNEL, torch.zeros(2)), lambda: ops.cbam(X, *MLP, KERNEL, torch.zeros(()))],
    "norm": [
        lambda: ops.spatial_attention(X, KERNEL, norm=torch.nn.BatchNorm2d(2)),
        lambda: ops.cbam(X, *MLP, KERNEL, norm=torch.nn.LayerNorm(1)),
        lambda: ops.cbam(X, *MLP, KERNEL, norm=torch.relu),
        lambda: ops.sk([X, X], *SK, norm=torch.relu),
        lambda: ops.splat(X, *SPLAT, norm=1.0),
        lambda: ops.coord(X, *COORD, norm=1.0),
    ],
    "gather": [
        lambda: ops.ge(X, gather=2),
        lambda: ops.ge(X, gather=lambda x: x[:, :, ::2, ::2], extent=4),
        lambda: ops.ge(X, gather=lambda x: x),
        lambda: ops.ge(X, gather=lambda x: torch.cat([x, x], 2), extent=None),
        lambda: ops.ge(X, gather=lambda x: None),
    ],
    "cweight": [
        lambda: ops.shuffle(X, torch.zeros(4), HALF, HALF, HALF, groups=1),
        lambda: ops.shuffle(X, torch.zeros(2, 1), HALF, HALF, HALF, groups=1),
    ],
    "norm_bias": [lambda: ops.shuffle(X, *(HALF,) * 5, groups=1), lambda: ops.shuffle(X, *(HALF,) * 5, torch.zeros(1), groups=1)],
    "before_norm": [
        lambda call=call, norm=norm: call(before_norm=norm)
        for norm in (torch.nn.BatchNorm2d(2), torch.relu, torch.nn.MaxPool2d(2), torch.nn.BatchNorm2d(4, affine=False, device="meta").eval())
        for call in (*(CALLS[name] for name in ("se", "ese", "eca", "cse", "channel_attention")), lambda **more: ops.splat(X, *SPLAT, **more))
    ],
    "w_h": [
        lambda: ops.coord(X, W1, B1, torch.zeros(4, 3), B2, W2, B2),
        lambda: ops.strip(X, torch.zeros(4, 1, 1, 3), None, COLUMNS),
        lambda: ops.strip(X, torch.zeros(4, 1, 2, 1), None, COLUMNS),
        lambda: ops.strip(X, torch.zeros(3, 1, 3, 1), None, COLUMNS),
    ],
    "w_w": [lambda: ops.coord(X, W1, B1, W2, B2, torch.zeros(3, 2), B2), lambda: ops.strip(X, ROWS, None, ROWS)],
    "b_h": [lambda: ops.coord(X, W1, B1, W2, B1, W2, B2), lambda: ops.strip(X, None, B2, COLUMNS)],
    "b_w": [lambda: ops.coord(X, W1, B1, W2, B2, W2, B1), lambda: ops.strip(X, ROWS, None, COLUMNS, B1)],
    "norm_w": [lambda: ops.strip(X, norm_w=1.0)],
    "cw_weight": [lambda: ops.triplet(X, torch.zeros(1, 1, 3, 3), KERNEL), lambda: ops.triplet(X, torch.zeros(1, 2, 2, 2), KERNEL)],
    "hc_norm": [lambda: ops.triplet(X, KERNEL, KERNEL, hc_norm=torch.nn.BatchNorm2d(4))],
    "hw_bias": [lambda: ops.triplet(X, KERNEL, KERNEL, hw_bias=torch.zeros(1)), lambda: ops.triplet(X, *(KERNEL,) * 3, hw_bias=B1)],
    "hw_norm": [lambda: ops.triplet(X, KERNEL, KERNEL, hw_norm=torch.nn.BatchNorm2d(1))],
    "other": [
        lambda: ops.aff(X, None, torch.relu, torch.relu),
        lambda: ops.iaff(X, torch.zeros(2, 4, 5, 3), *(torch.relu,) * 4),
        lambda: ops.blend(X, X.double(), X),
    ],
    "local": [
        lambda: ops.mscam(X, 1.0, torch.relu),
        lambda: ops.blend(X, X, PIXEL),
        lambda: ops.blend(X, X, None),
    ],
    "pooled": [
        lambda: ops.aff(X, X, torch.relu, PIXEL),
        lambda: ops.blend(X, X, X, PIXEL),
    ],
    "pooled2": [lambda: ops.iaff(X, X, *(torch.relu,) * 3, None)],
    "weights": [
        lambda: ops.gate(X, torch.zeros(2, 4, 3)),
        lambda: ops.gate(X, torch.zeros(1, 2, 4, 3, 5)),
        lambda: ops.gate(X, torch.zeros(4, 4, 1, 1)),
        lambda: ops.gate(X, 2.0),
    ],
}


@pytest.mark.parametrize("argument", PARAMETERS)
def test_parameter(argument, launches):
    for call in PARAMETERS[argument]:
        refused((ValueError, TypeError), argument, call)
    assert not launches


def test_networks_that_return_another_shape():
    refused(ValueError, "add", lambda: ops.gc(X, PIXEL, add=torch.sum))
    refused(ValueError, "scale", lambda: ops.gc(X, PIXEL, scale=lambda z: z[:, :2]))
    refused(ValueError, "reduce", lambda: ops.gsop(X, torch.sum, torch.relu))
    for net in (torch.relu, torch.nn.Conv2d(4, 2, 3), torch.nn.Conv2d(4, 5, 1), torch.nn.Conv2d(4, 2, 1).half()):
        refused(ValueError, "convolution", lambda net=net: ops.gsop(X, net, torch.relu, convolution="fused"))
    refused(ValueError, "excite", lambda: ops.gsop(X, torch.relu, torch.relu))


def _replacements():
    """Every parameter of every op, replaced by what is no dense real floating-point tensor on x's device; and, where it is needed, by nothing."""
    for op in MAIN:
        for name, shape in op.shapes((2, 4, 3, 5)).items():
            if isinstance(shape, tuple):
                for bad in ("integer", "complex", "sparse", "meta", "number"):
                    yield pytest.param(op, name, bad, id=f"{op}-{name}-{bad}")


@pytest.mark.parametrize(("op", "name", "bad"), list(_replacements()))
def test_parameter_of_another_kind(op, name, bad, launches):
    inputs = make(op, (2, 4, 3, 5))
    value = inputs.params[name].detach()
    wrong = {"integer": value.long(), "complex": value.to(torch.complex64), "sparse": value.to_sparse(), "meta": value.to("meta"), "number": 1.0}[bad]
    argument = ("x" if op.name == "sk" else "other") if name.startswith("x") else name.rstrip("2") if op.name == "ese" else name
    refused(ValueError if bad == "meta" else TypeError, argument, lambda: fused(op, inputs.x, {**inputs.params, name: wrong}))
    assert not launches


def test_parameter_that_is_needed(launches):
    refused(TypeError, "w1", lambda: ops.se(X, None, None, W2, B2))
    refused(TypeError, "w2", lambda: ops.se(X, W1, B1, None, B2))
    refused(TypeError, "w", lambda: ops.eca(X, None))
    refused(TypeError, "w", lambda: ops.sse(X, None))
    refused(TypeError, "weight", lambda: ops.spatial_attention(X, None))
    refused(TypeError, "w2", lambda: ops.ge(X, W1, B1))
    refused(TypeError, "sbias", lambda: ops.shuffle(X, HALF, HALF, HALF, None, groups=1))
    assert not launches


# -- only what is asked for ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("op", MAIN, ids=str)
def test_frozen(op, activation, launches):
    """One tensor at a time needs a gradient: it is right, and nothing is launched for those of others."""
    if not op.epilogue and activation != "none":
        pytest.skip("no activation")
    shape = (2, 3, 3, 5)
    with torch.no_grad():
        fused(op, (inputs := make(op, shape, residual=op.epilogue)).x, inputs.params, inputs.residual, activation)
    forward = len(launches)
    for name in make(op, shape, residual=op.epilogue).tensors():
        inputs = make(op, shape, residual=op.epilogue)
        for other, t in inputs.tensors().items():
            t.requires_grad_(other == name)
        launches.clear()
        check(op, inputs, activation, [name])
        backward = launches[forward:]
        writes_dx = any(kernel.endswith(("bwd_input_kernel", "ticket_bwd_kernel")) for kernel in backward)
        assert not writes_dx or name.startswith("x")
        if name == "residual" and activation == "none":
            assert not backward
        if name in ("w2", "b2", "norm.weight", "norm.bias"):
            assert backward.count("linear_kernel") <= 1
        if name in ("w", "b", "weight", "bias", "weights"):
            assert "linear_kernel" not in backward or op.name == "ese"


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_nothing_to_differentiate(op):
    inputs = make(op, (2, 3, 3, 5), residual=op.epilogue)
    for t in inputs.tensors().values():
        t.requires_grad_(False)
    y = fused(op, inputs.x, inputs.params, inputs.residual)
    assert not y.requires_grad and y.grad_fn is None


def test_two_backward_passes_add_up():
    op = BY_NAME["cbam"]
    inputs = make(op, (2, 3, 3, 5))
    y = fused(op, inputs.x, inputs.params)
    y.sum().backward(retain_graph=True)
    once = {name: t.grad.clone() for name, t in inputs.tensors().items()}
    y.sum().backward()
    for name, t in inputs.tensors().items():
        torch.testing.assert_close(t.grad, 2 * once[name])


# -- at random ----------------------------------------------------------------------------------------------------------------------------------


@st.composite
def arbitrary(draw):
    op = draw(st.sampled_from(MAIN))
    spatial = draw(st.integers(1, 3)) if len(op.ranks) > 1 else 2
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 6)), *(draw(st.integers(1, 6 // spatial + 2)) for _ in range(spatial)))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    values = draw(st.sampled_from(["random", "ties", "zero"]))
    inputs = make(op, shape, dtype=dtype, layout=draw(st.sampled_from(sorted(LAYOUTS))), values=values, residual=op.epilogue and draw(st.booleans()))
    activation = draw(st.sampled_from(sorted(TAILS))) if op.epilogue else "none"
    tiles = draw(st.sampled_from([{}, {"block_c": 2, "block_p": 4, "splits": 2}, {"block_c": 8, "block_p": 2, "splits": 5}]))
    return op, inputs, activation, tiles


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(arbitrary())
def test_anything(case):
    op, inputs, activation, tiles = case
    if op.refused(tuple(inputs.x.shape)):
        return  # torch's BatchNorm refuses a single value
    with tuning.forced(**tiles):
        got = check(op, inputs, activation)
    if op.epilogue:
        assert got["y"].stride() == y_like(op, inputs.x).stride()
