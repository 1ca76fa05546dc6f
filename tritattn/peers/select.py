"""Blocks of `tritattn.nn.SelectiveKernel` and `SplitAttention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .entry import EA, HIDDEN, NoFit, Peer


def _timm_paths(block: Any, x: Tensor) -> tuple[list[Tensor], None]:
    parts = x.split(x.shape[1] // block.num_paths, 1) if block.split_input else [x] * block.num_paths
    return [path(part) for path, part in zip(block.paths, parts, strict=True)], None


def _external_paths(block: Any, x: Tensor) -> tuple[list[Tensor], None]:
    return [conv(x) for conv in block.convs], None


def _external_layers(count: int) -> dict[str, str]:
    paths = {f"paths.{k}.{layer}": f"convs.{k}.{layer}" for k in range(count) for layer in ("conv", "bn")}
    return {"attn.fc_reduce": "fc", **{f"attn.fc_select.{k}": f"fcs.{k}" for k in range(count)}, **paths}


def _convolution(block: Any, x: Tensor) -> tuple[Tensor, None]:
    return block.conv(x), None


def _slices(act: str) -> Callable[[Any], dict[str, Any]]:
    """Reads the activation of the slices, which is the attribute of that name."""

    def read(block: Any) -> dict[str, Any]:
        name = type(getattr(block, act)).__name__
        if name not in HIDDEN:
            raise NoFit(f"{act} is of an unknown type, {name}")
        return {"path_act": HIDDEN[name]}

    return read


def _stacked(block: Any) -> dict[str, Any]:
    raise NoFit("it takes its maps stacked, which costs the passes that a fused one saves; SelectiveKernel, which holds it, is converted whole")


_NORMS = {"bn0": "bn0", "bn1": "bn1"}
_LAYERS = {"fc1": "fc1", "fc2": "fc2"}
PEERS: tuple[Peer, ...] = (
    Peer(
        "timm",
        ("SelectiveKernel",),
        "SelectiveKernel",
        {"attn.fc_reduce": "attn.fc_reduce", "attn.bn": "attn.bn", "attn.fc_select": "attn.fc_select"},
        {"path_act": "none"},
        hidden="attn.act",
        inner=("SelectiveKernelAttn",),
        before=_timm_paths,
        called=("paths.0", "paths"),
    ),
    Peer(
        "timm",
        ("SelectiveKernelAttn",),
        "SelectiveKernelAttention",
        {"fc_reduce": "fc_reduce", "bn": "bn", "fc_select": "fc_select"},
        read=_stacked,
    ),
    *(
        Peer(
            EA,
            ("SKAttention",),
            "SelectiveKernel",
            _external_layers(count),
            {"act": "none", "path_act": "none"},
            inner=("Softmax",),
            before=_external_paths,
            called=("convs.0.conv", "convs"),
        )
        for count in range(2, 9)
    ),
    *(
        Peer(source, ("SplitAttn",), "SplitAttention", {**_LAYERS, **norms}, read=_slices("act0"), hidden="act1", inner=("RadixSoftmax",),
             before=_convolution, called=("conv",))
        for source, norms in (("timm", _NORMS), ("timm, without norm_layer", {}))
    ),
    *(
        Peer(source, ("SplAtConv2d",), "SplitAttention", {**_LAYERS, **norms}, read=_slices("relu"), hidden="relu", inner=("rSoftMax",),
             before=_convolution, called=("conv",))
        for source, norms in (("zhanghang1989/ResNeSt", _NORMS), ("zhanghang1989/ResNeSt, without norm_layer", {}))
    ),
)  # fmt: skip
