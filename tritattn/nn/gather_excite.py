"""Gather-excite."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ._base import Block, bottleneck_options, given, one_of, pointwise, positive, reduced, weights


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return reference.HIDDEN[self.name](x)

    def extra_repr(self) -> str:
        return self.name


class GatherExcite(Block):
    """Gather-excite: a gate per channel and neighbourhood, from the neighbourhood's mean or from strided depthwise convolutions.

        y = x * f(nearest(MLP(gather(x))))

    with gather(x) [N, C, H / extent, W / extent], rounded up, or [N, C, 1, 1] for extent 0, and nearest spreading it over the map again.

    Shapes: x [N, C, H, W], y as x; mlp.fc1.weight [R, C, 1, 1], mlp.fc2.weight [C, R, 1, 1]; gather.conv{i}.weight [C, 1, 3, 3], or
    gather.conv1.weight [C, 1, *feat_size] for extent 0, each followed by gather.norm{i}.

    Args:
        channels: C; may be None where the block has no parameters.
        feat_size: (H, W) of the maps, for extent 0 with extra_params. padded: whether its convolution pads the map as timm's does; gather(x) then has
            about as many positions as the map, each from another part of it.
        extra_params: whether gather is log2(extent) depthwise 3x3 convolutions of stride 2 with BatchNorm, `act` between them (GE-theta), for
            extent 0 one convolution over the whole map; otherwise the mean over |h - extent i| < extent, |w - extent j| < extent (GE-theta-).
        extent: 0 for the whole map, or a power of two.
        use_mlp: whether an MLP stands between gather and gate (GE-theta+); without extra_params and extent the block is then squeeze-and-excitation.
        rd_ratio, rd_channels, rd_divisor: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor`.
        norm: whether BatchNorms follow the convolutions.
        pool: "avg", or "avg_max" for the half sum of mean and maximum, timm's add_maxpool; for extent 0 without extra_params alone.
        act: h, in the MLP and between convolutions: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: f: sigmoid, hard_sigmoid, relu, none.
        max_grad: gradient of the maximum: "first" (to one index, as max pooling) or "even" (shared among ties, as amax).
        residual, activation: see `Block`.

    The arguments are those of timm's GatherExcite and so are the names of the parameters. timm's raises TypeError where it is built with
    use_mlp (its default) or extra_params; and its convolution over the whole map is padded, so that it does not gather to one position, as ours does.

    Hu et al., Gather-Excite, https://arxiv.org/abs/1810.12348
    """

    layers = ("gather", "mlp.fc1", "mlp.fc2")
    called = frozenset({"gather"})
    gather: nn.Sequential | None
    mlp: nn.ModuleDict | None

    def __init__(
        self,
        channels: int | None = None,
        feat_size: tuple[int, int] | None = None,
        extra_params: bool = False,
        extent: int = 0,
        use_mlp: bool = True,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = 1,
        norm: bool = True,
        padded: bool = False,
        pool: str = "avg",
        act: str = "relu",
        gate: str = "sigmoid",
        max_grad: str = "first",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        if extent != 0 and (extent < 2 or extent & (extent - 1)):
            raise ValueError(f"extent: got {extent}, expected 0 or a power of two from 2 on")
        if padded and (extent or not extra_params):
            raise ValueError("padded: got True, expected False without the convolution over the whole map of extra_params and extent 0")
        self.extent = extent
        self.padded = padded
        self.pool = one_of("pool", pool, ("avg",) if extent or extra_params else ("avg", "avg_max"))
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, reference.GATES)
        self.max_grad = one_of("max_grad", max_grad, ("first", "even"))
        c = positive("channels", given("channels", channels)) if use_mlp or extra_params else 0
        self.gather = None
        if extra_params:
            kernel = (3, 3) if extent else tuple(given("feat_size", feat_size))
            self.gather = self._convolutions(c, kernel, norm, padded, like)
        self.mlp = None
        if use_mlp:
            width = reduced(c, rd_ratio, rd_channels, rd_divisor)
            self.mlp = nn.ModuleDict({"fc1": pointwise(c, width, True, like), "fc2": pointwise(width, c, True, like)})

    def _convolutions(self, c: int, kernel: tuple[int, ...], norm: bool, padded: bool, like: Mapping[str, Any]) -> nn.Sequential:
        strides, padding = (2, (1, 1)) if self.extent else (1, tuple((size - 1) // 2 * padded for size in kernel))
        count = max(1, self.extent.bit_length() - 1)
        layers: dict[str, nn.Module] = {}
        for i in range(1, count + 1):
            layers[f"conv{i}"] = nn.Conv2d(c, c, kernel, strides, padding, groups=c, bias=False, **like)  # type: ignore[arg-type]
            if norm:
                layers[f"norm{i}"] = nn.BatchNorm2d(c, **like)
            if i < count:
                layers[f"act{i}"] = _Activation(self.act)
        return nn.Sequential(OrderedDict(layers))

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        gather, fc1 = layers.get("gather"), layers.get("mlp.fc1")
        options: dict[str, Any] = {"use_mlp": fc1 is not None, "extra_params": gather is not None}
        if gather is not None:
            weight = gather.conv1.weight
            options |= {"channels": weight.shape[0], "feat_size": tuple(weight.shape[2:]), "norm": hasattr(gather, "norm1")}
            options["padded"] = gather.conv1.stride == (1, 1) and any(gather.conv1.padding)
        if fc1 is not None:
            found = bottleneck_options(fc1, layers["mlp.fc2"])
            options |= {name: found[name] for name in ("channels", "rd_channels")}
        return options

    def settings(self) -> dict[str, Any]:
        return {
            "extent": None if self.padded else self.extent,
            "pool": self.pool,
            "hidden": self.act,
            "gate": self.gate,
            "max_grad": self.max_grad,
            "activation": self.activation,
        }

    @staticmethod
    def fused(x: Tensor, gather: Any, fc1: Any, fc2: Any, **settings: Any) -> Tensor:
        return ops.ge(x, *weights(fc1), *weights(fc2), gather=gather, **settings)

    def gate_weights(self, x: Tensor) -> Tensor:
        if self.gather is not None:
            z = self.gather(x)
        elif self.extent:
            z = F.avg_pool2d(x, 2 * self.extent - 1, self.extent, self.extent - 1, count_include_pad=False)
        else:
            z = ops.channel_statistics(x, (self.pool,), max_grad=self.max_grad).to(x.dtype)[:, 0, :, None, None]
        if self.mlp is not None:
            z = self.mlp["fc2"](reference.HIDDEN[self.act](self.mlp["fc1"](z)))
        small = reference.GATES[self.gate](z)
        return small if z.shape[2:] == (1, 1) else reference.nearest(small, x)
