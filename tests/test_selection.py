"""What selective kernels and split attention of other packages do to the layout of a network, and ours do not."""

import copy

import pytest
import torch
from peer_pairs import PAIRS, channels

import tritattn


def channels_last(block, x):
    return block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["timm-SelectiveKernel", "timm-SplitAttn", "authors-SplAtConv2d", "external-SKAttention"])
def test_a_channels_last_network_stays_so(name):
    """Theirs hand a contiguous map on, which every convolution behind them has to turn back; ours, built or converted, a channels_last one."""
    theirs, ours = (build() for build in PAIRS[name])
    x = torch.randn(2, channels(theirs), 6, 5)
    assert not channels_last(theirs, x)
    assert channels_last(ours, x)
    converted = copy.deepcopy(theirs)
    tritattn.convert(converted)
    assert channels_last(converted, x)


def test_the_gradient_keeps_the_layout():
    block = tritattn.nn.SplitAttention(8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    block(x).sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
