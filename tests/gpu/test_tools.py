"""torch.compile, autocast and convert on the device."""

import copy

import pytest
import torch
from on_device import size
from torch import nn

import tritattn
from tritattn import nn as blocks

BLOCKS = {
    "se": lambda c: blocks.SqueezeExcite(c),
    "scse": lambda c: blocks.ConcurrentSE(c, activation="relu"),
    "cbam": lambda c: blocks.CBAM(c, rd_ratio=1 / 4, residual=True, activation="relu"),
}
SHAPE = (4, 32, 14, 14)


def gradients(block, call, x):
    x = x.detach().requires_grad_()
    y = call(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    names, parameters = zip(*block.named_parameters(), strict=True)
    found = torch.autograd.grad((y.float() * weights).sum(), (x, *parameters))
    return {"y": y.detach(), **dict(zip(("x", *names), found, strict=True))}


def pair(name, device):
    torch.manual_seed(0)
    block = BLOCKS[name](size(SHAPE, device)[1]).to(device)
    return block, copy.deepcopy(block)


def some_map(device, shape=SHAPE):
    return torch.randn(size(shape, device), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("name", BLOCKS)
def test_inductor(device, name):
    torch._dynamo.reset()
    block, other = pair(name, device)
    x = some_map(device)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(gradients(block, compiled, x), gradients(other, other, x), rtol=1e-4, atol=1e-4)
    if name == "se":  # other sizes
        y = some_map(device, (2, 32, 7, 9))
        torch.testing.assert_close(gradients(block, compiled, y), gradients(other, other, y), rtol=1e-4, atol=1e-4)


def test_inductor_keeps_channels_last_inside_a_network(device):
    torch._dynamo.reset()
    c = size(SHAPE, device)[1]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU(), blocks.SqueezeExcite(c), nn.Conv2d(c, c, 1)).to(device)
    net = net.to(memory_format=torch.channels_last)
    other = copy.deepcopy(net)
    x = some_map(device).to(memory_format=torch.channels_last)
    got, wanted = gradients(net, torch.compile(net, fullgraph=True), x), gradients(other, other, x)
    assert got["y"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_reduce_overhead(cuda):
    """torch's own CUDA graphs around the compiled block."""
    torch._dynamo.reset()
    block, other = pair("se", cuda)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = torch.randn(SHAPE, device=cuda, generator=torch.Generator(cuda).manual_seed(seed))
        torch.compiler.cudagraph_mark_step_begin()
        got = {name: t.clone() for name, t in gradients(block, compiled, x).items()}
        torch.testing.assert_close(got, gradients(other, other, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["se", "cbam"])
def test_autocast(device, name):
    """A half-precision map from a convolution, parameters in fp32."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    c = size(SHAPE, device)[1]
    block, other = pair(name, device)
    torch.manual_seed(1)
    conv = nn.Conv2d(c, c, 1).to(device)
    with torch.autocast(device.type, dtype):
        z = conv(some_map(device)).detach()
        assert z.dtype == dtype
        y = block(z)
    assert y.dtype == dtype
    torch.testing.assert_close(y, other(z))
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_convert(device, training):
    """Pasted blocks, in place, in training and out of it: their values and gradients."""
    from peer_blocks import blog

    torch.manual_seed(0)
    model = nn.Sequential(blog.csSE(16), blog.BasicBlock(16, 16)).to(device).train(training)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    original = copy.deepcopy(model)
    report = tritattn.convert(model)
    assert len(report.converted) == 2 and not report.left, report
    x = torch.randn((4, 16, 14, 14) if device.type == "cuda" else (2, 16, 3, 4), generator=torch.Generator().manual_seed(0)).to(device)
    model, original = model.double(), original.double()
    torch.testing.assert_close(gradients(model, model, x.double()), gradients(original, original, x.double()), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dict(model.named_buffers()), dict(original.named_buffers()))


def test_gradients_of_gradients(device):
    torch.manual_seed(0)
    block = blocks.CBAM(4, rd_channels=2, kernel_size=3).to(device).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    other = copy.deepcopy(block)

    def penalty(module):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(z).sin().sum(), z, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (z, *module.parameters()))

    got = penalty(block)
    with tritattn.backend("reference"):
        wanted = penalty(other)
    torch.testing.assert_close(got, wanted)


def test_other_ranks(device):
    from tritattn import ops

    for shape in ((2, 6, 11), (2, 6, 3, 4, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        w = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).to(device)
        y = ops.ese(x, w)
        gate = nn.functional.hardsigmoid(x.flatten(2).mean(-1) @ w.T)
        wanted = x * gate.view(*gate.shape, *(1,) * (x.dim() - 2))
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(wanted.sum(), x))
