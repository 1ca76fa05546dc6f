"""Blocks around attention. Some end in it, the sum with their shortcut and an activation, which its gating pass can do as well; in inverted residuals
and the like it stands in the middle, after a convolution, a norm and an activation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn


def promoted(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum: autocast can leave them apart."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def through(block: Any, steps: Iterable[str], x: Tensor) -> Tensor:
    for step in steps:
        x = attrgetter(step)(block)(x)
    return x


@dataclass(frozen=True)
class Branch:
    """(block, x) -> (what attention takes, residual): a block up to its attention. Plain data, so that it is copied and pickled."""

    steps: tuple[str, ...]  # paths of the modules, in the order of their calls; with a question mark those that not every such block has
    shortcut: str | None = "downsample"  # name of the module on the other way; None where attention is not followed by a sum
    identity: bool = True  # whether the input itself is added where there is no such module, or nothing
    in_place: bool = True  # whether the sum overwrites what attention returns, and so has its dtype

    def called(self, activation: str | None) -> tuple[str, ...]:
        """Names of the modules that it calls, without the activation that ends the block, which can be among the steps too."""
        names = (step.removesuffix("?") for step in (*self.steps, self.shortcut or ""))
        return tuple(name for name in dict.fromkeys(names) if name not in ("", activation))

    def __call__(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out = through(block, self.steps, x)
        if self.shortcut is None:
            return out, None
        shortcut = getattr(block, self.shortcut)
        if shortcut is None and not self.identity:
            return out, None
        residual = x if shortcut is None else shortcut(x)
        return (out, residual.to(out.dtype)) if self.in_place else promoted(out, residual)


@dataclass(frozen=True)
class Tail:
    """(block, y, x) -> what a block of x returns whose attention, in its middle, returns y. Plain data as well."""

    steps: tuple[str, ...]
    skip: str | None = None  # name of the flag that says whether x is added, or of the module that makes of x what is added
    drop: str | None = None  # name of the stochastic depth before that sum
    activation: str | None = None  # name of what is called last

    def called(self) -> tuple[str, ...]:
        return tuple(name for name in (*self.steps, self.skip, self.drop, self.activation) if name is not None)

    def __call__(self, block: Any, y: Tensor, x: Tensor) -> Tensor:
        y = through(block, self.steps, y)
        skip, drop = (None if name is None else getattr(block, name) for name in (self.skip, self.drop))
        if skip is not None and skip is not False:
            y = self.added(y if drop is None else drop(y), x if skip is True else skip(x))
        return y if self.activation is None else getattr(block, self.activation)(y)

    def added(self, y: Tensor, shortcut: Tensor) -> Tensor:
        return y + shortcut


@dataclass(frozen=True)
class Residual:
    """One block of one package, which has attention at its end, or in its middle."""

    source: str
    classes: tuple[str, ...]  # names under which it is found
    branch: Branch
    attention: str  # name of what is called after the branch
    activation: str | None = None  # name of what is called on the sum of attention's result and the residual, at the end
    tail: Tail | None = None  # what follows attention in the middle

    def __str__(self) -> str:
        return f"{self.source} {self.classes[0]}"

    def fits(self, block: Any) -> bool:
        """Whether the block has all these modules, but for attention."""
        steps, others = [*self.branch.steps], [self.branch.shortcut]
        if self.activation is not None:
            steps.append(self.activation)
        if self.tail is not None:
            steps += self.tail.steps
            others.append(self.tail.skip)
        layers = (getattr(block, step, None) for step in steps if not step.endswith("?"))
        return all(name is None or hasattr(block, name) for name in others) and all(isinstance(layer, nn.Module) for layer in layers)

    def steps(self, block: Any) -> tuple[str, ...]:
        """Those of the branch that this block has."""
        return tuple(name for step in self.branch.steps if getattr(block, name := step.removesuffix("?"), None) is not None)

    def called(self) -> tuple[str, ...]:
        """Names of the modules that are called besides attention, without the activation at the end."""
        return (*self.branch.called(self.activation), *(self.tail.called() if self.tail is not None else ()))


BASIC = ("conv1", "bn1", "relu", "conv2", "bn2")
BOTTLENECK = (*BASIC, "relu", "conv3", "bn3")


def _resnet(source: str, attention: str, basic: tuple[str, ...], bottleneck: tuple[str, ...]) -> tuple[Residual, ...]:
    """Made from torchvision's two blocks; `basic`, `bottleneck`: class names."""
    blocks = ((basic, BASIC), (bottleneck, BOTTLENECK))
    return tuple(Residual(source, classes, Branch(steps), attention, "relu") for classes, steps in blocks if classes)


def _byobnet(name: str, *steps: str) -> tuple[Residual, Residual]:
    """Attention is at the end or in the middle, with a module that does nothing in the other place."""
    place = steps.index("attn")
    tail = Tail((*steps[place + 1 :], "attn_last", "drop_path"), "shortcut", activation="act")
    return (
        Residual("timm (ByobNet)", (name,), Branch(steps, "shortcut", identity=False, in_place=False), "attn_last", "act"),
        Residual("timm (ByobNet)", (name,), Branch(steps[:place], None), "attn", tail=tail),
    )


_TIMM = ("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2")
_TIMM_BOTTLENECK = ("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3")
_SENET = ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")


@dataclass(frozen=True)
class _FirstChannels(Tail):
    """ReXNet's: the input is added to as many channels as it has."""

    def added(self, y: Tensor, shortcut: Tensor) -> Tensor:
        c = shortcut.shape[1]
        return torch.cat([y[:, :c] + shortcut, y[:, c:]], 1)


def _inverted(name: str, steps: tuple[str, ...], *after: str) -> Residual:
    """timm's EfficientNet, MobileNet and their relatives."""
    return Residual("timm (EfficientNet)", (name,), Branch(steps, None), "se", tail=Tail(after, "has_skip", "drop_path"))


_S2D = ("conv_s2d?", "bn_s2d?")
RESIDUALS: tuple[Residual, ...] = (
    *_resnet("torchvision", "attention", ("BasicBlock",), ("Bottleneck",)),  # has none; where `tritattn.nn.attach` puts it
    Residual("timm", ("BasicBlock",), Branch(_TIMM), "se", "act2"),
    Residual("timm", ("Bottleneck",), Branch(_TIMM_BOTTLENECK), "se", "act3"),
    Residual("timm (SKNet)", ("SelectiveKernelBasic",), Branch(("conv1", "conv2")), "se", "act"),
    Residual("timm (SKNet)", ("SelectiveKernelBottleneck",), Branch(("conv1", "conv2", "conv3")), "se", "act"),
    Residual("timm (TResNet)", ("BasicBlock",), Branch(("conv1", "conv2"), in_place=False), "se", "act"),
    Residual("timm and segmentation_models_pytorch (SENet)", _SENET, Branch(BOTTLENECK, in_place=False), "se_module", "relu"),
    Residual("timm (SENet)", ("SEResNetBlock",), Branch((*BASIC, "relu"), in_place=False), "se_module", "relu"),
    *_byobnet("BasicBlock", "conv1_kxk", "attn", "conv2_kxk"),
    *_byobnet("BottleneckBlock", "conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1"),
    *_byobnet("DarkBlock", "conv1_1x1", "attn", "conv2_kxk"),
    *_byobnet("EdgeBlock", "conv1_kxk", "attn", "conv2_1x1"),
    Residual("MONAI", ("SEBlock", *_SENET), Branch(("conv1", "conv2", "conv3"), "project"), "se_layer", "act"),
    *_resnet("Jongchan/attention-module", "cbam", ("BasicBlock",), ("Bottleneck",)),
    *_resnet("landskape-ai/triplet-attention", "triplet_attention", ("BasicBlock",), ("Bottleneck",)),
    *_resnet("moskomule/senet.pytorch", "se", ("SEBasicBlock", "CifarSEBasicBlock"), ("SEBottleneck",)),
    *_resnet("BangguWu/ECANet", "eca", ("ECABasicBlock",), ("ECABottleneck",)),
    *_resnet("wofmanaf/SA-Net", "sa", (), ("SABottleneck",)),
    _inverted("InvertedResidual", (*_S2D, "conv_pw", "bn1", "conv_dw", "bn2", "aa"), "conv_pwl", "bn3"),
    _inverted("DepthwiseSeparableConv", (*_S2D, "conv_dw", "bn1", "aa"), "conv_pw", "bn2"),
    _inverted("EdgeResidual", ("conv_exp", "bn1", "aa"), "conv_pwl", "bn2"),
    _inverted("UniversalInvertedResidual", ("dw_start", "pw_exp", "dw_mid"), "pw_proj", "dw_end", "layer_scale"),
    Residual(
        "timm (MaxxViT)",
        ("MbConvBlock",),
        Branch(("pre_norm", "down", "conv1_1x1", "norm1", "conv2_kxk", "se_early?", "norm2"), None),
        "se",
        tail=Tail(("conv3_1x1",), "shortcut", "drop_path"),
    ),
    Residual(
        "timm (RegNet)", ("Bottleneck",), Branch(("conv1", "conv2"), None), "se", tail=Tail(("conv3",), "downsample", "drop_path", "act3")
    ),
    Residual(
        "timm (ReXNet)",
        ("LinearBottleneck",),
        Branch(("conv_exp?", "conv_dw"), None),
        "se",
        tail=_FirstChannels(("act_dw", "conv_pwl"), "use_shortcut", "drop_path"),
    ),
)
