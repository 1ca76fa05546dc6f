"""GSoP's attention and head beside the authors' code: state dicts, values, gradients, running statistics."""

import pytest
import torch
from peer_blocks.gsop import Bottleneck, Covpool, Head, Sqrtm
from peer_pairs import assert_same, step
from torch import nn

import tritattn
from tritattn import nn as tn
from tritattn import ops
from tritattn.nn.gsop import square_root


def redraw(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, t in module.state_dict().items():
            if t.is_floating_point():
                noise = torch.randn(t.shape, generator=generator, dtype=t.dtype)
                t.copy_(noise.abs() + 0.2 if "running_var" in key else noise / max(1, t[:1].numel()) ** 0.5)
    return module


class Attention(nn.Module):
    """The attention of a residual block alone."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block.attend(x)


MODES = {"1": "channel", "2": "position", "+": "average", "M": "max", "&": "concat"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("attention", MODES)
def test_attention(attention, training):
    theirs = redraw(Bottleneck(64, 16, attention=attention, att_dim=6).double())
    ours = tn.GSoP(64, 6, MODES[attention]).double()
    names = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
    ours.load_state_dict({key: t for key, t in theirs.state_dict().items() if not key.startswith(names)})
    x = torch.randn(2, 64, 9, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected, found = step(Attention(theirs.train(training)), x), step(ours.train(training), x)
    for key in ("y", "d x0"):
        assert_same({key: found[key]}, {key: expected[key]})


def test_position_mode_of_the_authors_cannot_be_trained():
    """It adds in place to the output of a ReLU, which the ReLU's backward needs; so `convert` has nothing to compare with and leaves it."""
    block = Bottleneck(64, 16, attention="2", att_dim=6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        block(torch.randn(2, 64, 9, 11)).sum().backward()
    (row,) = tritattn.convert(block)
    assert row.status == "left" and "inplace" in row.detail
    tn.GSoP(64, 6, "position", activation="relu")(*torch.randn(2, 2, 64, 9, 11)).sum().backward()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("mode", MODES.values())
def test_epilogue(mode, residual):
    """The sum and the ReLU that follow in a network, taken into the block."""
    block = redraw(tn.GSoP(64, 6, mode).double()).eval()
    x, other = (torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (1, 2))
    expected = torch.relu(block(x) + other if residual else block(x))
    block.activation = "relu"
    torch.testing.assert_close(block(x, other if residual else None), expected)


@pytest.mark.parametrize("iterations", [2, 3, 5])
def test_head(iterations):
    theirs = redraw(Head(12, 7, iterations).double())
    ours = tn.ISqrtCovPooling(12, 7, iterations).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 12, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_same(step(ours, x), step(theirs, x))


def test_square_root():
    u = torch.randn(2, 6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = u @ u.transpose(1, 2) / 40
    root = square_root(a, 20)
    torch.testing.assert_close(root @ root, a)
    # a single iteration of the authors' returns (3 - a / trace) / 2, which is no root of anything
    trace = a.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]
    torch.testing.assert_close(Sqrtm.apply(a, 1) / trace.sqrt(), 1.5 * torch.eye(6, dtype=torch.float64) - 0.5 * a / trace)
    torch.testing.assert_close(square_root(a, 1), (1.5 * a - 0.5 * a @ a / trace) / trace.sqrt())


def test_covariance_of_maps_far_from_zero():
    """In fp32 the authors' product with a centring matrix loses what ours keeps."""
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(0)) + 3000
    exact = Covpool.apply(x.double())
    ours, theirs = ((f(x).double() - exact).abs().max() for f in (ops.covariance, Covpool.apply))
    assert ours < 1e-5 < theirs
