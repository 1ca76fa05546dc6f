"""BAM: a channel and a spatial branch side by side, and one gate of both together, which is never stored.

Both branches are torch modules, so this is a relay: the channel statistics, whose backward also takes in what comes back through the spatial
branch's convolutions on the map, and CBAM's gate with the channel logits relayed as well.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from .._relay import through
from .._spec import Spec
from . import _checks
from ._channel import channel_relay
from ._launch import NO_NORM
from ._networks import Network, called, network
from .gate import gate_family
from .spatial import spatial_gate

COMBINES = ("product", "sum")


def bam(
    x: Tensor, channel: Network, spatial: Network, *, combine: str = "product", gate: str = "sigmoid", residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """Bottleneck Attention Module (Park et al., 2018, arXiv:1807.06514): y = a(x * (1 + f(c s)) + residual), c = channel(mean over positions of x),
    s = spatial(x); with combine="sum" f(c + s).

    The map is read for its means, by the spatial branch, and for y. The product is the authors' code, the sum their paper. Means are over all of a
    map: the authors' code pools windows of H x H, and so raises for H > W and leaves out a part of the map for W > H.

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        channel: a module or function from the means [N, C] to logits [N, C].
        spatial: a module or function from x to logits [N, 1, H, W], or [N, 1, 1, 1] for the same everywhere. Both get their argument in the dtype of
            their parameters, a copy of the map where that is not x's, or the means in fp32 (fp64 for fp64 maps).
        combine: "product" or "sum". gate: f, one of sigmoid, hard_sigmoid, relu, none.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _checks.feature_map(x)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("combine", combine, COMBINES)
    _checks.choice("gate", gate, reference.GATES)
    network("channel", channel)
    network("spatial", spatial)
    n, _, h, w = x.shape
    spec = Spec(gate="none", spatial_gate="none", combine=combine, joint=gate, activation=activation)
    z, *slots = channel_relay(x, *NO_NORM, spec=spec)
    map_slot, channel_slot, spatial_slot, through_slot = slots or (None,) * 4
    c = called("channel", channel, z.select(1, 0), x.shape[:2]).to(z.dtype)
    s = called("spatial", spatial, through(x, through_slot), (n, 1, None, None)).to(z.dtype)
    if s.shape[2:] != x.shape[2:] and s.shape[2:] != (1, 1):
        raise ValueError(f"spatial: got a network that returns shape {list(s.shape)}, expected {[n, 1, h, w]} or {[n, 1, 1, 1]}")
    s = s.expand(n, 1, h, w)
    if map_slot is None:  # the squeeze took the reference
        return gate_family(x, c, s, None, residual, spec=spec)
    return spatial_gate(x, c, s, residual, map_slot, spatial_slot, channel_slot, spec=spec)
