"""Running the blocks of `pairs`: built with random weights, a step of training, a comparison."""

import torch
from pairs import BLOCKS, PAIRS, PROMOTES, RANKS, RETURN_GATE, SQUARE, TWO_MAPS

__all__ = ["BLOCKS", "PAIRS", "PROMOTES", "RANKS", "RETURN_GATE", "assert_same", "build", "sample", "samples", "step"]


def build(name):
    torch.manual_seed(0)
    block = BLOCKS[name]().double()
    with torch.no_grad():
        for key, t in block.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.2 if "running" in key else torch.randn_like(t) / max(1, t[:1].numel()) ** 0.5)
    return block


def channels(block):
    """Of the map that the block takes: those of its first layer, where that has more than two."""
    if hasattr(block, "in_channels"):
        return block.in_channels
    layers = (m for m in block.modules() if getattr(m, "weight", None) is not None and m.weight.dim() > 1)
    return next((c for m in layers if (c := m.weight.shape[1] * getattr(m, "groups", 1)) > 2), 16)


def samples(block, name=None, ties=False):
    """The maps that the block takes."""
    size = (7, 7) if name in SQUARE else {3: (11,), 4: (6, 8), 5: (3, 4, 2)}[RANKS.get(name, 4)]
    shape = (1 + (name in TWO_MAPS), 2, channels(block), *size)
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list((2 * maps).round().relu() / 2 if ties else maps)


def sample(block, name=None, ties=False):
    """The map that a block of one takes."""
    (x,) = samples(block, name, ties)
    return x


def step(block, *maps):
    """Output, gradients and buffers of one training step."""
    block.zero_grad()
    maps = [x.clone().requires_grad_() for x in maps]
    y = block(*maps)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype))
    tensors = {f"x{i}": x for i, x in enumerate(maps)} | dict(block.named_parameters())
    result = {"y": y.detach()} | {f"d {name}": torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
    return result | {name: b.clone() for name, b in block.named_buffers()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=1e-11 * largest, msg=lambda text, name=name: f"{name}: {text}")
