"""What the modules share: reading layers at call time, the choice between the fused and the composed pass, checkpoints of peers."""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.weight_norm import WeightNorm

from .. import ops, reference
from .._match import PLAIN_LAYERS
from ..ops import _checks
from ._checkpoint import translate

T = TypeVar("T")

# Hooks whose whole effect is to compute `weight` anew, from which the fused pass then reads it. Not spectral_norm's: its power iteration
# counts how often a layer is called.
REWEIGHTING_HOOKS = (torch.nn.utils.prune.BasePruningMethod, WeightNorm)


def obstacle(layer: nn.Module | Tensor | None, kinds: Collection[type] = PLAIN_LAYERS) -> str | None:
    """Why a fused pass may not stand in for a call of `layer`: its type adds something, or hooks do. None when it may, as for a bare parameter.

    A parametrized layer is fine, because reading its weight runs the parametrization, and so is a pruned or weight-normalised one.
    """
    if not isinstance(layer, nn.Module):
        return None
    kind = type(layer)
    if kind not in kinds:
        if not parametrize.is_parametrized(layer) or kind.__mro__[1] not in kinds:
            return f"is a {kind.__name__}"
        if any(True for _ in layer.parametrizations.buffers()):  # type: ignore[union-attr]
            return "has a parametrization with a state"
    if "forward" in layer.__dict__:
        return "has a forward of its own"
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "carries hooks"
    for hook in layer._forward_pre_hooks.values():
        if not isinstance(hook, REWEIGHTING_HOOKS):
            return "carries hooks"
    return None


def weights(layer: nn.Module | None) -> tuple[Any, Any]:
    """Weight and bias of a layer as a call of it would use them now; (None, None) for an absent layer."""
    if layer is None:
        return None, None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, REWEIGHTING_HOOKS):
            hook(layer, None)
    return layer.weight, layer.bias


def sublayer(module: nn.Module, path: str) -> Any:
    """The layer or parameter at a dotted path, None where the path meets None."""
    layer: Any = module
    for name in path.split("."):
        layer = None if layer is None else getattr(layer, name)
    return layer


def own_code(function: Any) -> Any:
    """A copy of a method with a code object of its own, by which torch.compile counts recompilations: classes that share a forward
    would otherwise share the limit."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def one_of(argument: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{argument}: got {value!r}, expected one of {', '.join(allowed)}")
    return value


def positive(argument: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{argument}: got {value!r}, expected a positive integer")
    return value


def odd(argument: str, value: int) -> int:
    if positive(argument, value) % 2 == 0:
        raise ValueError(f"{argument}: got {value}, expected an odd number")
    return value


def given(argument: str, value: T | None) -> T:
    if value is None:
        raise ValueError(f"{argument}: got None, expected a value")
    return value


def reduced(channels: int, rd_ratio: float, rd_channels: int | None, rd_divisor: int | None) -> int:
    """Width of a bottleneck: `rd_channels` where given; else channels * rd_ratio, rounded to the nearest multiple of `rd_divisor` and not
    below it, or rounded down and not below 1 where `rd_divisor` is None (channels // r for rd_ratio = 1 / r)."""
    if rd_channels is not None:
        return positive("rd_channels", rd_channels)
    if not 0 < rd_ratio <= 1:
        raise ValueError(f"rd_ratio: got {rd_ratio}, expected a number in (0, 1]")
    width = channels * rd_ratio
    if rd_divisor is None:
        return max(1, int(width + 1e-6))  # 49 * (1 / 49) is below 1 in floating point
    divisor = positive("rd_divisor", rd_divisor)
    return max(divisor, int(width + divisor / 2) // divisor * divisor)


def bottleneck_options(fc1: Any, fc2: Any) -> dict[str, Any]:
    """Constructor options of the two layers of `pointwise`."""
    return {"channels": fc2.weight.shape[0], "rd_channels": fc1.weight.shape[0], "bias": fc2.bias is not None}


def pointwise(channels_in: int, channels_out: int, bias: bool, like: Mapping[str, Any]) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, bias=bias, **like)


def over_channels(logits: Tensor, x: Tensor) -> Tensor:
    """[N, C, ...ones] -> [N, C, 1, ...] of x's rank."""
    return logits.reshape(*logits.shape[:2], *(1,) * (x.dim() - 2))


class Block(nn.Module):
    """Base of the modules: the parameters sit in torch layers, `forward` hands them to one fused op.

    A layer that is more than its weight and bias (hooks, a LoRA wrapper, fake quantisation, any type of its own) is called as a module
    instead, between a fused squeeze and a fused gate, so the result is always that of the layers as they stand. So is a half, of a block of two,
    that carries hooks or has been replaced.

    `activation` (none, relu, silu, hardswish, gelu) is applied last, and `residual=True` adds the input itself where `forward` gets no
    residual; both belong to the gating pass and cost no further one.

    State dicts of other packages' blocks load as they are; `load_state_dict(strict=True)` names the keys and shapes that do not fit.
    """

    layers: ClassVar[tuple[str, ...]]  # paths of the layers and bare parameters, in the order in which `fused` takes them
    called: ClassVar[frozenset[str]] = frozenset()  # those among them that `fused` itself calls as modules
    halves: ClassVar[Mapping[str, type[Block]]] = {}  # blocks whose layers `fused` takes instead of calling them

    def __init_subclass__(cls) -> None:
        cls.forward = own_code(cls.forward)  # type: ignore[method-assign]

    def __init__(self, residual: bool = False, activation: str = "none") -> None:
        super().__init__()
        self.residual = residual
        self.activation = one_of("activation", activation, reference.ACTIVATIONS)

    @classmethod
    def options_of(cls, layers: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor options that the shapes of `layers` tell; keys are the paths in `cls.layers`, absent where the block has no such layer."""
        raise NotImplementedError

    @staticmethod
    def fused(x: Tensor, *layers: Any, **settings: Any) -> Tensor:
        """The block on given layers; `settings` are those of an instance, and `residual`."""
        raise NotImplementedError

    def initialise(self) -> None:
        """Sets the parameters that the authors' networks start from other values than the layers' own."""

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `fused` that this instance's options stand for."""
        return {"activation": self.activation}

    def gate_weights(self, x: Tensor) -> Tensor:
        """The gate, broadcastable to x, with every layer called as a module."""
        raise NotImplementedError

    def composed(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`fused` with every layer called as a module."""
        return ops.gate(x, self.gate_weights(x), residual=residual, activation=self.activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None and self.residual:
            residual = x
        layers = self.plain_layers()
        return self.composed(x, residual) if layers is None else self.fused(x, *layers, residual=residual, **self.settings())

    def halves_called(self) -> bool:
        """Whether a half is more than its layers: `composed` then calls the halves as modules."""
        return any(obstacle(getattr(self, name), (kind,)) is not None for name, kind in self.halves.items())

    def finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """`composed` from what halves have made of the map."""
        if not isinstance(y, torch.fx.Proxy):
            _checks.residual(residual, y)
        return reference.ACTIVATIONS[self.activation](y if residual is None else y + residual)

    def plain_layers(self) -> list[Any] | None:
        """What `fused` takes; None where a layer or a half has to be called as a module."""
        if self.halves_called():
            return None
        layers = [sublayer(self, path) for path in self.layers]
        for path, layer in zip(self.layers, layers, strict=True):
            if path not in self.called and obstacle(layer) is not None:
                return None
        return layers

    def extra_repr(self) -> str:
        settings = {"activation": self.activation} if self.halves_called() else self.settings()  # which a half may have no part of
        shown = {**settings, "residual": self.residual}
        usual = {"activation": "none", "residual": False, "apply": True}
        options = {"hidden": "act", "before": "path_act"}  # the constructor's names
        return ", ".join(f"{options.get(k, k)}={v}" for k, v in shown.items() if usual.get(k, ...) != v)

    def __prepare_scriptable__(self) -> NoReturn:
        not_scriptable(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        error_msgs = rest[-1]
        translate(self, state_dict, prefix, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class ChannelGate(Block):
    """A block whose passes can take in what a network has between a convolution and the block: with `before` and `before_norm` the result is that
    for b(before_norm(x)) instead of x.

    b: none, relu, relu6, leaky_relu, silu, hardswish, gelu. before_norm: a module that returns x's shape; a BatchNorm is part of the passes in
    evaluation as long as its parameters need no gradient, and in training in front of a block that pools means alone; every other is called. It is
    the network's and stays there: `block(conv(x), residual, before="silu", before_norm=bn)` for block(silu(bn(conv(x))), residual). With
    `residual=True` x itself is added, not what b makes of it.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None, before: str = "none", before_norm: nn.Module | None = None) -> Tensor:
        if residual is None and self.residual:
            residual = x
        layers = self.plain_layers()
        if layers is not None:
            return self.fused(x, *layers, residual=residual, before=before, before_norm=before_norm, **self.settings())
        one_of("before", before, reference.HIDDEN)
        return self.composed(reference.HIDDEN[before](x if before_norm is None else before_norm(x)), residual)


def not_scriptable(module: nn.Module) -> NoReturn:
    """The answer to torch.jit.script, which calls a module's `__prepare_scriptable__` first."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile tritattn's fused passes; use torch.compile, torch.export or "
        "torch.jit.trace (a converted model can be scripted after tritattn.restore)"
    )


def bottleneck(z: Tensor, x: Tensor, fc1: nn.Module | None, fc2: nn.Module, hidden: str, norm: nn.Module | None = None) -> Tensor:
    """sum_k fc2(hidden(norm(fc1(z_k)))) over statistics z [N, K, C], with the layers called as modules; [N, C, 1, ...] of x's rank."""
    total = None
    for column in z.to(x.dtype).unbind(1):
        column = column[:, :, None, None]
        if fc1 is not None:
            column = fc1(column)
            column = reference.HIDDEN[hidden](column if norm is None else norm(column))
        logits = fc2(column)
        total = logits if total is None else total + logits
    assert total is not None
    return over_channels(total, x)
