"""Shuffle attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ._base import Block, one_of, positive, weights


class ShuffleAttention(Block):
    """Shuffle attention: one half of each group of channels gated per channel, the other per position, and the channels shuffled.

        y[2 i] = u[i],  y[2 i + 1] = u[i + C / 2],    u = x * f(t)
        t = cweight * z + cbias in the first half of a group,  t = sweight * gn(x) + sbias in the second

    with z the mean of each plane and gn its normalisation by its own mean and variance, times gn.weight plus gn.bias.

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x; cweight, cbias, sweight, sbias [1, C / (2 groups), 1, 1],
    gn.weight, gn.bias [C / (2 groups)].

    Args:
        channels: C, divisible by 2 groups.
        groups: the authors' 64 by default, or as many as divide half of the channels; External-Attention-pytorch has 8.
        eps: of the normalisation.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.

    The weights start at 0 and the biases at 1, as the authors'. Their code returns contiguous maps for channels-last ones, and
    External-Attention-pytorch's raises for these; here a map keeps its layout. Theirs also make a half-precision map fp32 beside
    fp32 parameters, as under autocast; here it keeps its dtype.

    Zhang & Yang, SA-Net, https://arxiv.org/abs/2102.00039
    """

    layers = ("cweight", "cbias", "sweight", "sbias", "gn")
    cweight: nn.Parameter
    cbias: nn.Parameter
    sweight: nn.Parameter
    sbias: nn.Parameter

    def __init__(
        self,
        channels: int,
        groups: int | None = None,
        eps: float = 1e-5,
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        if groups is None:
            groups = max(1, math.gcd(positive("channels", channels) // 2, 64))
        if positive("channels", channels) % (2 * positive("groups", groups)):
            raise ValueError(f"groups: got {groups}, expected a number whose double divides the {channels} channels")
        half = channels // (2 * groups)
        self.groups = groups
        self.gate = one_of("gate", gate, reference.GATES)
        for name, start in (("cweight", 0.0), ("cbias", 1.0), ("sweight", 0.0), ("sbias", 1.0)):
            setattr(self, name, nn.Parameter(torch.full((1, half, 1, 1), start, **like)))
        self.gn = nn.GroupNorm(half, half, eps, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return {"eps": layers["gn"].eps}

    def settings(self) -> dict[str, Any]:
        return {"groups": self.groups, "gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor, sbias: Tensor, gn: Any, **settings: Any) -> Tensor:
        return ops.shuffle(x, cweight, cbias, sweight, sbias, *weights(gn), eps=gn.eps, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        """Of x's shape, before the shuffle."""
        over = (-1, *(1,) * (x.dim() - 2))
        cweight, cbias, sweight, sbias = (t.view(over) for t in (self.cweight, self.cbias, self.sweight, self.sbias))
        first, second = x.unflatten(1, (self.groups, 2, -1)).unbind(2)  # [N, G, C / 2G, ...]
        z = ops.channel_statistics(x, ("avg",)).to(x.dtype).unflatten(2, (self.groups, 2, -1))[:, 0, :, 0]  # [N, G, C / 2G]
        logits = cweight * z.view(*z.shape, *(1,) * (x.dim() - 2)) + cbias
        normed = sweight * self.gn(second.flatten(0, 1)).unflatten(0, (-1, self.groups)) + sbias
        return reference.GATES[self.gate](torch.stack([logits.expand_as(first), normed], 2).flatten(1, 3))

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        shuffled = ops.gate(x, self.gate_weights(x)).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return reference.finish(shuffled.to(reference.accumulator(x.dtype), copy=True), x, residual, self.activation)
