"""Residual blocks that end in attention, the sum with their shortcut and an activation, which attention's gating pass can do as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum: autocast can leave them apart."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


@dataclass(frozen=True)
class Branch:
    """(block, x) -> (what attention takes, residual): a residual block up to its attention. Plain data, so that it is copied and pickled."""

    steps: tuple[str, ...]  # names of the modules, in the order of their calls
    shortcut: str = "downsample"  # name of the module on the other way
    identity: bool = True  # whether the input itself is added where there is no such module, or nothing
    in_place: bool = True  # whether the sum overwrites what attention returns, and so has its dtype

    def called(self, activation: str) -> tuple[str, ...]:
        """Names of the modules that it calls, without the activation that ends the block, which can be among the steps too."""
        return tuple(name for name in dict.fromkeys((*self.steps, self.shortcut)) if name != activation)

    def __call__(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = x
        for step in self.steps:
            out = getattr(block, step)(out)
        shortcut = getattr(block, self.shortcut)
        if shortcut is None and not self.identity:
            return out, None
        residual = x if shortcut is None else shortcut(x)
        return (out, residual.to(out.dtype)) if self.in_place else promoted(out, residual)


@dataclass(frozen=True)
class Residual:
    """One residual block of one package."""

    source: str
    classes: tuple[str, ...]  # names under which it is found
    branch: Branch
    attention: str  # name of what is called after the branch; its result is added to the residual
    activation: str  # name of what is called last

    def __str__(self) -> str:
        return f"{self.source} {self.classes[0]}"

    def fits(self, block: Any) -> bool:
        """Whether the block has all these modules, but for attention."""
        layers = (getattr(block, name, None) for name in (*self.branch.steps, self.activation))
        return hasattr(block, self.branch.shortcut) and all(isinstance(layer, nn.Module) for layer in layers)


BASIC = ("conv1", "bn1", "relu", "conv2", "bn2")
BOTTLENECK = (*BASIC, "relu", "conv3", "bn3")


def _resnet(source: str, attention: str, basic: tuple[str, ...], bottleneck: tuple[str, ...]) -> tuple[Residual, ...]:
    """Made from torchvision's two blocks; `basic`, `bottleneck`: class names."""
    blocks = ((basic, BASIC), (bottleneck, BOTTLENECK))
    return tuple(Residual(source, classes, Branch(steps), attention, "relu") for classes, steps in blocks if classes)


def _byobnet(name: str, *steps: str) -> Residual:
    return Residual("timm (ByobNet)", (name,), Branch(steps, "shortcut", identity=False, in_place=False), "attn_last", "act")


_TIMM = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2")
_TIMM_BOTTLENECK = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3")
_SENET = ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")
RESIDUALS: tuple[Residual, ...] = (
    *_resnet("torchvision", "attention", ("BasicBlock",), ("Bottleneck",)),  # has none; where `tritattn.nn.attach` puts it
    Residual("timm", ("BasicBlock",), Branch(_TIMM), "se", "act2"),
    Residual("timm", ("Bottleneck",), Branch(_TIMM_BOTTLENECK), "se", "act3"),
    Residual("timm (SKNet)", ("SelectiveKernelBasic",), Branch(("conv1", "conv2")), "se", "act"),
    Residual("timm (SKNet)", ("SelectiveKernelBottleneck",), Branch(("conv1", "conv2", "conv3")), "se", "act"),
    Residual("timm (TResNet)", ("BasicBlock",), Branch(("conv1", "conv2"), in_place=False), "se", "act"),
    Residual("timm and segmentation_models_pytorch (SENet)", _SENET, Branch(BOTTLENECK, in_place=False), "se_module", "relu"),
    Residual("timm (SENet)", ("SEResNetBlock",), Branch((*BASIC, "relu"), in_place=False), "se_module", "relu"),
    _byobnet("BasicBlock", "conv1_kxk", "attn", "conv2_kxk"),
    _byobnet("BottleneckBlock", "conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1"),
    _byobnet("DarkBlock", "conv1_1x1", "attn", "conv2_kxk"),
    _byobnet("EdgeBlock", "conv1_kxk", "attn", "conv2_1x1"),
    Residual("MONAI", ("SEBlock", *_SENET), Branch(("conv1", "conv2", "conv3"), "project"), "se_layer", "act"),
    *_resnet("Jongchan/attention-module", "cbam", ("BasicBlock",), ("Bottleneck",)),
    *_resnet("landskape-ai/triplet-attention", "triplet_attention", ("BasicBlock",), ("Bottleneck",)),
    *_resnet("moskomule/senet.pytorch", "se", ("SEBasicBlock", "CifarSEBasicBlock"), ("SEBottleneck",)),
    *_resnet("BangguWu/ECANet", "eca", ("ECABasicBlock",), ("ECABottleneck",)),
    *_resnet("wofmanaf/SA-Net", "sa", (), ("SABottleneck",)),
)
