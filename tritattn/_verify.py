"""Running a block beside its fused form, on copies, before it is converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._fused import Plan, install
from .nn._base import REWEIGHTING_HOOKS
from .peers import Branch, NoFit


def verify(block: nn.Module, plan: Plan, channels: int) -> None:
    """Compares outputs, gradients and buffers in fp64, in both modes, with and without ties. Raises NoFit with the first difference.

    On a GPU it runs there, so through the kernels, and the output is compared in the block's own dtype as well. A block without parameters has no
    place of its own, and runs on the CPU.
    """
    sample = next(block.parameters(), torch.empty(0))
    device = sample.device if sample.device.type == "cuda" else torch.device("cpu")  # not every device has fp64
    try:
        with _undisturbed(device):
            exact = _redrawn(_copy(block).to(device, torch.float64))
            for training in (True, False):
                for ties in (False,) if isinstance(plan.before, Branch) else (False, True):  # convolutions leave no ties
                    _compare(_train(exact, plan, training), plan, [x.to(device) for x in _inputs(plan, channels, ties)])
            if device.type == "cuda" and sample.dtype != torch.float64:
                _compare_values(_redrawn(_copy(block)).eval(), plan, [x.to(sample) for x in _inputs(plan, channels, False)])
    except NoFit:
        raise
    except Exception as error:  # whatever a stranger's block raises, the block stays as it is
        raise NoFit(f"could not be verified ({type(error).__name__}: {str(error)[:200]})") from error


def _compare(block: nn.Module, plan: Plan, maps: Sequence[Tensor]) -> None:
    mode = "training" if block.training else "evaluation"
    expected, found = _trace(copy.deepcopy(block), maps), _trace(_fused_copy(block, plan), maps)
    largest = max(float(t.abs().max()) for name, t in expected.items() if name.startswith("gradient"))
    for name, t in expected.items():
        scale = largest if name.startswith("gradient") else float(t.abs().max())
        if t.shape != found[name].shape:
            raise NoFit(
                f"not the same in {mode} mode: {name} has shape {list(t.shape)}, fused {list(found[name].shape)}"
            )
        if not torch.allclose(found[name], t, rtol=0, atol=1e-9 * scale, equal_nan=True):
            error = float((found[name] - t).abs().max()) / (scale or 1)
            raise NoFit(f"not the same in {mode} mode: {name} differs by {error:.1e} of the largest value")


def _compare_values(block: nn.Module, plan: Plan, maps: Sequence[Tensor]) -> None:
    """In the block's own dtype: as close to fp64 as the original is, or to a few units in the last place."""
    with torch.no_grad():
        exact = copy.deepcopy(block).double()(*(x.double() for x in maps))
        theirs, ours = ((f(*maps).double() - exact).abs().max() for f in (copy.deepcopy(block), _fused_copy(block, plan)))
    if not ours <= 2 * theirs + 8 * torch.finfo(maps[0].dtype).eps * exact.abs().max():
        raise NoFit(f"not the same in {maps[0].dtype}: off by {float(ours):.1e}, the original by {float(theirs):.1e}")


def _fused_copy(block: nn.Module, plan: Plan) -> nn.Module:
    twin = copy.deepcopy(block)
    install(twin, plan)
    if not plan.covers(twin, *(torch.empty((0,) * plan.dims),) * plan.inputs):
        raise NoFit("its copy is not like it")
    return twin


def _trace(block: nn.Module, maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers after one forward and backward pass."""
    torch.manual_seed(0)
    maps = [x.clone().requires_grad_() for x in maps]
    y = block(*maps)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).to(y.device))
    result = {"the output": y.detach()}
    inputs = {f"input {i}" if i else "the input": x for i, x in enumerate(maps)}
    for name, p in {**inputs, **dict(block.named_parameters())}.items():
        result[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return result | {f"buffer {name}": b.double() for name, b in block.named_buffers()}


def _train(block: nn.Module, plan: Plan, training: bool) -> nn.Module:
    """In that mode; but with stochastic depth the original forward runs, so that stays in evaluation."""
    block.train(training)
    for inner in plan.inner:
        if inner.random:
            block.get_submodule(".".join(inner.path)).eval()
    return block


def _inputs(plan: Plan, channels: int, ties: bool) -> list[Tensor]:
    """channels: of the maps that the block takes."""
    size = (7, 7) if plan.square else {3: (11,), 4: (8, 6), 5: (4, 3, 5)}[plan.dims]
    generator = torch.Generator().manual_seed(2)
    shape = (plan.inputs, 2, channels, *size)
    maps = torch.randn(shape, generator=generator, dtype=torch.float64)
    return list((2 * maps).round().relu() / 2 if ties else maps)


def _copy(block: nn.Module) -> nn.Module:
    """A deep copy without the block's hooks, but for those that compute a weight, and with values for derived weights."""
    memo: dict[int, Any] = {}
    for module in block.modules():
        for name, value in vars(module).items():
            if isinstance(value, dict) and "_hooks" in name:
                kept = ((key, hook) for key, hook in value.items() if isinstance(hook, REWEIGHTING_HOOKS))
                memo[id(value)] = type(value)(kept)
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(block, memo)
    for module in twin.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # the same arithmetic within one process
    return twin.requires_grad_(True)


def _redrawn(block: nn.Module) -> nn.Module:
    """New values for every parameter and buffer, so that a layer initialised to zero hides nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in (*block.named_parameters(), *block.named_buffers()):
            if "parametrizations" in name or not t.is_floating_point():
                continue
            if isinstance(t, nn.Parameter):
                fan_in = t[0].numel() if t.dim() > 1 else 1
                t.copy_(torch.randn(t.shape, generator=generator) / fan_in**0.5)
            else:
                t.copy_(0.5 + torch.rand(t.shape, generator=generator))
    return block


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Verification leaves no trace in the random generators, and no mode that is on around it changes its outcome."""
    on_cpu = device.type == "cpu"
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(
            torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type)
        )
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
