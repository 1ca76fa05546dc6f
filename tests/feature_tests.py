"""What torch's own tools do with the blocks. Both runs collect these tests: the plain one, where the reference stands for every block, and the
interpreter's, where the kernels do."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from mirrored import Mirrored
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import tritattn
from tritattn import _library, ops
from tritattn import nn as blocks

C = 6


class Selection(nn.Module):
    """Between a map and a constant one."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention((x, torch.full_like(x, 0.5)))


def without_convolution(block: nn.Module) -> nn.Module:
    block.conv = nn.Identity()
    return block


# One block for each registered op, and one for each thing that a block may do beside calling it.
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "se": lambda **like: blocks.SqueezeExcite(C, rd_channels=3, **like),
    "eca": lambda **like: blocks.ECA(C, kernel_size=3, residual=True, activation="relu", **like),
    "sse": lambda **like: blocks.SpatialSE(C, **like),
    "scse": lambda **like: blocks.ConcurrentSE(C, activation="silu", **like),
    "spatial": lambda **like: blocks.SpatialAttention(C, 3, **like),
    "cbam": lambda **like: blocks.CBAM(C, rd_channels=3, kernel_size=3, residual=True, activation="relu", **like),
    "gc": lambda **like: blocks.GlobalContext(C, rd_channels=4, fuse_scale=True, residual=True, activation="relu", **like),
    "shuffle": lambda **like: blocks.ShuffleAttention(C, groups=1, **like),
    "simam": lambda **like: blocks.SimAM(C, residual=True, activation="silu", **like),
    "gsop": lambda **like: blocks.GSoP(C, 4, stride=1, residual=True, activation="relu", **like),
    "coord": lambda **like: blocks.CoordinateAttention(C, rd_channels=3, **like),
    "strip": lambda **like: blocks.StripAttention(C, norm=True, combine="product", residual=True, **like),
    "triplet": lambda **like: blocks.TripletAttention(C, 3, **like),
    "ge": lambda **like: blocks.GatherExcite(C, extent=2, rd_channels=3, **like),
    "ge-params": lambda **like: blocks.GatherExcite(C, None, True, 2, use_mlp=False, residual=True, activation="relu", **like),
    "bam": lambda **like: blocks.BAM(C, rd_channels=3, dilation=2, residual=True, activation="relu", **like),
    "mscam": lambda **like: blocks.MSCAM(C, residual=True, activation="relu", **like),
    "iaff": lambda **like: Mirrored(blocks.IAFF(C, activation="silu", **like)),
    "sk": lambda **like: Selection(blocks.SelectiveKernelAttention(C, rd_channels=3, norm=False, **like)),
    "splat": lambda **like: without_convolution(blocks.SplitAttention(C, radix=1, rd_channels=4, norm=False, residual=True, **like)),
    "attention": lambda **like: blocks.Attention(nn.Conv2d(C, C, 1, **like), gate="sigmoid"),
}
every_block = pytest.mark.parametrize("name", BLOCKS)
some_blocks = pytest.mark.parametrize("name", ["se", "cbam"])
KERNELS = _library.INTERPRET


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    block = BLOCKS[name]()
    for p in block.parameters():
        nn.init.normal_(p)
    return block.to(dtype)


def feature_map(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (2, C, 3, 4), generator=generator, dtype=torch.float64).to(dtype)


def gradients(block: nn.Module, call: Callable, x: Tensor) -> dict[str, Tensor]:
    """y and the gradients of the loss y . (0, 1, 2, ...) / numel, by name."""
    x = x.detach().requires_grad_()
    y = call(x)
    weights = torch.arange(y.numel(), dtype=y.dtype, device=y.device).view(y.shape) / y.numel()
    tensors = {"x": x, **dict(block.named_parameters())}
    found = torch.autograd.grad((y * weights).sum(), list(tensors.values()))
    return {"y": y.detach(), **dict(zip(tensors, found, strict=True))}


def expected(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same from a copy of the block on the reference."""
    block = copy.deepcopy(block)
    with tritattn.backend("reference"):
        return gradients(block, block, x)


def same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, wanted)


def targets(graph: torch.fx.Graph) -> set[str]:
    """The ops of this package in a graph."""
    return {str(node.target) for node in graph.nodes if node.op == "call_function" and str(node.target).startswith("tritattn.")}


# -- modes and hooks of eager mode ------------------------------------------------------------------------------------------------------------


@every_block
def test_without_gradients(name):
    block, x = build(name).eval(), feature_map()
    wanted = expected(block, x)["y"]
    with torch.no_grad():
        y = block(x)
    with torch.inference_mode():
        z = block(x)
    assert not y.requires_grad and z.is_inference()
    same({"no_grad": y, "inference": z}, {"no_grad": wanted, "inference": wanted})


@every_block
def test_copies(name):
    block, x = build(name).eval(), feature_map()
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(block),
        "pickle": pickle.loads(pickle.dumps(block)),
        "torch.save": torch.load(file, weights_only=False),
        "state dict": BLOCKS[name]().to(x.dtype).eval(),
    }
    copies["state dict"].load_state_dict(block.state_dict())
    wanted = block(x)
    for how, other in copies.items():
        assert type(other) is type(block) and repr(other) == repr(block)
        same({how: other(x)}, {how: wanted})


@pytest.mark.parametrize("reentrant", [False, True])
@every_block
def test_checkpointing(name, reentrant):
    block, x = build(name), feature_map()
    wanted = expected(block, x)
    y = checkpoint(block, z := x.clone().requires_grad_(), use_reentrant=reentrant)
    (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / y.numel()).sum().backward()
    same({"y": y.detach(), "x": z.grad, **{n: p.grad for n, p in block.named_parameters()}}, wanted)


@every_block
def test_autocast(name):
    """The result has the map's dtype, and the block's own arithmetic is not done in less than it would be elsewhere."""
    block = build(name, torch.float32)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x)

    for dtype in (torch.float32, torch.bfloat16):
        x = feature_map(dtype=dtype)
        got = gradients(block, call, x)
        assert got["y"].dtype == dtype and got["x"].dtype == dtype
        if name in ("attention", "gc", "gsop", "ge-params", "bam", "mscam", "iaff"):
            continue  # its layers are torch's, and autocast's business
        for key, wanted in expected(block, x).items():
            # the reference rounds each of a map's gradients to bfloat16 before it adds them
            tolerance = {"rtol": 0, "atol": 2**-7 * wanted.abs().max().item()} if got[key].dtype == torch.bfloat16 else {}
            torch.testing.assert_close(got[key], wanted, **tolerance)


def test_autocast_reaches_the_blocks_of_a_network():
    torch.manual_seed(0)
    attention = blocks.SqueezeExcite(C, rd_channels=3), blocks.CBAM(C, rd_channels=3, kernel_size=3)
    network = nn.Sequential(nn.Conv2d(3, C, 3), *attention, nn.Conv2d(C, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        y = network(torch.randn(2, 3, 6, 6))
        assert network[:2](torch.randn(2, 3, 6, 6)).dtype == torch.bfloat16
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


@some_blocks
def test_hooks_and_repeated_backward(name):
    block, x = build(name).eval(), feature_map().requires_grad_()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    y = block(x)
    y.retain_grad()
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    same({"x": seen[0], "again": seen[1], "y": y.grad}, {"x": seen[1], "again": x.grad / 2, "y": torch.full_like(y, 2)})


@pytest.mark.parametrize("name", ["se", "eca", "sse", "scse", "spatial", "cbam"])
def test_saved_tensors_are_only_the_inputs_and_small_statistics(name):
    """Without an activation nothing needs the residual again, and its gradient is the one that comes in."""
    if not KERNELS:
        pytest.skip("what plain torch saves is torch's")
    saved: list[Tensor] = []
    x, residual = (feature_map(2, C, 6, 8, seed=s).requires_grad_() for s in (0, 1))
    block = build(name)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = block(x, residual)
    kept = {x.data_ptr()} if block.activation == "none" else {x.data_ptr(), residual.data_ptr()}
    assert {t.data_ptr() for t in saved if t.numel() > x.numel() / 2} == kept
    assert all(t.numel() <= 2 * 6 * 8 for t in saved if not t.is_floating_point())
    g = torch.randn_like(y)
    assert (torch.autograd.grad(y, residual, g)[0] is g) == (block.activation == "none")


# -- derivatives of other kinds ---------------------------------------------------------------------------------------------------------------


@every_block
def test_gradients_of_gradients(name):
    def penalty(block: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = block(x)
        first = torch.autograd.grad(y.sin().sum(), (x, *block.parameters()), create_graph=True)
        (sum(g.square().sum() for g in first) + y.square().sum()).backward()
        return [*(g.detach() for g in first), x.grad, *(p.grad for p in block.parameters())]

    block, x = build(name), feature_map(2, C, 2, 3)
    other = copy.deepcopy(block)
    got = penalty(block, x)
    with tritattn.backend("reference"):
        torch.testing.assert_close(got, penalty(other, x))


def pure(block: nn.Module) -> tuple[Callable, dict[str, Tensor]]:
    parameters = {name: p.detach() for name, p in block.named_parameters()}
    return lambda p, x: functional_call(block, p, (x,)), parameters


@every_block
def test_function_transforms(name):
    """Without running statistics, which no transform could write to."""
    block, x = build(name).eval(), feature_map()
    f, parameters = pure(block)
    wanted = expected(block, x)

    def loss(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = f(p, x)
        return (y * torch.arange(y.numel(), dtype=y.dtype).view(y.shape) / y.numel()).sum(), y

    (dp, dx), y = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(parameters, x)
    same({"y": y, "x": dx, **dp}, wanted)

    tangent = feature_map(seed=2)
    y, dy = torch.func.jvp(lambda x: f(parameters, x), (x,), (tangent,))
    step = 1e-6
    with torch.no_grad():
        slope = (block(x + step * tangent) - block(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(dy, slope, rtol=1e-6, atol=1e-7)

    many = torch.stack([x, tangent, x + tangent])
    same({"vmap": torch.vmap(lambda x: f(parameters, x))(many)}, {"vmap": torch.stack([block(x).detach() for x in many])})
    per_sample = torch.vmap(torch.func.grad(lambda p, x: f(p, x[None]).sum()), in_dims=(None, 0))(parameters, x)
    total = torch.func.grad(lambda p: f(p, x).sum())(parameters)
    same({name: g.sum(0) for name, g in per_sample.items()}, total)


@every_block
def test_forward_mode(name):
    block, x, tangent = build(name).eval(), feature_map(), feature_map(seed=2)
    _, wanted = torch.func.jvp(lambda x: functional_call(block, dict(block.named_parameters()), (x,)), (x,), (tangent,))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(block(forward_ad.make_dual(x, tangent))).tangent
    assert got is not None
    torch.testing.assert_close(got, wanted)


@some_blocks
def test_functionalize(name):
    block, x = build(name).eval(), feature_map()
    same({"y": torch.func.functionalize(block)(x).detach()}, {"y": block(x).detach()})


# -- tracing ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*deprecated:DeprecationWarning")
@every_block
def test_jit_trace(name):
    block = build(name).eval()
    traced = torch.jit.trace(block, feature_map())
    for shape in ((2, C, 3, 4), (3, C, 5, 2)):
        x = feature_map(*shape, seed=3)
        same(gradients(block, traced, x), expected(block, x))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    same({"y": torch.jit.load(file)(x).detach()}, {"y": block(x).detach()})


@every_block
def test_symbolic_trace(name):
    """Of a network, and of the result again: the op stays one node."""
    block, x = build(name), feature_map()
    traced = torch.fx.symbolic_trace(torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), block)))
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert sum(getattr(ops, function.__name__, None) is function for function in called) == 1
    same(gradients(block, traced, x), expected(block, x))
    again = pickle.loads(pickle.dumps(traced.eval()))
    same({"y": again(x).detach()}, {"y": block(x).detach()})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@every_block
def test_jit_script_says_what_to_do(name):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script.*torch\.compile.*torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(build(name)))


@pytest.mark.parametrize("name, strict", [*((name, False) for name in BLOCKS), ("se", True), ("cbam", True)])
def test_export(name, strict):
    block = build(name).eval()
    least = 3 if name.startswith("ge") else 2  # torch traces no strided pooling of sizes that may leave a single position
    sizes = {0: Dim("n", max=64), 2: Dim("h", min=least, max=64), 3: Dim("w", min=least, max=64)}
    if name == "ge" and not KERNELS:
        try:
            torch.export.export(nn.AvgPool2d(3, 2, 1), (feature_map(3, C, 5, 7),), dynamic_shapes=(sizes,))
        except torch._dynamo.exc.UserError:  # torch 2.11
            pytest.skip("torch itself exports strided pooling for odd sizes or for even ones, not for both")
    exported = torch.export.export(block, (feature_map(3, C, 5, 7),), dynamic_shapes=(sizes,), strict=strict)
    assert bool(targets(exported.graph)) == KERNELS
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for shape in ((2, C, 3, 4), (4, C, 6, least)):
        x = feature_map(*shape, seed=3)
        wanted = {"y": block(x).detach()}
        same({"y": exported.module()(x).detach()}, wanted)
        same({"y": loaded.module()(x).detach()}, wanted)


@pytest.mark.parametrize("squeeze", [nn.AdaptiveAvgPool2d(1), nn.Identity()], ids=["channel", "whole"])
def test_dynamic_shapes_of_weights_that_a_layer_computes(squeeze):
    """Their channels are a number, and the map's a symbol that was specialised to it."""
    torch._dynamo.reset()
    block = blocks.Attention(nn.Sequential(squeeze, nn.Conv2d(C, C, 1)), activation="relu").double()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, C, 3, 4), (4, C, 6, 5)):
        x = feature_map(*shape)
        same(gradients(block, compiled, x), expected(block, x))


@some_blocks
def test_export_for_training(name):
    """The exported program has gradients, and a BatchNorm's buffers move."""
    block, x = build(name), feature_map()
    wanted = expected(block, x)
    program = torch.export.export(block, (x,)).module()
    same(gradients(program, program, x), wanted)


@every_block
def test_dispatch_modes_see_the_op(name):
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    block, x = build(name), feature_map()
    wanted = expected(block, x)
    with Seen() as seen:
        got = gradients(block, block, x)
    same(got, wanted)
    ours = [n.removesuffix(".default") for n in seen.names if n.startswith("tritattn.")]
    assert bool(ours) == KERNELS
    assert {f"{n}_backward" for n in ours if not n.endswith("_backward")} == {n for n in ours if n.endswith("_backward")}


def test_flop_counter():
    block, x = build("se"), feature_map()
    with FlopCounterMode(display=False) as counter:
        y = nn.Sequential(nn.Conv2d(C, C, 1).double(), block)(x)
        y.sum().backward()
    assert counter.get_total_flops() >= 2 * 2 * C * C * 12


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@every_block
def test_fake_tensors(name, device, monkeypatch):
    """Shapes and strides without data; of a GPU's tensors on any machine, through the registered ops and without asking a driver."""
    asked: set[str] = set()
    for kind in (nn.modules.conv._ConvNd, nn.Linear):
        monkeypatch.setattr(kind, "reset_parameters", lambda layer: None)  # random numbers need the device
    for family in _library._families.values():
        monkeypatch.setattr(family, "fake", lambda *a, family=family, fake=family.fake: asked.add(family.name) or fake(*a))
    differentiated = device == "cpu" or torch.cuda.is_available()  # a node of autograd asks a GPU's tensors for their stream
    with FakeTensorMode(), torch.set_grad_enabled(differentiated):
        block = BLOCKS[name](device=device, dtype=torch.float16).eval()
        x = torch.empty(2, C, 3, 4, device=device, dtype=torch.float16).to(memory_format=torch.channels_last).requires_grad_()
        y = block(x)
        if differentiated:
            y.sum().backward()
    assert (y.shape, y.dtype, y.device.type, y.stride()) == (x.shape, x.dtype, device, x.stride())
    if differentiated:
        assert x.grad.shape == x.shape and all(p.grad.shape == p.shape and p.grad.device.type == device for p in block.parameters())
    assert bool(asked) == (KERNELS or device == "cuda")


@some_blocks
def test_meta_tensors(name):
    block = build(name).to("meta")
    y = block(torch.empty(2, C, 3, 4, dtype=torch.float64, device="meta"))
    assert y.is_meta and y.shape == (2, C, 3, 4)


# -- ONNX -------------------------------------------------------------------------------------------------------------------------------------


def onnx_result(path, x: Tensor) -> Tensor:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    (y,) = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.parametrize("name", ["se"] if KERNELS else ["se", "eca", "scse", "cbam"])
def test_onnx(name, tmp_path):
    """Standard operators alone, with dynamic sizes."""
    pytest.importorskip("onnxscript")
    block = build(name, torch.float32).eval()
    sizes = {0: Dim("n", max=64), 2: Dim("h", max=64), 3: Dim("w", max=64)}
    example = (feature_map(3, C, 5, 7, dtype=torch.float32),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(block, example, tmp_path / "block.onnx", dynamic_shapes=(sizes,), dynamo=True, verbose=False)
    for shape in ((2, C, 3, 4), (4, C, 6, 2)):
        x = feature_map(*shape, dtype=torch.float32, seed=3)
        torch.testing.assert_close(onnx_result(tmp_path / "block.onnx", x), block(x).detach(), rtol=1e-5, atol=1e-5)


def test_onnx_by_tracing(tmp_path):
    pytest.importorskip("onnx")
    block, x = build("scse", torch.float32).eval(), feature_map(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(block, (x,), tmp_path / "block.onnx", dynamo=False)
    torch.testing.assert_close(onnx_result(tmp_path / "block.onnx", x), block(x).detach(), rtol=1e-5, atol=1e-5)


# -- the choice of a path ---------------------------------------------------------------------------------------------------------------------


def test_backend_is_restored_and_checked():
    kind = "triton" if KERNELS else "reference"
    assert tritattn.explain("cpu", torch.float32)[0] == kind
    with tritattn.backend("reference"):
        assert tritattn.explain("cpu", torch.float32) == ("reference", "forced by tritattn.backend")
        with tritattn.backend("triton"):
            assert tritattn.explain("cpu", torch.float32)[0] == "triton"
        assert tritattn.explain("cpu", torch.float32)[0] == "reference"
    with pytest.raises(ZeroDivisionError), tritattn.backend("reference"):
        1 / 0  # noqa: B018
    assert tritattn.explain("cpu", torch.float32)[0] == kind
    with pytest.raises(ValueError, match="backend: got 'cuda', expected 'reference' or 'triton'"), tritattn.backend("cuda"):
        pass


def test_other_devices_take_the_reference_and_say_so_once():
    x = feature_map(dtype=torch.float32)
    w = torch.ones(1, C, 1, 1)
    _library._warn_once.cache_clear()
    with FakeTensorMode(), pytest.warns(RuntimeWarning, match="no kernels for device type 'xpu'") as caught:
        for _ in range(2):
            y = ops.sse(torch.empty(x.shape, device="xpu"), torch.empty(w.shape, device="xpu"))
    assert y.device.type == "xpu" and y.shape == x.shape
    assert len(caught) == 1
