"""Swapping the attention blocks of an existing model for their fused equivalents, in place, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import nn as blocks
from ._fused import Fused, Plan, install, make_plan, uninstall
from ._match import Absent, match
from ._residual import find, input_channels, make_residual_plan
from ._verify import verify
from .nn._base import Block
from .nn._derived import original_type
from .peers import NoFit, candidates

# What reading a block raises that is not like its entry.
UNLIKE = (NoFit, AttributeError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class Row:
    """What became of one block."""

    path: str
    cls: str
    status: str  # converted, left, already, restored
    detail: str  # the module whose fused pass it runs now, or why it was left


class Report(list[Row]):
    """The rows of `convert` or `restore`, in the model's order; prints as a table."""

    @property
    def converted(self) -> list[Row]:
        return [row for row in self if row.status == "converted"]

    @property
    def left(self) -> list[Row]:
        return [row for row in self if row.status == "left"]

    def __str__(self) -> str:
        if not self:
            return "no attention block found"
        cells = [(row.path or "(the model)", row.cls, row.status, row.detail) for row in self]
        cells.insert(0, ("path", "class", "status", "detail"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def convert(model: nn.Module) -> Report:
    """Makes every attention block that it recognises in `model` run as one fused op, in place.

    Blocks are recognised by class name and parameters, installed or pasted: those of timm, torchvision, MONAI,
    segmentation_models_pytorch, ultralytics, mmcv, External-Attention-pytorch, 0809zheng.github.io and the papers'
    authors, the latter also where a copy has been corrected to what the paper says.
    A converted block is the same object, with the same parameters, buffers, state dict, hooks, mode, device and
    dtype, and still an instance of its class; only its `forward` is another. Weights are read at every call, and a
    call that the fused pass does not cover (hooks or new types inside, an input of another rank) takes the original
    forward.

    A residual block that ends in such attention, the sum with its shortcut and an activation that the gating pass knows
    (timm's ResNet, SENet, SKNet, TResNet and ByobNet, MONAI's and segmentation_models_pytorch's SENet, the authors')
    takes both into that pass, and has a row of its own beside the attention's. While stochastic depth is active, or
    where something in it has been changed or hooked, its original forward runs, with the fused attention inside.

    So does a block that has a channel gate (SE, ECA) in its middle, after a BatchNorm and an activation: timm's
    InvertedResidual and its relatives, RegNet, ReXNet, ByobNet and MaxxViT, and any Sequential of convolutions, norms and activations,
    such as torchvision's blocks. The activation is part of the gate's passes always, the BatchNorm in training, and in
    evaluation where its parameters need no gradient.

    Every block is first run beside its fused form on copies, in fp64, in training and evaluation mode, with and
    without ties, and compared in outputs, gradients and buffers. A block that differs, has no data (meta), is sharded,
    compiled or scripted, or holds hooks or unknown modules is left as it is. Convert before `torch.compile`. Options
    that are changed on a block later are not seen: restore it, change them, convert it again.

    Args:
        model: any module; may be such a block itself.

    Returns:
        A list of rows (path, cls, status, detail) that prints as a table, with `converted` and `left` among them.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    report = Report()
    _visit(model, "", report, set())
    return report


def restore(model: nn.Module) -> Report:
    """Gives every converted block in `model` its own forward back, in place, and returns the rows that say so."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    report = Report()
    for path, module in model.named_modules():
        if isinstance(module, Fused):
            name = original_type(type(module)).__name__
            if uninstall(module):
                report.append(Row(path, name, "restored", "its own forward"))
            else:
                report.append(Row(path, name, "left", f"its class has become {type(module).__name__}"))
    return report


def _visit(module: nn.Module, path: str, report: Report, seen: set[int]) -> None:
    if id(module) in seen or isinstance(module, Block):
        return
    seen.add(id(module))
    row = _closed(module, path)
    if row is not None:
        report.append(row)
        return
    row = _swap(module, path)
    if row is not None:
        report.append(row)
        if row.status == "converted":
            return
    place = len(report)
    for name, child in module.named_children():
        _visit(child, f"{path}.{name}" if path else name, report, seen)
    row = _swap_residual(module, path)
    if row is not None:
        report.insert(place, row)


def _closed(module: nn.Module, path: str) -> Row | None:
    """The row of a module that is not looked into."""
    names = [kind.__name__ for kind in type(module).__mro__]
    if isinstance(module, Fused):
        if module._tritattn is not None:
            return Row(path, names[0], "already", module._tritattn.module.__name__)
        uninstall(module)
    if isinstance(module, torch.jit.ScriptModule):
        return Row(path, names[0], "left", "scripted; convert before torch.jit.script")
    if "OptimizedModule" in names or module._compiled_call_impl is not None:
        return Row(path, names[0], "left", "compiled; convert before torch.compile")
    if "FullyShardedDataParallel" in names:
        return Row(path, names[0], "left", "sharded; convert before wrapping in FSDP")
    return None


def _swap(block: nn.Module, path: str) -> Row | None:
    """Converts a block. The row that says so or why not; None for a module that no entry is about."""
    near, far = [], []  # reasons of entries whose layers the block has, and of the others
    for peer in candidates(block):
        try:
            found = match(peer, block, getattr(blocks, peer.module).options_of)
            _install(block, make_plan(found, block), found.input_channels)
        except Absent as error:
            if not peer.common_name:
                far.append(f"not {peer}: {error}")
        except UNLIKE as error:
            near.append(f"{peer}: {error}")
        else:
            return Row(path, type(block).__name__, "converted", f"{peer.module} ({peer.source})")
    reasons = near or far
    return Row(path, type(block).__name__, "left", "; ".join(reasons)) if reasons else None


def _swap_residual(block: nn.Module, path: str) -> Row | None:
    """Converts a block whose attention has been, with what stands next to that. The row that says so or why not; None for any other module."""
    entry = find(block)
    if entry is None:
        return None
    name = type(block).__name__
    try:
        plan, taken = make_residual_plan(entry, block)
        _install(block, plan, input_channels(entry, block))
    except UNLIKE as error:
        return Row(path, name, "left", f"{entry}: {error}")
    return Row(path, name, "converted", f"{plan.module.__name__} {taken} ({entry.source})")


def _install(block: nn.Module, plan: Plan, channels: int) -> None:
    _check_tensors(block)
    verify(block, plan, channels)
    install(block, plan)


def _check_tensors(block: nn.Module) -> None:
    from torch._subclasses.fake_tensor import FakeTensor

    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            raise NoFit(f"{name} has no data (meta or fake); convert once the model is materialised")
        if hasattr(tensor, "device_mesh"):
            raise NoFit(f"{name} is sharded; convert before sharding")
