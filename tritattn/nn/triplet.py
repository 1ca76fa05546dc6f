"""Triplet attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from .. import ops
from ..ops.axis import AxisSpec, attend
from ._base import Block, one_of, weights
from .cbam import SpatialAttention

PLANES = ("cw", "hc", "hw")


class TripletAttention(Block):
    """Triplet attention: the mean of three gates, each that of `SpatialAttention` on the map turned so that another axis stands for the channels.

        y = x * (s_cw + s_hc + s_hw) / 3,    s = f(norm(conv([max, mean]))) over h on the plane [C, W], over w on [H, C], over c on [H, W]

    Shapes: x [N, C, H, W], y as x; the layers are those of three `SpatialAttention`, in `cw`, `hc` and `hw`.

    Args:
        channels: C; unused, first in every block's arguments so that all are built alike.
        kernel_size: of the convolutions, odd.
        spatial: False to leave out s_hw, and take the mean of two (the authors' no_spatial).
        order, norm, momentum, bias, gate, max_grad: of all three, see `SpatialAttention`; order "max_mean" or "mean_max".
        residual, activation: see `Block`.

    The defaults are those of the authors' code.

    Misra et al., Rotate to Attend: Convolutional Triplet Attention Module, https://arxiv.org/abs/2010.03045
    """

    layers = tuple(f"{plane}.{layer}" for plane in PLANES for layer in ("conv", "bn"))
    halves: ClassVar[Mapping[str, type[Block]]] = dict.fromkeys(PLANES, SpatialAttention)
    hc: SpatialAttention
    hw: SpatialAttention | None

    def __init__(
        self,
        channels: int | None = None,
        kernel_size: int = 7,
        spatial: bool = True,
        order: str = "max_mean",
        norm: bool = True,
        momentum: float | None = 0.01,
        bias: bool = False,
        gate: str = "sigmoid",
        max_grad: str = "first",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        one_of("order", order, ("max_mean", "mean_max"))
        like: dict[str, Any] = {"max_grad": max_grad, "device": device, "dtype": dtype}
        for plane in PLANES:
            kept = spatial or plane != "hw"
            setattr(self, plane, SpatialAttention(channels, kernel_size, order, norm, momentum, bias, gate, **like) if kept else None)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        one = {path.removeprefix("cw."): layer for path, layer in layers.items() if path.startswith("cw.")}
        return {**SpatialAttention.options_of(one), "spatial": layers.get("hw.conv") is not None}

    def initialise(self) -> None:
        if self.hw is not None:
            self.hw.initialise()

    def settings(self) -> dict[str, Any]:
        own: Any = self.cw
        return {"order": own.order, "gate": own.gate, "max_grad": own.max_grad, "activation": self.activation}

    @staticmethod
    def fused(x: Tensor, *layers: Any, **settings: Any) -> Tensor:
        given = {}
        for plane, conv, bn in zip(PLANES, layers[::2], layers[1::2], strict=True):
            given[f"{plane}_weight"], given[f"{plane}_bias"] = weights(conv)
            given[f"{plane}_norm"] = bn
        return ops.triplet(x, **given, **settings)

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        own: Any = self.cw
        if self.halves_called():
            gated = [own(x.transpose(1, 2)).transpose(1, 2), self.hc(x.transpose(1, 3)).transpose(1, 3)]
            gated += [] if self.hw is None else [self.hw(x)]
            return self.finished(sum(gated) / len(gated), residual)

        def logits(half: Any, stats: Tensor) -> Tensor:
            """stats: (mean, maximum) [N, 2, ...]."""
            t = half.conv((stats if half.order == "mean_max" else stats.flip(1)).to(x.dtype))
            return (t if half.bn is None else half.bn(t))[:, 0]

        def excite(rows: Tensor, columns: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            cw = logits(own, columns.transpose(2, 3)).transpose(1, 2)
            return logits(self.hc, rows), cw, None if self.hw is None else logits(self.hw, pixels)

        return attend(x, excite, residual, AxisSpec(own.gate, "mean", self.hw is not None, True, own.max_grad, self.activation))
