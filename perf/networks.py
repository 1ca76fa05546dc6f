"""Real networks in three forms with the same weights: without attention, with attention in plain torch, and with tritattn's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritattn
from tritattn.nn._base import Block

from .peers import peer

# "timm/x": that network, converted; "+block": with that attention in its residual blocks, timm's own, or in torchvision's, which has none, attached.
# The most important first.
NETWORKS = (
    *("timm/seresnet50", "torchvision/resnet50+se", "timm/resnet50+cbam", "torchvision/resnet50+cbam", "timm/efficientnet_b0"),
    *("timm/ecaresnet50t", "timm/mobilenetv3_small_100", "torchvision/resnet50+scse", "torchvision/resnet50+eca", "timm/resnet50+coord"),
    *("timm/gcresnext26ts", "torchvision/resnet50+bam", "torchvision/resnet50+shuffle", "torchvision/resnet50+simam", "torchvision/resnet50+triplet"),
)
REPLACES = ("SelectiveKernel", "SplitAttention")  # these take the place of a convolution


class Unavailable(RuntimeError):
    """The network cannot be had here, or not in this form."""


class Absent(nn.Module):
    """What stands in a network where its attention was: nothing, or of a block of ours that ends a residual block the sum and its ReLU."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return x if residual is None else F.relu(x.add_(residual), inplace=True)


@dataclass
class Forms:
    """One network by provider, and the paths of its attention blocks.

    plain: without attention; absent where that took the place of a convolution. torch: as its package has it; attached blocks are those of tritattn
    here too, to be run as their reference. tritattn: with fused blocks.
    """

    models: dict[str, nn.Module]
    paths: tuple[str, ...]


def parse(name: str) -> tuple[str, str, str]:
    """(package, network, block or "") of a name."""
    source, _, rest = name.partition("/")
    network, _, block = rest.partition("+")
    if source not in ("timm", "torchvision") or not network:
        raise ValueError(f"no network {name!r}: timm/NAME, timm/NAME+BLOCK, torchvision/NAME or torchvision/RESNET+BLOCK")
    return source, network, block


def load(name: str) -> nn.Module:
    """The network of that name as its package initialises it; of torchvision's with an attached block."""
    source, network, block = parse(name)
    peer("torchvision")  # timm imports it as well
    package = peer(source)
    if package is None:
        raise Unavailable(f"{source} cannot be imported")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if source == "timm":
            return package.create_model(network, block_args={"attn_layer": block}) if block else package.create_model(network)
        if not block:
            return package.models.get_model(network)
        return tritattn.nn.attach(package.models.get_model(network, zero_init_residual=True), block)


def settle(model: nn.Module) -> nn.Module:
    """Takes out what would hide an error or measure chance: zeros and ones of the initialisation, and dropout.

    A norm that starts at zero, at the end of a residual branch, becomes small: with branches as large as what they are added to, an untrained network
    of fifty layers would turn any rounding into another gradient.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 1:
                p.add_(0.25 * (not p.any()) + 0.1 * noise)
            elif not p.any():
                p.copy_(noise / p[0].numel() ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def forms(name: str, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> Forms:
    """Builds the network on the device, where `convert` verifies each block through its kernels."""
    model: nn.Module = settle(load(name)).to(torch.device(device), dtype)
    model = model.to(memory_format=memory_format)  # type: ignore[call-overload]
    fused = copy.deepcopy(model)
    report = tritattn.convert(fused)
    if report.left:
        raise RuntimeError(f"not converted: {report.left[0].path}, a {report.left[0].cls}: {report.left[0].detail}")
    found = [row.path for row in report]
    # of a residual block and the attention in it, the attention
    paths = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
    for path, module in fused.named_modules():
        if isinstance(module, Block) and not any(path.startswith(f"{outer}.") for outer in paths):
            paths.append(path)
    if not paths:
        raise ValueError(f"{name} has no attention block")
    models = {"torch": model, "tritattn": fused}
    if not any(row.detail.startswith(REPLACES) for row in report):
        models["plain"] = copy.deepcopy(model)
        for path in paths:
            models["plain"].set_submodule(path, Absent())
    return Forms(models, tuple(paths))
