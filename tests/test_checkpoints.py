"""State dicts of other packages' blocks in the modules: strict, with equal results, and with clear words where something does not fit."""

import copy

import peer_blocks.authors
import peer_blocks.blog
import peer_blocks.external
import pytest
import torch
from peer_pairs import PAIRS, samples
from torch import nn

from tritattn import nn as tn


def half_of_basic_block(block):
    return lambda x: block.sa(u := block.ca(x) * x) * u


def redraw(module):
    """New values everywhere, at which no gate saturates."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in module.state_dict().values():
            if t.is_floating_point():
                t.copy_((0.5 + torch.rand(t.shape, generator=generator)) / max(1, t[:1].numel()))
    return module


def step(module, *maps):
    module.zero_grad()
    maps = [x.clone().requires_grad_() for x in maps]
    y = module(*maps)
    y.square().sum().backward()
    return [y.detach(), *(x.grad for x in maps), *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("name", PAIRS)
def test_loads_and_computes_the_same(name, assign):
    theirs, ours = (redraw(build().double()) for build in PAIRS[name])
    state = copy.deepcopy(theirs.state_dict())
    given = dict(state)
    ours.load_state_dict(given, strict=True, assign=assign)
    assert given.keys() == state.keys() and all(torch.equal(given[key], state[key]) for key in state)  # not ours to change
    maps = samples(theirs, name)
    for training in (True, False):
        for found, expected in zip(step(ours.train(training), *maps), step(theirs.train(training), *maps), strict=True):
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-10, atol=1e-10)


def test_cbam_of_a_basic_block():
    """The blog's CBAM has no module of its own: its halves are called ca and sa in a residual block."""
    theirs = redraw(peer_blocks.blog.BasicBlock(16, 16).double())
    ours = tn.CBAM(16, rd_ratio=1 / 4, mlp_bias=False, order="mean_max", norm=False).double()
    ours.load_state_dict({key: t for key, t in theirs.state_dict().items() if key.startswith(("ca.", "sa."))})
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), half_of_basic_block(theirs)(x))


def test_inside_a_network():
    """Renaming happens at every depth, beside other layers, and in modules of one network that come from different packages."""
    theirs = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 32, 1), peer_blocks.external.SEAttention(32)), "b": peer_blocks.authors.CBAM(32)})
    ours = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 32, 1), tn.SqueezeExcite(32, rd_divisor=None, bias=False)), "b": tn.CBAM(32)})
    ours.load_state_dict(redraw(theirs).state_dict())
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(ours["b"](ours["a"](x)), theirs["b"](theirs["a"](x)))


def test_own_state_dict_is_loaded_untouched():
    for build in (lambda: tn.CBAM(32), lambda: tn.ConcurrentSE(32), lambda: tn.ECA(32), lambda: tn.SqueezeExcite(32)):
        source, target = redraw(build()), build()
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True))


def test_linear_weights_under_our_names():
    module = tn.SqueezeExcite(32)
    state = {key: t.flatten(1) if t.dim() > 1 else t for key, t in redraw(tn.SqueezeExcite(32)).state_dict().items()}
    module.load_state_dict(state)
    assert torch.equal(module.fc1.weight.flatten(1), state["fc1.weight"])


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (
            lambda: peer_blocks.external.SEAttention(32),
            lambda: tn.SqueezeExcite(32, rd_divisor=None),
            ['Missing key(s) in state_dict: "0.fc1.bias", "0.fc2.bias"'],
        ),
        (
            lambda: peer_blocks.external.SEAttention(32),
            lambda: tn.SqueezeExcite(32, bias=False),
            [
                "0.fc.0.weight of MONAI ChannelSELayer or External-Attention-pytorch SEAttention",
                "has shape [2, 32], which does not fit 0.fc1.weight [8, 32, 1, 1]",
            ],
        ),
        (
            lambda: peer_blocks.authors.CBAM(32),
            lambda: tn.CBAM(32, norm=False),
            ["Unexpected key(s)", "0.SpatialGate.spatial.bn.weight"],
        ),
        (
            lambda: peer_blocks.authors.CBAM(32),
            lambda: tn.CBAM(32, order="mean_max"),
            ["0.: the weights of Jongchan/attention-module CBAM are for order='max_mean', the module has order='mean_max'"],
        ),
        (lambda: peer_blocks.authors.CBAM(32), lambda: tn.CBAM(32, mlp_bias=False), ["Unexpected key(s)", "0.ChannelGate.mlp.1.bias"]),
        (
            lambda: peer_blocks.authors.CBAM(32),
            lambda: tn.CBAM(32, kernel_size=3),
            ["0.SpatialGate.spatial.conv.weight", "has shape [1, 2, 7, 7], which does not fit 0.spatial.conv.weight [1, 2, 3, 3]"],
        ),
        (lambda: nn.Linear(3, 3), lambda: tn.SqueezeExcite(32), ["Unexpected key(s)", "Missing key(s)"]),
    ],
)
def test_what_does_not_fit_is_named(theirs, ours, words):
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(ours()).load_state_dict({f"0.{key}": t for key, t in theirs().state_dict().items()}, strict=True)
    for word in words:
        assert word in str(caught.value)


def test_not_strict():
    module = tn.SqueezeExcite(32, rd_divisor=None)
    source = redraw(peer_blocks.external.SEAttention(32))
    outcome = module.load_state_dict(source.state_dict(), strict=False)
    assert outcome.missing_keys == ["fc1.bias", "fc2.bias"] and not outcome.unexpected_keys
    assert torch.equal(module.fc1.weight.flatten(1), source.fc[0].weight)
