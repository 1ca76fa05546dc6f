"""Selective kernels: a convolution of several kernel sizes, and the attention that weighs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..ops import select
from ._base import Block, odd, one_of, pointwise, positive, reduced, sublayer, weights


class SelectiveKernelAttention(Block):
    """The attention of selective kernels: a softmax over K maps for every channel, from the mean of their sum.

        y = sum_k a_k * b(x_k),    a = softmax over k of (W2_k h(norm(W1 z + b1)) + b2_k),    z_c = mean over all positions of sum_k b(x_k)

    Shapes: x a sequence of K maps [N, C, *spatial] with one to three spatial dimensions, y as one of them; fc_reduce.weight [R, C, 1, 1],
    fc_select.weight [K C, R, 1, 1], or with `separate` K layers fc_select.k.weight [C, R, 1, 1].

    Args:
        channels: C.
        num_paths: K, at least two.
        rd_ratio, rd_channels, rd_divisor, rd_min: R is `rd_channels`, or channels * rd_ratio rounded to a multiple of `rd_divisor` (rounded down
            without one), and not below `rd_min`. The authors': at least 32; timm's SelectiveKernel: rd_divisor=8, rd_min=1.
        norm: whether a BatchNorm2d(R) follows the first layer.
        bias, select_bias: of the first layer and of the second.
        separate: K second layers instead of one.
        act: h: relu (default), none, relu6, leaky_relu, silu, hardswish, gelu.
        gate: softmax, or sigmoid, hard_sigmoid, relu, none of each weight.
        path_act: b, an activation of the maps; as those of `act`.
        activation: see `Block`.

    Li et al., Selective Kernel Networks, https://arxiv.org/abs/1903.06586. The result has the layout of the maps; timm's and
    External-Attention-pytorch's, which stack them, is channels first.
    """

    layers: tuple[str, ...]  # type: ignore[misc]  # an instance's, as many as it has
    called = frozenset({"bn"})

    def __init__(
        self,
        channels: int,
        num_paths: int = 2,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        rd_min: int = 32,
        norm: bool = True,
        bias: bool = False,
        select_bias: bool = False,
        separate: bool = False,
        act: str = "relu",
        gate: str = "softmax",
        path_act: str = "none",
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(False, activation)
        like = {"device": device, "dtype": dtype}
        width = reduced(positive("channels", channels), rd_ratio, rd_channels, rd_divisor)
        if rd_channels is None:
            width = max(width, positive("rd_min", rd_min))
        if positive("num_paths", num_paths) < 2:
            raise ValueError(f"num_paths: got {num_paths}, expected at least 2")
        self.act = one_of("act", act, reference.HIDDEN)
        self.gate = one_of("gate", gate, select.GATES)
        self.path_act = one_of("path_act", path_act, reference.HIDDEN)
        self.fc_reduce = pointwise(channels, width, bias, like)
        self.bn = nn.BatchNorm2d(width, **like) if norm else None
        self.fc_select: nn.Module
        if separate:
            self.fc_select = nn.ModuleList(pointwise(width, channels, select_bias, like) for _ in range(num_paths))
        else:
            self.fc_select = pointwise(width, num_paths * channels, select_bias, like)
        last = [f"fc_select.{k}" for k in range(num_paths)] if separate else ["fc_select"]
        self.layers = ("fc_reduce", "bn", *last)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        fc_reduce, last = layers["fc_reduce"], [layer for path, layer in layers.items() if path.startswith("fc_select")]
        width, channels = fc_reduce.weight.shape[:2]
        return {
            "channels": channels,
            "num_paths": sum(layer.weight.shape[0] for layer in last) // channels,
            "rd_channels": width,
            "norm": layers.get("bn") is not None,
            "bias": fc_reduce.bias is not None,
            "select_bias": last[0].bias is not None,
            "separate": len(last) > 1,
        }

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.act, "gate": self.gate, "before": self.path_act, "activation": self.activation}

    @staticmethod
    def fused(x: Any, fc_reduce: Any, bn: Any, *fc_select: Any, **settings: Any) -> Tensor:
        w2, b2 = weights(fc_select[0])
        if len(fc_select) > 1:
            w2s, b2s = zip(*map(weights, fc_select), strict=True)
            w2, b2 = torch.cat([w.flatten(1) for w in w2s]), None if b2 is None else torch.cat(b2s)
        return ops.sk(x, *weights(fc_reduce), w2, b2, norm=bn, **settings)

    def composed(self, x: Any, residual: Tensor | None) -> Tensor:
        select.check_maps(x)
        last = [sublayer(self, path) for path in self.layers[2:]]

        def excite(z: Tensor) -> Tensor:
            h = self.fc_reduce(z.to(x[0].dtype)[:, :, None, None])
            h = reference.HIDDEN[self.act](h if self.bn is None else self.bn(h))
            return torch.cat([layer(h) for layer in last if layer is not None], 1).flatten(1)

        return select.select_maps(x, excite, residual, self.gate, self.path_act, self.activation)


class SelectiveKernel(Block):
    """The selective kernel convolution: branches with kernels of several sizes on one map, and `SelectiveKernelAttention` among them.

        y = sum_k a_k * b(bn_k(conv_k(x)))

    Shapes: x [N, C, H, W], y [N, C', H', W']; paths.k.conv, paths.k.bn the branches, attn.* the layers of the attention.

    Args:
        channels: C. out_channels: C', by default C.
        kernel_size: of the branches, each odd; one number for two alike.
        keep_3x3: kernels larger than 3 as dilated 3x3 (the authors' code and timm).
        split_input: each branch gets an equal share of the input channels (timm's default) instead of all of them.
        stride, dilation, groups, path_bias: of the convolutions; groups at most C'.
        norm, bias, select_bias, separate, rd_ratio, rd_channels, rd_divisor, rd_min, act, gate: of the attention.
        path_act: b, relu by default.
        residual, activation: see `Block`; residual where y has the shape of x.

    The defaults are the authors', but for their 32 groups. timm's SelectiveKernel is rd_divisor=8, rd_min=1, split_input=True;
    External-Attention-pytorch's SKAttention is kernel_size=(1, 3, 5, 7), keep_3x3=False, norm=False, act="none", path_bias, bias and select_bias
    True, separate=True.

    Li et al., Selective Kernel Networks, https://arxiv.org/abs/1903.06586
    """

    layers: tuple[str, ...]  # type: ignore[misc]
    called = frozenset({"attn.bn"})
    halves: ClassVar[Mapping[str, type[Block]]] = {"attn": SelectiveKernelAttention}
    fused = staticmethod(SelectiveKernelAttention.fused)

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: Sequence[int] | int = (3, 5),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int | None = None,
        rd_min: int = 32,
        keep_3x3: bool = True,
        split_input: bool = False,
        path_bias: bool = False,
        norm: bool = True,
        bias: bool = False,
        select_bias: bool = False,
        separate: bool = False,
        act: str = "relu",
        gate: str = "softmax",
        path_act: str = "relu",
        residual: bool = False,
        activation: str = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(residual, activation)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = tuple(odd("kernel_size", size) for size in ((kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size))
        width = positive("channels", channels)
        if split_input and channels % len(sizes):
            raise ValueError(f"channels: got {channels}, expected a multiple of the {len(sizes)} branches of split_input")
        out = width if out_channels is None else positive("out_channels", out_channels)
        share = width // len(sizes) if split_input else width
        groups = min(positive("groups", groups), out)
        if share % groups or out % groups:
            raise ValueError(f"groups: got {groups}, expected a divisor of {share} channels of each branch and of {out} out of it")
        self.split_input = split_input
        self.paths = nn.ModuleList()
        for size in sizes:
            spread = dilation * (size - 1) // 2 if keep_3x3 and size > 3 else dilation
            side = min(size, 3) if keep_3x3 else size
            conv = nn.Conv2d(
                share, out, side, stride, (stride - 1 + spread * (side - 1)) // 2, spread, groups, path_bias, **like
            )  # fmt: skip
            path = nn.Sequential()
            path.add_module("conv", conv)
            path.add_module("bn", nn.BatchNorm2d(out, **like))
            self.paths.append(path)
        self.attn = SelectiveKernelAttention(
            out, len(sizes), rd_ratio, rd_channels, rd_divisor, rd_min, norm, bias, select_bias, separate, act, gate, path_act, activation, **like
        )  # fmt: skip
        self.layers = tuple(f"attn.{path}" for path in self.attn.layers)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        attn = {path.removeprefix("attn."): layer for path, layer in layers.items() if path.startswith("attn.")}
        options = SelectiveKernelAttention.options_of(attn)
        count = options.pop("num_paths")
        convs = [layers[f"paths.{k}.conv"] for k in range(count) if f"paths.{k}.conv" in layers]
        if convs:
            options["kernel_size"] = tuple(conv.kernel_size[0] for conv in convs)
            options.update(keep_3x3=False, groups=convs[0].groups, path_bias=convs[0].bias is not None)
        else:  # the branches are not ours to build
            options["kernel_size"] = (1,) * count
        return options

    def settings(self) -> dict[str, Any]:
        return {**self.attn.settings(), "activation": self.activation}

    def branches(self, x: Tensor) -> list[Tensor]:
        """The maps to select among, before their activation."""
        parts = x.chunk(len(self.paths), 1) if self.split_input else [x] * len(self.paths)
        return [path(part) for path, part in zip(self.paths, parts, strict=True)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        if residual is None and self.residual:
            residual = x
        return super().forward(self.branches(x), residual)  # type: ignore[arg-type]

    def composed(self, x: Any, residual: Tensor | None) -> Tensor:
        return self.attn(x, residual)
