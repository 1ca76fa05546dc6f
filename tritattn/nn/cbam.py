"""The convolutional block attention module and its two halves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import ops, reference
from ..ops.channel import pool_names
from ._base import Block, ChannelGate, bottleneck, bottleneck_options, odd, one_of, pointwise, positive, reduced, weights

ORDERS = {"mean_max": ("mean", "max"), "max_mean": ("max", "mean"), "mix": ("mix",)}


class ChannelAttention(ChannelGate):
    """The channel half of CBAM: a gate per channel from several statistics through one shared bottleneck.

        y = x * f(sum_p (W2 h(W1 p(x) + b1) + b2)),    p over `pools`

    Shapes: x [N, C, *spatial] with one to three spatial dimensions, y as x, or the gate [N, C, 1, ...] with `apply=False`;
    fc1.weight [R, C, 1, 1], fc2.weight [C, R, 1, 1], or fc2.weight [C, C, 1, 1] alone without a bottleneck.

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`; with
            `rd_divisor=None` rounded down.
        bottleneck: False for one layer of full width and no h.
        pools: any of avg, max, lp (the root of the sum of squares), lse (log of the sum of exponentials), avg_max (half sum).
        bias: of the layers.
        act: h, between the layers: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        max_grad: gradient of the maximum: "first" (to one index, as max pooling) or "even" (shared among ties, as amax).
        apply: False to return the gate instead of the gated map.
        residual, activation: see `Block`; what may come before: see `ChannelGate`.

    Woo et al., CBAM, https://arxiv.org/abs/1807.06521
    """

    layers = ("fc1", "fc2")
    fc1: nn.Conv2d | None

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bottleneck: bool = True,
        pools: Sequence[str] = ("avg", "max"),
        bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        max_grad: str = "first",
        apply: bool = True,
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor) if bottleneck else channels
        pool_names(pools)  # checks them
        self.pools = tuple(pools)
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.max_grad = one_of("max_grad", max_grad, ("first", "even"))
        self.apply_gate = applied(apply, residual, activation)
        self.fc1 = pointwise(channels, width, bias, like) if bottleneck else None
        self.fc2 = pointwise(width, channels, bias, like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        fc1, fc2 = layers.get("fc1"), layers["fc2"]
        if fc1 is None:
            return {"channels": fc2.weight.shape[0], "bottleneck": False, "bias": fc2.bias is not None}
        return bottleneck_options(fc1, fc2)

    def settings(self) -> dict[str, Any]:
        return {
            "pools": self.pools,
            "hidden": self.act,
            "gate": self.gate,
            "max_grad": self.max_grad,
            "apply": self.apply_gate,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, fc1: Any, fc2: Any, **settings: Any) -> Tensor:
        return ops.channel_attention(x, *weights(fc1), *weights(fc2), **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        z = ops.channel_statistics(x, self.pools, max_grad=self.max_grad)
        return reference.GATES[self.gate](bottleneck(z, x, self.fc1, self.fc2, self.act))

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return super().composed(x, residual) if self.apply_gate else self.gate_weights(x)


class SpatialAttention(Block):
    """The spatial half of CBAM: a gate per position from mean and maximum over the channels.

        y = x * f(norm(conv([max_c x, mean_c x])))

    Shapes: x [N, C, H, W], y as x, or the gate [N, 1, H, W] with `apply=False`; conv.weight [1, 2, k, k], [1, 1, k, k] for "mix".

    Args:
        channels: C; unused, first in every block's arguments so that all are built alike.
        kernel_size: k, odd.
        order: of the two inputs of the convolution: "max_mean" (the authors' code), "mean_max", or "mix" for their half sum.
        norm: whether a BatchNorm2d(1) follows the convolution (the authors' code) or nothing.
        momentum: of that BatchNorm.
        bias: whether the convolution has one.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        max_grad: gradient of the maximum: "first" (to one index, as max pooling) or "even" (shared among ties, as amax).
        apply: False to return the gate instead of the gated map.
        residual, activation: see `Block`.

    Woo et al., CBAM, https://arxiv.org/abs/1807.06521
    """

    layers = ("conv", "bn")
    bn: nn.BatchNorm2d | None

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 7,
        order: str = "max_mean",
        norm: bool = True,
        momentum: float | None = 0.01,
        bias: bool = False,
        gate: str = "sigmoid",
        max_grad: str = "first",
        apply: bool = True,
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.order = one_of("order", order, ORDERS)
        self.gate = one_of("gate", gate, reference.GATES)
        self.max_grad = one_of("max_grad", max_grad, ("first", "even"))
        self.apply_gate = applied(apply, residual, activation)
        side = odd("kernel_size", kernel_size) // 2
        self.conv = nn.Conv2d(len(ORDERS[order]), 1, kernel_size, padding=side, bias=bias, **like)
        self.bn = nn.BatchNorm2d(1, momentum=momentum, **like) if norm else None

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        conv, bn = layers["conv"], layers.get("bn")
        options = {"kernel_size": conv.weight.shape[-1], "bias": conv.bias is not None, "norm": bn is not None}
        return options if bn is None else {**options, "momentum": bn.momentum}

    def initialise(self) -> None:
        """A gate of a half everywhere: BatchNorm's weight at zero."""
        if self.bn is not None and self.bn.weight is not None:
            nn.init.zeros_(self.bn.weight)

    def settings(self) -> dict[str, Any]:
        return {
            "order": self.order,
            "gate": self.gate,
            "max_grad": self.max_grad,
            "apply": self.apply_gate,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, conv: Any, bn: Any, **settings: Any) -> Tensor:
        return ops.spatial_attention(x, *weights(conv), norm=bn, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        logits = self.conv(ops.spatial_statistics(x, ORDERS[self.order], max_grad=self.max_grad).to(x.dtype))
        return reference.GATES[self.gate](logits if self.bn is None else self.bn(logits))

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return super().composed(x, residual) if self.apply_gate else self.gate_weights(x)


class CBAM(Block):
    """Convolutional block attention module: the channel gate, then the spatial gate of the gated map.

        m = x * s(x),  y = m * q(m),    s the gate of `ChannelAttention`, q that of `SpatialAttention`

    Shapes: x [N, C, H, W], y as x; the layers are those of the two halves, in `channel` and `spatial`.

    Args:
        channels: C.
        rd_ratio, rd_channels, rd_divisor, bottleneck, pools, act, gate: of the channel half, see `ChannelAttention`.
        mlp_bias: `bias` of the channel half.
        kernel_size, order, norm, momentum: of the spatial half, see `SpatialAttention`.
        spatial_bias, spatial_gate: `bias` and `gate` of the spatial half.
        max_grad: gradient of all maxima: "first" (to one index, as max pooling) or "even" (shared among ties, as amax).
        residual, activation: see `Block`.

    The defaults are those of the authors' code: a bottleneck of C // 16 with biases, [max, mean], a 7x7 convolution without bias, and a
    BatchNorm of momentum 0.01.

    Woo et al., CBAM, https://arxiv.org/abs/1807.06521
    """

    layers = ("channel.fc1", "channel.fc2", "spatial.conv", "spatial.bn")
    halves: ClassVar[Mapping[str, type[Block]]] = {"channel": ChannelAttention, "spatial": SpatialAttention}

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        bottleneck: bool = True,
        pools: Sequence[str] = ("avg", "max"),
        mlp_bias: bool = True,
        act: str = "relu",
        gate: str = "sigmoid",
        kernel_size: int = 7,
        order: str = "max_mean",
        norm: bool = True,
        momentum: float | None = 0.01,
        spatial_bias: bool = False,
        spatial_gate: str = "sigmoid",
        max_grad: str = "first",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        one_of("spatial_gate", spatial_gate, reference.GATES)
        like: dict[str, Any] = {"max_grad": max_grad, "device": device, "dtype": dtype}
        self.channel = ChannelAttention(
            channels, rd_ratio, rd_channels, rd_divisor, bottleneck, pools, mlp_bias, act, gate, **like
        )
        self.spatial = SpatialAttention(
            channels, kernel_size, order, norm, momentum, spatial_bias, spatial_gate, **like
        )

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        channel = ChannelAttention.options_of({path.removeprefix("channel."): layer for path, layer in layers.items()})
        spatial = SpatialAttention.options_of({path.removeprefix("spatial."): layer for path, layer in layers.items()})
        return {"mlp_bias": channel.pop("bias"), "spatial_bias": spatial.pop("bias"), **channel, **spatial}

    def initialise(self) -> None:
        self.spatial.initialise()

    def settings(self) -> dict[str, Any]:
        return {
            "pools": self.channel.pools,
            "hidden": self.channel.act,
            "gate": self.channel.gate,
            "spatial_gate": self.spatial.gate,
            "order": self.spatial.order,
            "max_grad": self.channel.max_grad,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, fc1: Any, fc2: Any, conv: Any, bn: Any, **settings: Any) -> Tensor:
        return ops.cbam(x, *weights(fc1), *weights(fc2), *weights(conv), norm=bn, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        gated = self.channel(x)
        if self.halves_called():
            return self.finished(self.spatial(gated), residual)
        return ops.gate(gated, self.spatial.gate_weights(gated), residual=residual, activation=self.activation)


def applied(apply: bool, residual: bool, activation: str) -> bool:
    """Checks that a block which returns its gate is not asked to do anything with the map."""
    if not apply and (residual or activation != "none"):
        raise ValueError("apply: got False with a residual or an activation, which only a gated map can have")
    return apply
