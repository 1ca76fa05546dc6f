"""Where another implementation is wrong, shown on it, and what its paper means instead, shown on ours with its weights."""

import peer_blocks.bam as bam
import pytest
import torch
from peer_imports import peer
from test_checkpoints import redraw

import tritattn
from tritattn import nn as tn


def paper_bam(block, x):
    """y = x (1 + f(c s)) with the mean over the whole map."""
    c = block.channel_att.gate_c(x.mean((2, 3)))[..., None, None]
    return x * (1 + torch.sigmoid(c * block.spatial_att.gate_s(x)))


def test_the_published_bam_cannot_be_built():
    with pytest.raises(NameError, match="gate_activation"):
        bam.Published(32)


def test_bam_of_maps_that_are_not_square():
    """Windows of H x H: an error where H > W, and where W > H the mean of the left part of the map."""
    theirs, ours = redraw(bam.BAM(32).double()).eval(), tn.BAM(32).double().eval()
    ours.load_state_dict(theirs.state_dict())
    for size in ((9, 5), (5, 9)):
        x = torch.randn(1, 32, *size, dtype=torch.float64)
        torch.testing.assert_close(ours(x), paper_bam(theirs, x))
    with pytest.raises(RuntimeError, match="Output size is too small"):
        theirs(torch.randn(2, 32, 9, 5, dtype=torch.float64))
    changed = x.clone()
    changed[..., 5:] += 1  # what it does not see
    means = [theirs.channel_att(t) for t in (x, changed)]
    assert torch.equal(*means) and not torch.allclose(theirs(x), ours(x))
    found = theirs(x)
    assert tritattn.convert(theirs).converted
    assert torch.equal(theirs(x), found)  # a converted block keeps its own numbers there


def test_bam_of_external_attention_takes_7x7_maps_alone():
    """Its convolutions shrink the map by two pixels each; at 7x7 one is left, for all positions."""
    theirs = redraw(bam.BAMBlock(32).double()).eval()
    x = torch.randn(2, 32, 8, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expanded size"):
        theirs(x)
    options = {"num_layers": 3, "dilated_convs": 3, "dilation": 2, "combine": "sum"}
    same, ours = tn.BAM(32, padding=1, **options).double().eval(), tn.BAM(32, **options).double().eval()
    for block in (same, ours):
        block.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(same(x[..., :7, :7]), theirs(x[..., :7, :7]))
    with pytest.raises(ValueError, match=r"spatial: got a network that returns shape \[2, 1, 2, 2\], expected \[2, 1, 8, 8\] or"):
        same(x)
    c, s = ours.channel.mlp(x.mean((2, 3)))[..., None, None], ours.spatial.convs(x)
    assert s.shape == (2, 1, 8, 8) and s.std() > 0
    torch.testing.assert_close(ours(x), x * (1 + torch.sigmoid(c + s)))


def test_timms_light_cbam_has_sigmoids_whatever_it_is_given():
    usual, theirs = (peer("timm.layers.cbam").LightCbamModule(32, gate_layer=gate).double().eval() for gate in ("sigmoid", "hard_sigmoid"))
    ours = tn.create("lcbam", 32, gate="hard_sigmoid", spatial_gate="hard_sigmoid").double().eval()
    for block in (theirs, ours):
        block.load_state_dict(redraw(usual).state_dict())
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64)
    found = theirs(x)
    assert torch.equal(found, usual(x)) and not torch.allclose(ours(x), found)
    assert tritattn.convert(theirs).converted
    torch.testing.assert_close(theirs(x), found)  # and so it has once it is converted
