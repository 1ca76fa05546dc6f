"""Converted blocks in use: what is changed on them, the inputs they get, and the tools they go through."""

import copy
import inspect

import peer_blocks.blog as blog
import peer_blocks.external as external
import pytest
import torch
import torch.nn.functional as F
from pairs.foundation import smp
from peer_pairs import BLOCKS, PROMOTES, RETURN_GATE, assert_same, build, sample, samples, step
from torch import nn
from torch.nn.utils import parametrize, prune

import tritattn
from tritattn import nn as tn


class LowRank(nn.Module):
    """An adapter around a layer that shows the layer's weight and adds to its result."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    weight = property(lambda self: self.layer.weight)
    bias = property(lambda self: self.layer.bias)

    def forward(self, x):
        return self.layer(x) + F.linear(x, 0.1 * torch.ones_like(self.weight))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


CHANGES = {
    "in place": lambda block: block.fc[0].weight.data.mul_(2),
    "new parameter": lambda block: setattr(block.fc[0], "weight", nn.Parameter(2 * block.fc[0].weight.detach())),
    "new layer": lambda block: block.fc.__setitem__(0, nn.Linear(32, 2, dtype=torch.float64)),
    "adapter": lambda block: block.fc.__setitem__(0, LowRank(block.fc[0])),
    "activation": lambda block: block.fc.__setitem__(1, nn.Tanh()),
    "one more module": lambda block: block.fc.append(nn.Hardtanh(0.45, 0.55)),
    "hook": lambda block: block.fc[3].register_forward_hook(lambda m, args, y: 0.5 * y),
    "pruning": lambda block: prune.l1_unstructured(block.fc[0], "weight", 0.5),
    "parametrization": lambda block: parametrize.register_parametrization(block.fc[0], "weight", Half()),
    "old weight_norm": lambda block: nn.utils.weight_norm(block.fc[0]).weight_g.data.mul_(2),
    "old spectral_norm": lambda block: nn.utils.spectral_norm(block.fc[0]),
    "load_state_dict": lambda block: block.load_state_dict({k: 2 * t for k, t in block.state_dict().items()}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_the_swap_take_effect(name):
    original = build("external-SEAttention")
    block = copy.deepcopy(original)
    tritattn.convert(block)
    x = sample(block)
    before = step(copy.deepcopy(block), x)["y"]
    for changed_block in (original, block):
        torch.manual_seed(0)
        CHANGES[name](changed_block)
    found = step(block, x)
    assert_same(found, step(original, x))
    assert not torch.allclose(found["y"], before)


@pytest.mark.parametrize("name", ["pruning", "parametrization", "old weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reweighted_layers_convert_and_stay_fused(name, monkeypatch):
    original = build("external-SEAttention")
    CHANGES[name](original)
    fused = build("external-SEAttention")
    CHANGES[name](fused)
    fused(sample(fused))  # leaves a derived, non-leaf weight behind, which cannot be copied as it is
    assert tritattn.convert(fused).converted
    x = sample(fused)
    expected = step(original, x)
    monkeypatch.setattr(external.SEAttention, "forward", None)
    assert_same(step(fused, x), expected)


def test_other_inputs_take_the_original_forward():
    block = smp(32).double().eval()
    original = copy.deepcopy(block)
    tritattn.convert(block)
    unbatched = torch.randn(32, 5, 5, dtype=torch.float64)
    assert torch.equal(block(unbatched), original(unbatched))
    batch = unbatched[None]
    assert torch.equal(block(x=batch), original(batch))
    with pytest.raises(TypeError):
        block(batch, batch)


def test_training_tools():
    """An optimiser and an average made before the swap go on; state dicts travel both ways."""
    torch.manual_seed(0)
    model, plain = blog.Network().double(), None
    plain = copy.deepcopy(model)
    runs = []
    for m, swap in ((plain, False), (model, True)):
        optimiser = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
        average = torch.optim.swa_utils.AveragedModel(m)
        losses = []
        for i in range(3):
            if swap and i == 1:
                assert len(tritattn.convert(m).converted) == 5
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            loss = m(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update_parameters(m)
            losses.append(loss.detach())
        runs.append((torch.stack(losses), torch.cat([p.flatten() for p in average.parameters()])))
    for found, expected in zip(runs[1], runs[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_compile_export_and_trace():
    torch.compiler.reset()
    torch.manual_seed(0)
    model = blog.Network().eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    tritattn.convert(model)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)  # the original forward
    with pytest.raises(RuntimeError, match=r"after tritattn\.restore"):
        torch.jit.script(model)


@pytest.mark.parametrize("strict", [False, True])
def test_arguments_keep_their_names(strict):
    """By which torch.export, among others, is told about them."""
    torch.compiler.reset()
    block = smp(32).eval()
    original = inspect.signature(block.forward)
    tritattn.convert(block)
    assert inspect.signature(block.forward) == original
    x = torch.randn(2, 32, 4, 4)
    program = torch.export.export(block, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}, strict=strict).module()
    torch.testing.assert_close(program(torch.cat([x, x])), block(torch.cat([x, x])))


def test_each_class_has_its_own_compile_cache():
    """torch.compile counts recompilations by code object; blocks of ten classes must not use up one limit together."""
    codes = set()
    for name in ("external-SEAttention", "authors-CBAM", "blog-csSE"):
        block = build(name)
        tritattn.convert(block)
        codes.add(id(type(block).forward.__code__))
    codes |= {id(kind.forward.__code__) for kind in (tn.SqueezeExcite, tn.CBAM, tn.ECA)}
    assert len(codes) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_under_autocast(name, dtype):
    original = build(name).float()
    block = copy.deepcopy(original)
    tritattn.convert(block)
    maps = [x.to(dtype) for x in samples(block, name)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = block(*maps), original(*maps)
    if name not in RETURN_GATE:  # a gate takes the dtype of the map, whatever its layers ran in
        assert found.dtype == (dtype if name in PROMOTES else expected.dtype)
    found, expected = found.detach().float(), expected.detach().float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.04 * float(expected.abs().max()))
