"""The benchmarked ops: a block with what follows it in a network, `se+residual+relu`. Costs are in U, one read or one write of the map."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .blocks import BLOCKS, Block
from .blocks.block import TAILS

# What a run without --ops measures, the most important first.
OPS = (
    *("se+residual+relu", "cbam+residual+relu", "se", "cbam", "scse", "eca", "sse", "scse_max", "scse+residual+relu", "ese", "cse"),
    *("norm_se+residual+relu", "norm_se", "norm_silu_se", "shuffle", "simam", "ge"),
    *("se+relu", "se+residual", "eca+residual+relu", "sse+residual+relu", "channel_attention", "spatial_attention"),
    *("gc", "gc_scale", "gsop"),
    *("sk", "splat"),
    *("coord", "triplet", "strip", "triplet+residual+relu"),
    *("bam", "bam+residual+relu"),
    *("aff", "aff+relu", "iaff", "mscam", "blend"),
)


@dataclass(frozen=True)
class Op:
    name: str
    block: Block
    block_name: str
    residual: bool
    activation: str

    @property
    def bar_u(self) -> tuple[int, int]:
        """One read of the map for each global dependency: with a ReLU, its mask needs the map or its sum with the residual once more."""
        forward, backward = self.block.bar
        if self.activation != "none":
            backward += 2 if self.residual else 1 - self.block.rereads
        return forward + self.residual, backward

    @property
    def floor_u(self) -> tuple[int, int]:
        """The map kept on chip between reduction and gate; with residual and activation the backward also has their mask and gradient."""
        forward, backward = self.block.floor
        return forward + self.residual, backward + 2 * (self.residual and self.activation != "none")

    def tail(self, gated: Tensor, residual: Tensor | None) -> Tensor:
        """What follows the block, as networks write it: in place."""
        if residual is not None:
            gated += residual
        if self.activation == "relu":
            return F.relu(gated, inplace=True)
        return TAILS[self.activation](gated)


def op(name: str) -> Op:
    """The op of that name: a block, then "+residual" and "+<activation>" in this order, each or none."""
    block, *epilogue = name.split("+")
    residual = epilogue[:1] == ["residual"]
    activation = epilogue[residual:] or ["none"]
    if block not in BLOCKS or len(activation) > 1 or activation[0] not in TAILS:
        raise ValueError(f"no op {name!r}; blocks: {', '.join(BLOCKS)}; after one: [+residual][+relu|+silu|+hardswish|+gelu]")
    return Op(name, BLOCKS[block], block, residual, activation[0])
