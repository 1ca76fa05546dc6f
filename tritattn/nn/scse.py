"""Concurrent spatial and channel squeeze-and-excitation, and its two halves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops, reference
from ._base import Block, ChannelGate, bottleneck, bottleneck_options, one_of, pointwise, positive, reduced, weights


class ChannelSE(ChannelGate):
    """cSE, the channel half of scSE: squeeze-and-excitation with a reduction by 2.

        y = x * f(W2 h(W1 z + b1) + b2),    z_c = mean of x_c over all positions

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x; fc1.weight [R, C, 1, 1], fc2.weight [C, R, 1, 1].

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`; with
            `rd_divisor=None` rounded down.
        bias: of both layers.
        act: h, between the layers: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`; what may come before: see `ChannelGate`.

    Roy et al., Concurrent Spatial and Channel Squeeze & Excitation, https://arxiv.org/abs/1803.02579
    """

    layers = ("fc1", "fc2")

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 2,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.fc1 = pointwise(channels, width, bias, like)
        self.fc2 = pointwise(width, channels, bias, like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return bottleneck_options(layers["fc1"], layers["fc2"])

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.act, "gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, fc1: Any, fc2: Any, **settings: Any) -> Tensor:
        return ops.cse(x, *weights(fc1), *weights(fc2), **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        z = ops.channel_statistics(x, ("avg",))
        return reference.GATES[self.gate](bottleneck(z, x, self.fc1, self.fc2, self.act))


class SpatialSE(Block):
    """sSE, the spatial half of scSE: a gate per position from a weighted sum of the channels.

        y = x * f(q),    q[n, h, w] = sum_c w_c x[n, c, h, w] + b

    Shapes: x [N, C, H, W], y as x; conv.weight [1, C, 1, 1].

    Args:
        channels: C.
        bias: whether the convolution has one.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.

    Roy et al., Concurrent Spatial and Channel Squeeze & Excitation, https://arxiv.org/abs/1803.02579
    """

    layers = ("conv",)

    def __init__(
        self,
        channels: int,
        bias: bool = True,
        gate: str = "sigmoid",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        self.gate = one_of("gate", gate, reference.GATES)
        self.conv = pointwise(positive("channels", channels), 1, bias, {"device": device, "dtype": dtype})

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        conv = layers["conv"]
        return {"channels": conv.weight.shape[1], "bias": conv.bias is not None}

    def settings(self) -> dict[str, Any]:
        return {"gate": self.gate, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, conv: Any, **settings: Any) -> Tensor:
        return ops.sse(x, *weights(conv), **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        return reference.GATES[self.gate](self.conv(x))


class ConcurrentSE(Block):
    """scSE: the channel gate and the spatial gate side by side, their gated maps summed or the larger one taken.

        y = x * s + x * q   or   y = max(x * s, x * q),    s the gate of `ChannelSE`, q that of `SpatialSE`

    Shapes: x [N, C, H, W], y as x; the layers are those of the two halves, in `channel` and `spatial`.

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor, act: of the channel half, see `ChannelSE`.
        bias: of all three layers.
        combine: "sum" (https://arxiv.org/abs/1803.02579) or "max" (https://arxiv.org/abs/1808.08127 and the authors' code).
        gate: f of both halves: sigmoid, hard_sigmoid, relu, none.
        residual, activation: see `Block`.

    Roy et al., Concurrent Spatial and Channel Squeeze & Excitation, https://arxiv.org/abs/1803.02579
    """

    layers = ("channel.fc1", "channel.fc2", "spatial.conv")
    halves: ClassVar[Mapping[str, type[Block]]] = {"channel": ChannelSE, "spatial": SpatialSE}

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 2,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        combine: str = "sum",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.combine = one_of("combine", combine, ("sum", "max"))
        self.channel = ChannelSE(channels, rd_ratio, rd_channels, rd_divisor, bias, act, gate, **like)
        self.spatial = SpatialSE(channels, bias, gate, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        return bottleneck_options(layers["channel.fc1"], layers["channel.fc2"])

    def settings(self) -> dict[str, Any]:
        return {
            "hidden": self.channel.act,
            "gate": self.channel.gate,
            "combine": self.combine,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, fc1: Any, fc2: Any, conv: Any, **settings: Any) -> Tensor:
        return ops.scse(x, *weights(fc1), *weights(fc2), *weights(conv), **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.halves_called():
            channel, spatial = self.channel(x), self.spatial(x)
            return self.finished(channel + spatial if self.combine == "sum" else torch.maximum(channel, spatial), residual)
        s, q = self.channel.gate_weights(x), self.spatial.gate_weights(x)
        if self.combine == "sum":
            return ops.gate(x, s + q, residual=residual, activation=self.activation)
        # max(x s, x q) = x max(s, q) where x is positive, x min(s, q) where it is negative; at zero both sides share the gradient
        larger = torch.where(x > 0, torch.maximum(s, q), torch.where(x < 0, torch.minimum(s, q), (s + q) / 2))
        return ops.gate(x, larger, residual=residual, activation=self.activation)
