"""Inputs for the rows of the table of ops. `check` runs one case both ways and compares the value and every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from eager_blocks import TAILS
from rows import BY_NAME, MAIN, OPS, Op, Params, Shape
from tolerance import assert_close, largest
from torch import Tensor, nn

__all__ = ["BY_NAME", "DTYPES", "LAYOUTS", "MAIN", "OPS", "TAILS", "VALUES", "Inputs", "Op", "check", "eager", "fused", "make", "run", "y_like"]

# -- inputs -----------------------------------------------------------------------------------------------------------------------------------


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """One element in the middle of the first image replaced."""

    def replaced(t: Tensor) -> Tensor:
        t = t.clone()
        t.flatten()[t[:1].numel() // 2] = value
        return t

    return replaced


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
OFFSET = 1000.0
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda t: t,
    "offset": lambda t: t + OFFSET,
    "constant": lambda t: torch.full_like(t, 0.7),
    "zero": torch.zeros_like,
    "ties": lambda t: (1.5 * t).round().relu(),  # what a ReLU leaves: many zeros, and maxima that tie
    "nan": _with(math.nan),
    "inf": _with(math.inf),
    "-inf": _with(-math.inf),
}


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _sliced(t: Tensor) -> Tensor:
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def _permuted(t: Tensor) -> Tensor:
    """Dense, in none of the two orders."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": _channels_last,
    "sliced": _sliced,
    "permuted": _permuted,
    "expanded": lambda t: t[..., :1].expand_as(t),  # other values than the rest: the first column, repeated
}


Norm = nn.modules.batchnorm._BatchNorm


@dataclass
class Inputs:
    """x, the parameters, perhaps a residual, and the seed of y's gradient."""

    x: Tensor
    params: Params
    residual: Tensor | None
    seed: int = 0
    g: dict[Shape, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        found = {"x": self.x}
        for name, value in self.params.items():
            if isinstance(value, nn.Module):
                found |= {f"{name}.{child}": t for child, t in value.named_parameters()}
            elif value is not None:
                found[name] = value
        return found if self.residual is None else {**found, "residual": self.residual}

    def modules(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self.params.items() if isinstance(value, nn.Module)}

    def buffers(self) -> dict[str, Tensor]:
        """The running statistics of BatchNorms."""
        return {
            f"{name}.{child}": t for name, module in self.modules().items() for child, t in module.named_buffers() if t.is_floating_point()
        }

    def training_norms(self) -> list[nn.Module]:
        """The BatchNorms that compute statistics."""
        return [m for module in self.modules().values() for m in module.modules() if isinstance(m, Norm) and m.training]

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with everything in that dtype."""

        def convert(value: Any) -> Any:
            if isinstance(value, nn.Module):
                return copy.deepcopy(value).to(dtype)
            return None if value is None else value.detach().to(dtype, copy=True).requires_grad_(value.requires_grad)

        params = {name: convert(value) for name, value in self.params.items()}
        return Inputs(convert(self.x), params, convert(self.residual), self.seed, {s: g.to(dtype) for s, g in self.g.items()})

    def gradient(self, y: Tensor) -> Tensor:
        """What flows back into y: the same for every run, as x's dtype can hold it."""
        if y.shape not in self.g:
            generator = torch.Generator().manual_seed(self.seed + 1)
            self.g[y.shape] = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        return self.g[y.shape]


LOGITS = ("weights", "local", "pooled")  # not divided by what a layer adds up


def make(
    op: Op, shape: Shape, *, dtype: torch.dtype = torch.float32, parameters: torch.dtype | None = None, layout: str = "contiguous",
    values: str = "random", residual: bool = False, seed: int = 0,
) -> Inputs:  # fmt: skip
    """Inputs of a case, everything requiring gradients; x has as many more channels as the op needs. parameters: their dtype, by default x's."""
    shape = (shape[0], -(-shape[1] // op.multiple) * op.multiple, *shape[2:])
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def parameter(name: str, size: Any) -> Any:
        if size is None:
            return None
        if isinstance(size, str):
            return _norm(size, parameters or dtype)
        if callable(size):
            return _filled(size(), normal).to(parameters or dtype)
        if name.startswith("x"):
            return a_map(values, shape)
        value = normal(*size)
        if len(size) > 1 and name not in LOGITS:
            value /= math.sqrt(math.prod(size[1:]))
        if values == "offset" and name in op.scaled:
            value /= OFFSET
        return value.to(parameters or dtype).requires_grad_()

    def a_map(values: str, shape: Shape) -> Tensor:
        return LAYOUTS[layout](VALUES[values](normal(*shape)).to(dtype)).requires_grad_()

    x = a_map(values, (shape[0], op.wide * shape[1], *shape[2:]))
    params = {name: parameter(name, size) for name, size in op.shapes(shape).items()}
    return Inputs(x, params, a_map("random", shape) if residual else None, seed)


def y_like(op: Op, x: Tensor) -> Tensor:
    """Empty, of the strides that y has."""
    return torch.empty_like(x if op.wide == 1 else x[:, : x.shape[1] // op.wide])


def _norm(mode: str, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(1, momentum=0.3)
    with torch.no_grad():
        for name, value in (("weight", 1.3), ("bias", -0.2), ("running_mean", -1.0), ("running_var", 1.7)):
            getattr(norm, name).fill_(value)
    return norm.to(dtype).train(mode == "train")


def _filled(module: nn.Module, normal: Callable[..., Tensor]) -> nn.Module:
    """Random values for every parameter, and for running statistics."""
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if name.endswith("running_var"):
                t.copy_(normal(*t.shape).abs() + 0.5)
            elif t.is_floating_point():
                t.copy_(normal(*t.shape) / math.sqrt(math.prod(t.shape[1:])))
    return module


# -- running a case both ways -----------------------------------------------------------------------------------------------------------------


def eager(op: Op, x: Tensor, params: Params, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    gated = op.eager(x, params)
    return TAILS[activation](gated if residual is None else gated + residual)


def fused(op: Op, x: Tensor, params: Params, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    return op.call(x, params, residual=residual, activation=activation) if op.epilogue else op.call(x, params)


def run(call: Callable, op: Op, inputs: Inputs, activation: str = "none", wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """y, the gradients that are wanted (by default all of them) and a BatchNorm's buffers, by name."""
    y = call(op, inputs.x, inputs.params, inputs.residual, activation)
    tensors = {name: t for name, t in inputs.tensors().items() if wanted is None or name in wanted}
    grads = torch.autograd.grad(y, list(tensors.values()), inputs.gradient(y))
    buffers = {name: t.clone() for name, t in inputs.buffers().items()}
    return {"y": y.detach(), **dict(zip(tensors, grads, strict=True)), **buffers}


def _of_map(name: str) -> bool:
    return name in ("y", "residual") or name.startswith("x")


def check(op: Op, inputs: Inputs, activation: str = "none", wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """The case through tritattn against the same in plain torch: y, every gradient, a BatchNorm's buffers. Returns what tritattn gave."""
    accumulator = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    exact, plain = inputs.to(torch.float64), inputs.to(accumulator)
    got = run(fused, op, inputs, activation, wanted)
    for other in (exact, plain):
        other.g = {shape: g.to(other.x.dtype) for shape, g in inputs.g.items()}
    expected = run(eager, op, exact, activation, wanted)
    cast = run(eager, op, plain, activation, wanted)
    n, *rest = inputs.x.shape
    # a module between squeeze and gate, or a BatchNorm that computes, rounds what it gets, and its gradient, to its own dtype
    between = [module for module in inputs.modules().values() if not isinstance(module, Norm)] + inputs.training_norms()
    rounded = {accumulator} | {t.dtype for module in between for t in module.parameters()}
    summed = max(rounded, key=lambda dtype: torch.finfo(dtype).eps)
    kinds = {name: t.dtype for name, t in (inputs.tensors() | inputs.buffers()).items()}
    gradients = [t for name, t in expected.items() if name in inputs.tensors() and not _of_map(name)]
    for name, value in got.items():
        dtype = (accumulator if op.raw else inputs.x.dtype) if name == "y" else kinds[name]
        # all of an image, or of the batch, and the steps from the statistics to the gate
        terms = 16 + math.prod(rest) * (1 if _of_map(name) else n)
        # a single number, in as many places as there are, a bias inside a module, or what is zero altogether may be a sum that cancels: its error is
        # that of all parameters'
        single = expected[name].numel() == 1 or not expected[name].any()
        single |= not _of_map(name) and len(set(expected[name].flatten().tolist()) - {0.0}) == 1
        cancels = single or ("." in name and expected[name].dim() == 1)
        like = gradients if name in inputs.tensors() and cancels and gradients else [expected[name]]
        if name in inputs.buffers():  # a mean may cancel as well; how far its terms spread is in the variance beside it
            like = [expected[other] for other in inputs.buffers() if expected[other].is_floating_point()]
        assert_close(name, value, expected[name], cast[name].to(dtype), terms=terms, accumulator=summed, scale=largest(*like))
    return got
