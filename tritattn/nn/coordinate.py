"""Coordinate attention and its relatives without channel mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..ops.axis import COMBINES, AxisSpec, attend
from ._base import Block, odd, one_of, pointwise, positive, reduced, weights


class CoordinateAttention(Block):
    """Coordinate attention: a gate per channel and row and one per channel and column, from the means along the other direction.

        y_ij = x_ij * f(t^h_i) * f(t^w_j),    t^h = W_h u^h + b_h,  t^w = W_w u^w + b_w,  [u^h, u^w] = h(norm(W1 [mean_w x, mean_h x] + b1))

    Shapes: x [N, C, H, W], y as x; conv1.weight [R, C, 1, 1], conv_h.weight and conv_w.weight [C, R, 1, 1].

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`, or down with None,
            and at least 8.
        bias: of the layers.
        act: h: hardswish (default), none, relu, relu6, leaky_relu, silu, gelu.
        norm: whether a BatchNorm2d follows the first layer.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        combine: "product", or "logits" for y_ij = x_ij * f(t^h_i + t^w_j).
        residual, activation: see `Block`.

    The defaults are those of the authors' code, R = max(8, C // 32). timm's CoordAttn has no biases and rd_ratio=1/24, rd_divisor=8; its
    SimpleCoordAttn norm=False, act="silu", combine="logits" and rd_ratio=1/6, rd_divisor=8.

    Hou et al., Coordinate Attention for Efficient Mobile Network Design, https://arxiv.org/abs/2103.02907
    """

    layers = ("conv1", "bn1", "conv_h", "conv_w")
    bn1: nn.BatchNorm2d | None

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 32,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bias: bool = True,
        act: str = "hardswish",
        norm: bool = True,
        gate: str = "sigmoid",
        combine: str = "product",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        width = width if rd_channels is not None else max(8, width)
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.combine = one_of("combine", combine, COMBINES)
        self.conv1 = pointwise(channels, width, bias, like)
        self.bn1 = nn.BatchNorm2d(width, **like) if norm else None
        self.conv_h = pointwise(width, channels, bias, like)
        self.conv_w = pointwise(width, channels, bias, like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        first, last = layers["conv1"], layers["conv_h"]
        sizes = {"channels": last.weight.shape[0], "rd_channels": first.weight.shape[0]}
        return {**sizes, "bias": first.bias is not None, "norm": layers.get("bn1") is not None}

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.act, "gate": self.gate, "combine": self.combine, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, conv1: Any, bn1: Any, conv_h: Any, conv_w: Any, **settings: Any) -> Tensor:
        return ops.coord(x, *weights(conv1), *weights(conv_h), *weights(conv_w), norm=bn1, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, None]:
            u = self.conv1(torch.cat([rows, columns], 1).transpose(1, 2)[..., None].to(x.dtype))
            u = reference.HIDDEN[self.act](u if self.bn1 is None else self.bn1(u))
            u_h, u_w = u.split([rows.shape[1], columns.shape[1]], 2)
            return self.conv_h(u_h)[..., 0].transpose(1, 2), self.conv_w(u_w)[..., 0].transpose(1, 2), None

        return attend(x, excite, residual, AxisSpec(self.gate, self.combine, activation=self.activation))


class StripAttention(Block):
    """Strip attention: the gates of `CoordinateAttention`, each from its own channel's means through a depthwise convolution along them.

        y_ij = x_ij * f(t^h_i + t^w_j)  or  x_ij * f(t^h_i) * f(t^w_j),    t^h = h(norm_h(conv_h(mean_w x))),  t^w = h(norm_w(conv_w(mean_h x)))

    Shapes: x [N, C, H, W], y as x; conv_h.weight [C, 1, k, 1], conv_w.weight [C, 1, 1, k].

    Args:
        channels: C.
        kernel_size: k, odd; None for no convolutions.
        bias: of the convolutions.
        act: h: none (default), relu, relu6, leaky_relu, silu, hardswish, gelu.
        norm: whether a GroupNorm of one group follows each convolution.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        combine: "logits" for the first form, "product" for the second.
        residual, activation: see `Block`.

    The defaults are timm's StripAttn; its EfficientLocalAttn has kernel_size=7, act="silu", norm=True, combine="product".

    Xu and Wan, Efficient Local Attention, https://arxiv.org/abs/2403.01123
    """

    layers = ("conv_h", "norm_h", "conv_w", "norm_w")
    conv_h: nn.Conv2d | None
    conv_w: nn.Conv2d | None
    norm_h: nn.GroupNorm | None
    norm_w: nn.GroupNorm | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | None = 3,
        bias: bool = False,
        act: str = "none",
        norm: bool = False,
        gate: str = "sigmoid",
        combine: str = "logits",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        positive("channels", channels)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.combine = one_of("combine", combine, COMBINES)
        for name, axis in (("h", 0), ("w", 1)):
            conv = None
            if kernel_size is not None:
                k = odd("kernel_size", kernel_size)
                size, side = ((k, 1), (k // 2, 0)) if axis == 0 else ((1, k), (0, k // 2))
                conv = nn.Conv2d(channels, channels, size, padding=side, groups=channels, bias=bias, **like)
            setattr(self, f"conv_{name}", conv)
            setattr(self, f"norm_{name}", nn.GroupNorm(1, channels, **like) if norm else None)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        conv, norm = layers.get("conv_h"), layers.get("norm_h")
        if conv is None:
            return {"channels": layers["norm_h"].weight.shape[0], "kernel_size": None, "norm": True}
        return {"channels": conv.weight.shape[0], "kernel_size": conv.weight.shape[2], "bias": conv.bias is not None, "norm": norm is not None}

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.act, "gate": self.gate, "combine": self.combine, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, conv_h: Any, norm_h: Any, conv_w: Any, norm_w: Any, **settings: Any) -> Tensor:
        return ops.strip(x, *weights(conv_h), *weights(conv_w), norm_h=norm_h, norm_w=norm_w, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        def head(t: Tensor, *layers: nn.Module | None) -> Tensor:
            for layer in layers:
                t = t if layer is None else layer(t)
            return reference.HIDDEN[self.act](t)

        def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, None]:
            t_h = head(rows.transpose(1, 2)[..., None].to(x.dtype), self.conv_h, self.norm_h)
            t_w = head(columns.transpose(1, 2)[..., None, :].to(x.dtype), self.conv_w, self.norm_w)
            return t_h[..., 0].transpose(1, 2), t_w[..., 0, :].transpose(1, 2), None

        return attend(x, excite, residual, AxisSpec(self.gate, self.combine, activation=self.activation))
