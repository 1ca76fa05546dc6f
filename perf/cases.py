"""A case: one op on one map, with its inputs and parameters, and the fp64 answer that its measurements have to agree with."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BLOCKS, Params, Weights
from .ops import Op, op
from .shapes import SETS, Site

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    op_name: str
    dtype: str
    layout: str
    n: int
    c: int
    h: int
    w: int
    params: str  # JSON

    @cached_property
    def op(self) -> Op:
        return op(self.op_name)

    @cached_property
    def options(self) -> Params:
        return json.loads(self.params)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @cached_property
    def parameter_numels(self) -> list[int]:
        return [t.numel() for t in flat_parameters(Inputs(self, "meta").weights)]

    def row(self) -> dict[str, Any]:
        """The identity columns but provider and mode."""
        columns = {"op": self.op_name, "dtype": self.dtype, "layout": self.layout, "params": self.params}
        return {**columns, "n": self.n, "c": self.c, "h": self.h, "w": self.w}

    def bytes_min(self, mode: str) -> int:
        """What the mode moves at the least, whoever runs it: the op's floor for the map, and the parameters (and their gradients) once."""
        forward, backward = self.op.floor_u
        parameters = sum(self.parameter_numels)
        passes = {"fwd": (forward, 1), "inference": (forward, 1), "bwd": (backward, 2), "fwd_bwd": (forward + backward, 3)}
        maps, reads = passes[mode]
        return self.itemsize * (maps * math.prod(self.shape) + reads * parameters)


def eca_kernel(c: int) -> int:
    """The ECA authors' rule: the odd number next to (log2 c + 1) / 2."""
    t = int((math.log2(c) + 1) / 2)
    return t if t % 2 else t + 1


def make_case(op_name: str, dtype: str, layout: str, n: int, site: Site, **params: Any) -> Case:
    defaults = op(op_name).block.defaults
    chosen = {**defaults, **{name: value for name, value in params.items() if name in defaults}}
    if chosen.get("rd") == 0:
        chosen["rd"] = site.rd
    if chosen.get("k") == 0:
        chosen["k"] = eca_kernel(site.c)
    return Case(op_name, dtype, layout, n, site.c, site.h, site.w, json.dumps(chosen, separators=(",", ":"), sort_keys=True))


def all_cases(
    op_names: Iterable[str], set_names: Iterable[str], dtypes: Iterable[str], layouts: Iterable[str], batches: Iterable[int] = ()
) -> list[Case]:
    """Every case of the given axes, the most important first and without repeats.

    Importance is the sum of the ranks that a case has on each axis, so that a run cut short by its budget has covered every axis a little.
    """
    op_names, dtypes, layouts = list(op_names), list(dtypes), list(layouts)
    ranked: dict[Case, float] = {}
    for set_rank, set_name in enumerate(set_names):
        shapes = SETS[set_name]
        for op_rank, name in enumerate(op_names):
            if op(name).block_name not in shapes.blocks:
                continue
            if not shapes.epilogues and op(name).name != op(name).block_name:
                continue
            # a CBAM without BatchNorm as well: blocks without one are common, and the op then has a path of its own
            norms = ("none", "batch") if "norm" in BLOCKS[op(name).block_name].defaults else ("none",)
            for n_rank, n in enumerate(batches or shapes.batches):
                for site_rank, site in enumerate(sorted(shapes.sites, key=lambda s: -s.count * s.c * s.h * s.w)):
                    for d, dtype in enumerate(dtypes):
                        for f, layout in enumerate(layouts):
                            for norm_rank, norm in enumerate(norms):
                                case = make_case(name, dtype, layout, n, site, **shapes.params, norm=norm)
                                rank = op_rank + 2 * site_rank + 3 * (set_rank + f + norm_rank) + 5 * n_rank + 6 * d
                                ranked[case] = min(rank, ranked.get(case, math.inf))
    return sorted(ranked, key=lambda case: ranked[case])


class Inputs:
    """The tensors of a case: sets of (x, residual, g) and one set of parameters.

    The values leave no decision to rounding, so that one answer is right for every provider: maxima are unique, ReLUs stay clear of zero.
    Several sets let consecutive calls find nothing of theirs in the cache.
    """

    def __init__(self, case: Case, device: str, sets: int = 1):
        self.case = case
        self.generator = torch.Generator(device if device != "meta" else "cpu").manual_seed(20)
        self.device = device
        dtype = DTYPES[case.dtype]
        self.weights: Weights = {}
        block = case.op.block
        for name, made in block.shapes(case.c, case.options).items():
            if callable(made):
                self.weights[name] = self._module(made, dtype)
            else:
                self.weights[name] = None if made is None else self._parameter(name, made).to(dtype).requires_grad_()
        self.maps = [[self._map(dtype, self._x).requires_grad_() for _ in range(block.maps)] for _ in range(sets)]
        self.x: list[Any] = [maps[0] if block.maps == 1 else tuple(maps) for maps in self.maps]
        self.residual = [self._residual(maps[0]) if case.op.residual else None for maps in self.maps]
        self.g = [self._map(dtype, self._uniform) for _ in range(sets)]

    def _uniform(self, *shape: int) -> Tensor:
        """In [-1, 1)."""
        if self.device == "meta":
            return torch.empty(shape or self.case.shape, device="meta")
        return torch.rand(shape or self.case.shape, generator=self.generator, device=self.device) * 2 - 1

    def _map(self, dtype: torch.dtype, values: Any) -> Tensor:
        return values().to(dtype).contiguous(memory_format=LAYOUTS[self.case.layout])

    def _x(self) -> Tensor:
        """Uniform, with one peak in every pixel and a highest one, unique, in every channel."""
        n, c, h, w = self.case.shape
        c *= self.case.op.block.wide
        flat = self._uniform(n, c, h * w)
        if self.device == "meta" or not n:
            return flat.view(n, c, h, w)
        pixels, channels = torch.arange(h * w, device=self.device), torch.arange(c, device=self.device)
        flat[:, channels, channels % (h * w)] = 1.5
        peaks = torch.where(pixels < c, 4.0, 3.25 + 0.25 * self._uniform(n, h * w))
        owner = (pixels + torch.arange(n, device=self.device)[:, None]) % c
        return flat.scatter_(1, owner[:, None], peaks[:, None]).view(n, c, h, w)

    def _residual(self, x: Tensor) -> Tensor:
        """Of either sign and further from zero than any gated value; positive under x's peaks."""

        def values() -> Tensor:
            r = self._uniform()
            r += 1.5 * r.sign()
            return torch.where(x.detach() > 1, r.abs(), r) if x.shape == r.shape else r

        return self._map(x.dtype, values).requires_grad_()

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values = self._uniform(*shape)
        if name == "b1":  # decides each hidden ReLU
            return 0.5 * values.sign() + 0.1 * values
        if shape == (1,):  # lifts a pixel's gate above the channel's, which decides an element-wise maximum of the two
            return values * 0 + 2.5
        if len(shape) == 1:
            return 0.1 * values
        # the last layer is small, which keeps the gates close to each other and the peaks apart from the rest after gating
        return values / math.sqrt(math.prod(shape[1:])) * (0.1 if name == "w2" else 1.0)

    def _module(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
        """As torch initialises it, the same every time; made in its dtype, since fake parameters cannot be converted."""
        usual = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), torch.device("meta" if self.device == "meta" else "cpu"):
            torch.manual_seed(21)
            torch.set_default_dtype(dtype)
            try:
                made = make()
            finally:
                torch.set_default_dtype(usual)
        return made if self.device in ("cpu", "meta") else made.to(self.device)

    def parameters(self) -> list[Tensor]:
        return flat_parameters(self.weights)

    def wanted(self, index: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What gradients are asked for: the maps of a set, its residual, and the parameters."""
        residual = self.residual[index]
        return [*self.maps[index], *([] if residual is None else [residual]), *parameters]


def flat_parameters(weights: Weights) -> list[Tensor]:
    """The tensors of `weights` in order, a module's parameters in its place."""
    tensors: list[Tensor] = []
    for value in weights.values():
        tensors += value.parameters() if isinstance(value, nn.Module) else [] if value is None else [value]
    return tensors


class Answer:
    """What a case's calls must return, from the plain torch code in fp64: y in training and in inference, and the gradients."""

    def __init__(self, inputs: Inputs):
        case = inputs.case
        weights: Weights = {}
        for name, value in inputs.weights.items():
            if isinstance(value, nn.Module):
                weights[name] = copy.deepcopy(value).double()
            else:
                weights[name] = None if value is None else value.detach().double().requires_grad_()
        maps = [x.detach().double().requires_grad_() for x in inputs.maps[0]]
        residual = None if inputs.residual[0] is None else inputs.residual[0].detach().double().requires_grad_()
        modules = [value for value in weights.values() if isinstance(value, nn.Module)]

        def run() -> Tensor:
            x = maps[0] if len(maps) == 1 else tuple(maps)
            return case.op.tail(case.op.block.eager(x, weights, case.options), residual)

        for module in modules:
            module.eval()
        with torch.no_grad():
            self.inference = run()
        for module in modules:
            module.train()
        y = run()
        self.y = y.detach()
        wanted = [*maps, *([] if residual is None else [residual]), *flat_parameters(weights)]
        self.maps = len(wanted) - len(flat_parameters(weights))
        self.grads = torch.autograd.grad(y, wanted, inputs.g[0].double())
        self.case = case

    def tolerance(self, index: int | None = None) -> float:
        """The error that rounding may cause, relative to the largest value: a chain of roundings in the map's dtype, and the longest sum in fp32.

        index: of a gradient; None for y.
        """
        n, c, h, w = self.case.shape
        dtype = DTYPES[self.case.dtype]
        chain = 4 if index is None else 8
        terms = max(c, h * w) if index is None or index < self.maps else n * max(c, h * w)
        accumulation = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        return chain * torch.finfo(dtype).eps + 2 * accumulation * math.sqrt(terms)

    def scale(self, index: int) -> float:
        """What a gradient's error is measured against: its largest value, or for a single number, which may well be a sum that cancels, that of all
        parameters' gradients."""
        chosen = self.grads[self.maps :] if index >= self.maps and self.grads[index].numel() == 1 else self.grads[index : index + 1]
        return max(largest(t) for t in chosen)


def largest(t: Tensor) -> float:
    return t.abs().amax().item() if t.numel() else 0.0


def relative_error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest error over the scale, by default the largest value expected; infinite where shapes differ or something is not finite."""
    if got.shape != expected.shape:
        return math.inf
    error = largest(got.detach().double() - expected) / max(largest(expected) if scale is None else scale, 1e-30)
    return error if math.isfinite(error) else math.inf
