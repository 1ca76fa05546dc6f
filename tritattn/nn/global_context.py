"""The global context block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ._base import Block, one_of, pointwise, positive, reduced, weights


class Bottleneck(nn.Module):
    """z [N, C, 1, 1] -> fc2(h(norm(fc1(z)))), norm a LayerNorm over the R channels between the two."""

    def __init__(self, channels: int, width: int, act: str, eps: float, like: Mapping[str, Any]) -> None:
        super().__init__()
        self.act = act
        self.fc1 = pointwise(channels, width, True, like)
        self.norm = nn.LayerNorm([width, 1, 1], eps=eps, **like)
        self.fc2 = pointwise(width, channels, True, like)

    def forward(self, z: Tensor) -> Tensor:
        return self.fc2(reference.HIDDEN[self.act](self.norm(self.fc1(z))))

    def extra_repr(self) -> str:
        return f"act={self.act}"


class GlobalContext(Block):
    """Global context: the map's mean under a softmax over its positions, and the map shifted or scaled by a bottleneck of it.

        y = x * f(scale(ctx)) + add(ctx),  ctx_c = sum_p a_p x_cp,  a = softmax_p(attn(x))

    Shapes: x [N, C, H, W], y as x; attn.weight [1, C, 1, 1]; in `add` and `scale` fc1.weight [R, C, 1, 1], norm.weight [R, 1, 1],
    fc2.weight [C, R, 1, 1].

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`; with
            `rd_divisor=None` rounded down.
        pool: "att" for the softmax, "avg" for the plain mean, without `attn`.
        fuse_add, fuse_scale: whether there are `add` and `scale`, one of them at least. The authors add; timm's "gc" scales, its "gca" adds.
        act: h in the bottlenecks: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        eps: of the LayerNorms: 1e-5 in the authors' code, 1e-6 in timm.
        residual, activation: see `Block`.

    The last layers start at zero, as the authors'; those of timm's only in `add`.

    Cao et al., GCNet, https://arxiv.org/abs/1904.11492
    """

    layers = ("attn", "add", "scale")
    called = frozenset({"add", "scale"})
    attn: nn.Conv2d | None
    add: Bottleneck | None
    scale: Bottleneck | None

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        pool: str = "att",
        fuse_add: bool = True,
        fuse_scale: bool = False,
        act: str = "relu",
        gate: str = "sigmoid",
        eps: float = 1e-5,
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        one_of("pool", pool, ("att", "avg"))
        one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        if not (fuse_add or fuse_scale):
            raise ValueError("fuse_add: got False, and False for fuse_scale, expected True for one of them")
        self.attn = pointwise(channels, 1, True, like) if pool == "att" else None
        self.add = Bottleneck(channels, width, act, eps, like) if fuse_add else None
        self.scale = Bottleneck(channels, width, act, eps, like) if fuse_scale else None
        self.initialise()

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        path = "add" if "add" in layers else "scale"
        fc1 = layers[f"{path}.fc1"]
        return {
            "channels": fc1.weight.shape[1],
            "rd_channels": fc1.weight.shape[0],
            "pool": "att" if "attn" in layers else "avg",
            "fuse_add": "add" in layers,
            "fuse_scale": "scale" in layers,
            "eps": layers[f"{path}.norm"].eps,
        }

    def initialise(self) -> None:
        """He's normal weights for the attention, and last layers of zero: the identity with `add` alone, a gate of a half with `scale`."""
        if self.attn is not None:
            nn.init.kaiming_normal_(self.attn.weight, nonlinearity="relu")
            nn.init.zeros_(self.attn.bias)  # type: ignore[arg-type]
        for branch in (self.add, self.scale):
            if branch is not None:
                nn.init.zeros_(branch.fc2.weight)
                nn.init.zeros_(branch.fc2.bias)  # type: ignore[arg-type]

    def settings(self) -> dict[str, Any]:
        return {"gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, attn: Any, add: Any, scale: Any, **settings: Any) -> Tensor:
        return ops.gc(x, *weights(attn), add=add, scale=scale, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.attn is None:
            context = x.mean((2, 3), keepdim=True)
        else:
            a = self.attn(x).flatten(2).softmax(-1)
            context = torch.matmul(x.flatten(2), a.transpose(1, 2))[..., None]
        gate = x.new_ones(1) if self.scale is None else reference.GATES[self.gate](self.scale(context))
        if self.add is not None:
            shift = self.add(context).to(x.dtype)
            residual = shift.expand_as(x) if residual is None else residual + shift
        return ops.gate(x, gate, residual=residual, activation=self.activation)
