"""ResNeSt's split attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import ops, reference
from ..ops import select
from ._base import Block, one_of, positive, reduced, weights


class SplitAttention(Block):
    """The split attention convolution: a grouped convolution to `radix` slices, and a softmax over the slices for every channel.

        u = b(bn0(conv(x))),    y = sum_r a_r * u_r,    a = softmax over r of fc2(h(bn1(fc1(z)))),    z_c = mean over all positions of sum_r u_r

    With radix 1 the weights are a sigmoid's. Shapes: x [N, C, H, W], y [N, C', H', W'], u [N, radix C', H', W'] radix-major;
    conv.weight [radix C', C / (radix groups), k, k], fc1.weight [R, C' / groups, 1, 1], fc2.weight [radix C', R / groups, 1, 1].

    Args:
        channels: C. out_channels: C', by default C.
        kernel_size, stride, padding, dilation, bias: of the convolution; padding by default kernel_size // 2.
        groups: the cardinality.
        radix: number of slices.
        rd_ratio, rd_channels, rd_divisor, rd_min: R is `rd_channels`, or C radix rd_ratio rounded to a multiple of `rd_divisor` (rounded down
            without one), and not below `rd_min`.
        norm: whether there are BatchNorms, bn0 and bn1. In evaluation bn0 is part of the attention's passes, as long as its parameters need no
            gradient.
        act: h, and path_act: b: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu. b is part of the attention's passes.
        residual, activation: see `Block`; residual where y has the shape of x.

    Zhang et al., ResNeSt, https://arxiv.org/abs/2004.08955. Names and numbers are those of the authors' SplAtConv2d and of timm's SplitAttn (both
    without norm by default, timm with rd_divisor=8); the result has the layout of conv(x), where theirs is channels first.
    """

    layers = ("bn0", "fc1", "bn1", "fc2")
    called = frozenset({"bn0", "bn1"})

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        radix: int = 2,
        rd_ratio: float = 0.25,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        rd_min: int = 32,
        norm: bool = True,
        act: str = "relu",
        path_act: str = "relu",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.radix, self.cardinality = positive("radix", radix), positive("groups", groups)
        out = positive("channels", channels) if out_channels is None else positive("out_channels", out_channels)
        width = reduced(channels * radix, rd_ratio, rd_channels, rd_divisor)
        if rd_channels is None:
            width = max(width, positive("rd_min", rd_min))
        for name, value, parts in (("channels", channels, groups * radix), ("out_channels", out, groups), ("rd_channels", width, groups)):
            if value % parts:
                raise ValueError(f"groups: got {groups}, and {name} of {value}, expected a multiple of {parts}")
        self.act = one_of("act", act, reference.HIDDEN)
        self.path_act = one_of("path_act", path_act, reference.HIDDEN)
        side = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(channels, out * radix, kernel_size, stride, side, dilation, groups * radix, bias, **like)
        self.bn0 = nn.BatchNorm2d(out * radix, **like) if norm else None
        self.fc1 = nn.Conv2d(out, width, 1, groups=groups, **like)
        self.bn1 = nn.BatchNorm2d(width, **like) if norm else None
        self.fc2 = nn.Conv2d(width, out * radix, 1, groups=groups, **like)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        fc1, fc2 = layers["fc1"], layers["fc2"]
        out, groups = fc1.in_channels, fc1.groups
        radix = fc2.weight.shape[0] // out
        # the convolution is not ours to build, and takes any multiple of its groups
        return {
            "channels": radix * groups, "out_channels": out, "groups": groups, "radix": radix, "rd_channels": fc1.weight.shape[0],
            "norm": layers.get("bn1") is not None,
        }  # fmt: skip

    def settings(self) -> dict[str, Any]:
        return {
            "radix": self.radix,
            "cardinality": self.cardinality,
            "hidden": self.act,
            "before": self.path_act,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, bn0: Any, fc1: Any, bn1: Any, fc2: Any, **settings: Any) -> Tensor:
        return ops.splat(x, *weights(fc1), *weights(fc2), norm=bn1, before_norm=bn0, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        select.check_slices(x, self.radix, self.cardinality)

        def excite(z: Tensor) -> Tensor:
            h = self.fc1(z.to(x.dtype)[:, :, None, None])
            return self.fc2(reference.HIDDEN[self.act](h if self.bn1 is None else self.bn1(h))).flatten(1)

        return select.select_slices(
            x, excite, residual, self.radix, self.cardinality, None, self.path_act, self.bn0, self.activation
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and self.residual:
            residual = x
        return super().forward(self.conv(x), residual)
