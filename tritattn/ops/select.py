"""Selection among branches: selective kernels, whose branches are maps, and split attention, whose branches are slices of one map's channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._library import _without_autocast
from . import _checks, _excite
from ._launch import NO_NORM, NORM, Norm
from ._prologue import prepared
from ._select import POINTERS, Layers, SelectSpec, gate_reference, select, select_gate, select_squeeze, selection_weights
from .channel import RANKS

GATES = ("softmax", *reference.GATES)
Excite = Callable[[Tensor], Tensor]  # the mean of the branches' sum [N, C] -> logits [N, K C], in the order of the spec's groups


def attend(
    maps: Sequence[Tensor], excite: Excite, spec: SelectSpec, residual: Tensor | None, norm: Norm = NO_NORM, layers: Layers | None = None
) -> Tensor:
    """a(sum over k of w_k U_k + residual), w from excite(mean of the sum of U_k), which `layers` are where it is no more than they."""
    if len(maps) > POINTERS:
        return _attend_in_groups(maps, excite, spec, residual)
    inputs = (*maps, *(None,) * (POINTERS - len(maps)), *norm)
    if layers is not None:
        return select(*inputs, *layers, residual, spec=spec)
    z, slots = _squeeze(inputs, spec)
    return _gate(inputs, excite(z).to(z.dtype), residual, slots, spec)


def _squeeze(inputs: Sequence[Tensor | None], spec: SelectSpec) -> tuple[Tensor, list[Tensor]]:
    results = select_squeeze(*inputs, spec=spec)
    if isinstance(results, Tensor):
        return results, []
    z, *slots = results
    return z, slots


def _gate(inputs: Sequence[Tensor | None], logits: Tensor, residual: Tensor | None, slots: Sequence[Tensor], spec: SelectSpec) -> Tensor:
    if not slots:  # the squeeze took the reference
        return gate_reference(*inputs, logits, residual, None, None, spec)[0]
    return select_gate(*inputs, logits, residual, *slots, spec=spec)


def _attend_in_groups(maps: Sequence[Tensor], excite: Excite, spec: SelectSpec, residual: Tensor | None) -> Tensor:
    """With more maps than a launch takes: the sums of groups, each added to the ones before, and rounded, as its residual."""
    groups = [maps[i : i + POINTERS] for i in range(0, len(maps), POINTERS)]
    inputs = [(*group, *(None,) * (POINTERS - len(group) + len(NORM))) for group in groups]
    specs = [spec._replace(branches=len(group), gate="none", activation="none") for group in groups]
    squeezed = [_squeeze(*pair) for pair in zip(inputs, specs, strict=True)]
    z = sum((z for z, _ in squeezed[1:]), squeezed[0][0])
    weights = selection_weights(excite(z).to(z.dtype), spec).split([len(group) for group in groups], 1)
    specs[-1] = specs[-1]._replace(activation=spec.activation)
    for group, own, w, (_, slots) in zip(inputs, specs, weights, squeezed, strict=True):
        residual = _gate(group, w.flatten(1), residual, slots, own)
    assert residual is not None
    return residual


def _layers(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, norm: torch.nn.Module | None, hidden: str, x: Tensor, k: int, groups: int = 1
) -> tuple[Excite, Layers | None]:
    """What stands between squeeze and gate of k branches, checked, and the two layers that it is where it is no more; x is one of the branches."""
    c = x.shape[1]
    r = _checks.layer("w1", w1, x, None, c // groups)
    if r % groups:
        raise ValueError(f"w1: got shape {list(w1.shape)}, expected a multiple of {groups} rows, the cardinality")
    _checks.parameter("b1", b1, x, (r,))
    _checks.layer("w2", w2, x, k * c, r // groups)
    _checks.parameter("b2", b2, x, (k * c,))
    _checks.choice("hidden", hidden, reference.HIDDEN)
    if norm is not None and not isinstance(norm, torch.nn.Module):
        raise TypeError(f"norm: got {type(norm).__name__}, expected None or a module")

    first, between = (w1, b1), norm
    if _excite.plain_norm(norm):
        first, between = _excite.folded(w1, b1, norm, reference.accumulator(x.dtype)), None

    def excite(z: Tensor) -> Tensor:
        with _without_autocast(z.device.type):
            return reference.excite(z.unsqueeze(1), *first, w2, b2, kind="mlp", hidden=hidden, norm=between, groups=groups)

    return excite, (*first, w2, b2) if between is None and groups == 1 else None


def check_maps(x: Any) -> None:
    """A sequence of two or more maps, alike."""
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or len(x) < 2:
        given = f"{len(x)} maps" if isinstance(x, Sequence) else type(x).__name__
        raise TypeError(f"x: got {given}, expected a sequence of two or more")
    for k, t in enumerate(x):
        _checks.feature_map(t, ranks=RANKS, name=f"x[{k}]")
        _checks.alike(f"x[{k}]", t, x[0], "x[0]")


def check_slices(x: Tensor, radix: int, cardinality: int) -> None:
    """A map of `radix` slices, each in `cardinality` groups."""
    _checks.feature_map(x, ranks=RANKS)
    for name, value in (("radix", radix), ("cardinality", cardinality)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected a positive integer")
    if x.shape[1] % (radix * cardinality):
        raise ValueError(f"x: got shape {list(x.shape)}, expected a multiple of radix * cardinality = {radix * cardinality} channels")


def select_maps(
    x: Sequence[Tensor], excite: Excite, residual: Tensor | None, gate: str, before: str, activation: str, layers: Layers | None = None,
    hidden: str = "none",
) -> Tensor:  # fmt: skip
    """`sk` of checked maps, with any excite."""
    spec = SelectSpec(len(x), gate=gate, before=before, activation=activation, hidden=hidden)
    _check_options(x[0], spec, residual)
    return attend(x, excite, spec, residual, layers=layers)


def select_slices(
    x: Tensor, excite: Excite, residual: Tensor | None, radix: int, cardinality: int, gate: str | None, before: str, norm: Any, activation: str,
    layers: Layers | None = None, hidden: str = "none",
) -> Tensor:  # fmt: skip
    """`splat` of a checked map, with any excite."""
    (radix,), (cardinality,) = {radix}, {cardinality}  # through sets: dynamo writes no number into a string that it takes for dynamic
    spec = SelectSpec(radix, True, cardinality, gate or ("softmax" if radix > 1 else "sigmoid"), before, activation, hidden=hidden)
    _check_options(x.narrow(1, 0, x.shape[1] // radix), spec, residual)
    x, first, spec = prepared(x, norm, spec)
    return attend((x,), excite, spec, residual, first, layers)


def _check_options(y: Tensor, spec: SelectSpec, residual: Tensor | None) -> None:
    _checks.choice("gate", spec.gate, GATES)
    _checks.choice("before", spec.before, reference.HIDDEN)
    _checks.choice("activation", spec.activation, reference.ACTIVATIONS)
    _checks.residual(residual, y, of="y")


def sk(
    x: Sequence[Tensor], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, norm: torch.nn.Module | None = None,
    hidden: str = "relu", gate: str = "softmax", before: str = "none", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Selection of Selective Kernel Networks (Li et al., 2019, arXiv:1903.06586): y = a(sum over k of w_k b(x_k) + residual),
    w = softmax over k of w2 h(norm(w1 z + b1)) + b2, z the mean over positions of sum over k of b(x_k).

    The maps are read for the sum and for y, without being stacked or summed in memory; for more than four, each further four read and write y once
    more. Equal to timm's SelectiveKernel after its convolutions, and to the authors'; External-Attention-pytorch's has neither norm nor h.

    Args:
        x: K >= 2 maps [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64.
        w1: [R, C] or the 1x1 convolution's [R, C, 1, ...]; b1: [R] or None; w2: [K C, R] likewise, branch after branch; b2: [K C] or None.
        norm: a module on [N, R, 1, 1], such as a BatchNorm2d(R).
        hidden: h, one of none, relu, relu6, leaky_relu (slope 0.01), silu, hardswish, gelu.
        gate: softmax, or of each logit sigmoid, hard_sigmoid, relu, none. before: b, the branches' activation, one of those of `hidden`.
        residual: of a map's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu (erf).

    Returns: y, the maps' dtype, with the strides of torch.empty_like(x[0]).
    Raises: TypeError for a wrong dtype or layout, ValueError for a wrong shape, device or option; both name the argument.
    """
    check_maps(x)
    excite, layers = _layers(w1, b1, w2, b2, norm, hidden, x[0], len(x))
    return select_maps(x, excite, residual, gate, before, activation, layers, hidden)


def splat(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, radix: int = 2, cardinality: int = 1,
    norm: torch.nn.Module | None = None, hidden: str = "relu", gate: str | None = None, before: str = "relu",
    before_norm: torch.nn.Module | None = None, residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Split attention of ResNeSt (Zhang et al., 2020, arXiv:2004.08955): y = a(sum over r of w_r u_r + residual), u_r the `radix` slices of the
    channels of b(before_norm(x)), w = softmax over r of fc2 h(norm(fc1 z)), or with radix 1 its sigmoid, z the mean over positions of the sum of u_r.

    Numbers and order of channels are those of the authors' code and of timm; unlike theirs, the result of a channels_last map is channels_last.

    Args:
        x: [N, radix C, *spatial] with one to three spatial dimensions, radix-major; float32, float16, bfloat16 or float64.
        w1: fc1, in `cardinality` groups: [R, C / cardinality] or a 1x1 convolution's; b1: [R] or None; w2: fc2, [radix C, R / cardinality]; b2.
        norm, hidden: as in `sk`.
        gate: of the logits; None for softmax, with radix 1 sigmoid.
        before: b, one of those of `hidden`. before_norm: a module on x before it; a BatchNorm2d(radix C) in eval is part of the passes, as long as
            its parameters need no gradient, every other is called.
        residual: of y's shape [N, C, *spatial]. activation: a, as in `sk`.

    Returns: y [N, C, *spatial], x's dtype, with the strides of torch.empty_like(x[:, :C]).
    Raises: as `sk`.
    """
    check_slices(x, radix, cardinality)
    excite, layers = _layers(w1, b1, w2, b2, norm, hidden, x.narrow(1, 0, x.shape[1] // radix), radix, cardinality)
    return select_slices(x, excite, residual, radix, cardinality, gate, before, before_norm, activation, layers, hidden)
