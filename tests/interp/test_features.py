"""The shared feature tests on the kernels, and what is said of registered ops alone: graphs of a compiler, and kernels that fail to compile."""

import copy
import warnings

import pytest
import torch
from feature_tests import *  # noqa: F403
from feature_tests import BLOCKS, build, every_block, expected, feature_map, gradients, same
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd

import tritattn
from tritattn import _library


def compiled(block):
    """The block under torch.compile, and the graphs it ran, forward and backward, once it has run."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition

    graphs = []

    def record(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(block, backend=backend, fullgraph=True), graphs


def maps_written(graph, shape):
    """Values of the map's shape that a graph makes, views and those on a single element left out."""
    made = [n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)]
    made = [n for n in made if n.target is not torch.ops.aten.view.default]
    return [n.name for n in made if n.meta["val"].shape == shape and any(n.meta["val"].stride())]


# Maps that torch's layers make or read beside the op's, forward and backward. iAFF: the mirror image, the sum, two convolutions and two norms, and
# the first fusion; backward what flows into each of these, and into both maps from both rounds.
LAYERS = {"attention": (1, 3), "sk": (1, 0), "gsop": (1, 1), "ge-params": (0, 1), "bam": (0, 1), "mscam": (2, 3), "iaff": (7, 12)}
NORMED = ("spatial", "cbam", "mscam", "iaff")


@pytest.mark.parametrize("name", BLOCKS)
def test_compiled_graphs_hold_the_op_and_little_else(name):
    """y forward; backward dx, and before it da where a residual wants it. Nothing is added or copied."""
    block, x = build(name), feature_map()
    wanted = expected(block, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)  # what dynamo itself does with autograd's functions
        call, graphs = compiled(block)
        got = gradients(block, call, x)
    same(got, wanted)
    forward, backward = graphs
    own, own_backward = LAYERS.get(name, (0, 0))
    assert len(maps_written(forward, x.shape)) == 1 + own
    da = getattr(block, "residual", False) and block.activation != "none"
    # a block that adds its own input gets two gradients of it, which are added by whoever owns the input
    own_backward += getattr(block, "residual", False)
    assert len(maps_written(backward, x.shape)) == 1 + da + own_backward, maps_written(backward, x.shape)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_relay_writes_the_gradient_of_the_map_once(activation, residual):
    """A BatchNorm between squeeze and gate, its statistics moving: the reference's gradients and buffers, and one gradient of the map."""
    torch.manual_seed(0)
    block = tritattn.nn.CBAM(6, rd_channels=3, kernel_size=3, activation=activation).double()
    other = copy.deepcopy(block)
    x, added = feature_map(), feature_map(seed=1).requires_grad_() if residual else None
    call, graphs = compiled(block)
    got = gradients(block, lambda x: call(x, added), x)
    with tritattn.backend("reference"):
        same(got, gradients(other, lambda x: other(x, added), x))
    same(dict(block.named_buffers()), dict(other.named_buffers()))
    forward, backward = graphs
    assert len(maps_written(forward, x.shape)) == 1
    # da is stored for an activation alone, and is the residual's gradient too; without one both are what flows in
    assert len(maps_written(backward, x.shape)) == 1 + (activation != "none"), maps_written(backward, x.shape)
    ours = [str(n.target) for n in backward.nodes if "tritattn" in str(n.target)]
    assert ours == ["tritattn.spatial_gate_backward.default", "tritattn.spatial_squeeze_backward.default"]


@pytest.mark.parametrize("frozen", ["x", "parameters"])
def test_relay_without_some_gradients(frozen):
    torch.manual_seed(0)
    block = tritattn.nn.CBAM(6, rd_channels=3, kernel_size=3, activation="relu").double()
    other = copy.deepcopy(block)
    results = []
    for module in (block, other):
        x = feature_map().requires_grad_(frozen == "parameters")
        for p in module.parameters():
            p.requires_grad_(frozen == "x")
        with tritattn.backend("triton" if module is block else "reference"):
            module(x).square().sum().backward()
        results.append({n: t.grad for n, t in (("x", x), *module.named_parameters()) if t.requires_grad})
    same(*results)


@pytest.mark.parametrize("inside", [False, True])
def test_compiled_autocast(inside):
    """The mode around the compiled block, or inside of what is compiled."""
    network = torch.nn.Sequential(torch.nn.Conv2d(6, 6, 1), build("cbam", torch.float32))
    x = feature_map(dtype=torch.float32)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return network(x)

    torch._dynamo.reset()
    wanted = gradients(network, call, x)
    if inside:
        got = gradients(network, torch.compile(call, backend="aot_eager", fullgraph=True), x)
    else:
        whole = torch.compile(network, backend="aot_eager", fullgraph=True)

        def outside(x):
            with torch.autocast("cpu", torch.bfloat16):
                return whole(x)

        got = gradients(network, outside, x)
    assert got["y"].dtype == torch.bfloat16
    same(got, wanted)


def test_relay_in_the_inductor():
    torch._dynamo.reset()
    block = tritattn.nn.CBAM(6, rd_channels=3, kernel_size=3)
    other = copy.deepcopy(block)
    x = feature_map(dtype=torch.float32)
    got = gradients(block, torch.compile(block, fullgraph=True), x)
    with tritattn.backend("reference"):
        wanted = gradients(other, other, x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_compiled_autograd():
    torch._dynamo.reset()
    block, x = build("cbam"), feature_map()
    wanted = expected(block, x)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        got = gradients(block, torch.compile(block, backend="aot_eager"), x)
    same(got, wanted)


# -- kernels that cannot be built ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch):
    """Makes a family's forward or backward launcher fail as a compiler does. What the library learnt is forgotten again."""
    from triton.runtime.errors import OutOfResources

    def fail(*args, **kwargs):
        calls.append(args)
        raise OutOfResources(300000, 232448, "shared memory")

    calls: list = []
    monkeypatch.setattr(_library, "_broken", {})
    _library._warn_once.cache_clear()
    yield lambda family, which: monkeypatch.setattr(_library._families[family], which, fail) or calls
    _library._warn_once.cache_clear()


FAMILIES = {
    "se": "channel_gate",
    "sse": "pixel_gate",
    "scse": "concurrent_gate",
    "cbam": "spatial_squeeze",
    "spatial": "spatial_gate",
    "sk": "select",
    "splat": "select",
    "attention": "gate",
    "mscam": "fusion_squeeze",
}


@pytest.mark.parametrize("which", ["launch", "backward"])
@pytest.mark.parametrize("name, how", [*((name, "eager") for name in FAMILIES), ("se", "compiled"), ("cbam", "compiled"), ("spatial", "compiled")])
def test_a_kernel_that_fails_to_compile(name, how, which, broken):
    """One warning, the reference's numbers, and no further attempt."""
    block, x = build(name), feature_map(dtype=torch.float32)
    block = block.float()
    if name in NORMED:
        block.eval()  # no buffers that move
    wanted = expected(block, x)
    calls = broken(FAMILIES[name], which)
    call = compiled(block)[0] if how == "compiled" else block
    with pytest.warns(RuntimeWarning, match=f"tritattn.{FAMILIES[name]} runs its plain torch reference: a kernel failed to compile") as caught:
        same(gradients(block, call, x), wanted)
        same(gradients(block, block, x), wanted)
    assert len([w for w in caught if w.category is RuntimeWarning and "tritattn" in str(w.message)]) == 1
    assert len(calls) == 1
    path, reason = tritattn.explain("cpu", torch.float32)
    assert path == "triton" and FAMILIES[name] in reason
    assert tritattn.explain("cpu", torch.float64) == ("triton", "interpreted on the CPU")
    same(gradients(block.double(), block, x.double()), expected(block, x.double()))


def test_a_kernel_that_fails_is_an_error_where_it_was_forced(broken):
    from triton.runtime.errors import OutOfResources

    broken("pixel_gate", "launch")
    with tritattn.backend("triton"), pytest.raises(OutOfResources):
        build("sse")(feature_map())
    with pytest.warns(RuntimeWarning):
        build("sse")(feature_map())
    with tritattn.backend("triton"), pytest.raises(RuntimeError, match=r"pixel_gate cannot run on cpu: a kernel failed to compile \(OutOfResources"):
        build("sse")(feature_map())


def test_errors_of_another_kind_are_not_swallowed(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(_library._families["pixel_gate"], "launch", fail)
    with pytest.raises(ZeroDivisionError):
        build("sse")(feature_map())


@every_block
def test_empty_batches(name):
    block = build(name)
    if name in NORMED:
        block.eval()  # a BatchNorm refuses to train on nothing
    got = gradients(block, block, feature_map(0, 6, 3, 4))
    assert got["y"].shape == got["x"].shape == (0, 6, 3, 4)
    assert not any(t.any() for t in got.values())
