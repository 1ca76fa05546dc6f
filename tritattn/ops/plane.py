"""Gates of single planes: SimAM and shuffle attention. One autograd node, one launch forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._library import Family
from . import _checks
from ._launch import Cotangent, Map, counters, kernels, matrix

RANKS = (3, 4, 5)
PARAMETERS = ("cweight", "cbias", "sweight", "sbias", "norm_weight", "norm_bias")


class PlaneSpec(NamedTuple):
    """groups: of the shuffled map; 0 for SimAM. eps: of the normalisation, or SimAM's e_lambda."""

    groups: int
    eps: str
    gate: str = "sigmoid"
    activation: str = "none"


def _fake(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, spec: PlaneSpec) -> tuple[Tensor, ...]:
    return torch.empty_like(x), x.new_empty((x.shape[0], 2, x.shape[1]), dtype=reference.accumulator(x.dtype))


def _arguments(m: Map, params: Sequence[Tensor | None], spec: PlaneSpec, both: bool = True) -> tuple[tuple[int], dict[str, Any], bool]:
    """(grid, what both kernels take, whether the planes are read twice, if `both` passes are made); see kernels/plane_ticket.py."""
    config = m.config("shuffled_plane" if spec.groups else "plane")
    # a shuffled row of channels comes in pairs
    block_c = max(config.block_c, 2) if spec.groups and m.channels_last else config.block_c
    groups = m.n * -(-m.c // block_c)
    args = dict(
        **{f"{name}_ptr": matrix(t) for name, t in zip(PARAMETERS, params, strict=True)}, **m.args,
        per_group=m.c // spec.groups if spec.groups else m.c, SHUFFLE=spec.groups > 0, HAS_AFFINE=params[4] is not None, EPS=float(spec.eps),
        GATE=spec.gate, BLOCK_C=block_c, BLOCK_P=config.block_p, **config.options,
    )  # fmt: skip
    if config.block_p >= m.hw:
        return (groups,), args, False
    tickets = config.lag > 0
    splits = config.splits if tickets else 1
    lag = config.lag if both else 0
    args.update(
        groups=groups, lag=lag, SPLITS=splits, TICKETS=tickets, counter_ptr=counters(m.x, 2 * groups + 1) if tickets else None
    )  # fmt: skip
    return ((groups + lag) * splits * (1 + both) if tickets else groups,), args, True


def _slots(m: Map, args: dict[str, Any]) -> Tensor | None:
    """Two sums of each range of positions of each channel."""
    return m.small(m.n, args["SPLITS"], 2, m.c) if args["SPLITS"] > 1 else None


def _launch(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, spec: PlaneSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    y, moments = m.empty(), m.small(m.n, 2, m.c)
    grid, args, twice = _arguments(m, (cweight, cbias, sweight, sbias, norm_weight, norm_bias), spec)
    kernel = kernels().plane_gate_fwd_kernel
    if twice:
        kernel, args["part_ptr"] = kernels().plane_ticket_fwd_kernel, _slots(m, args)
    kernel[grid](
        x_ptr=m.x, residual_ptr=m.same(residual), y_ptr=y, moments_ptr=moments, HAS_RESIDUAL=residual is not None, ACTIVATION=spec.activation, **args
    )
    return m.output(y), moments


def _backward(grads, inputs, saved, spec: PlaneSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, *params, residual = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    if not needs[7]:
        cotangent.da = None
    found: list[Tensor | None] = [None] * 8
    if any(needs[:7]) or cotangent.da is not None:
        dx = m.empty() if needs[0] else None
        grid, args, twice = _arguments(m, params, spec, dx is not None)
        part = m.small(m.n, 2, m.c) if twice or any(needs[1:7]) else None
        kernel = kernels().plane_gate_bwd_kernel
        if twice:
            kernel, args["slots_ptr"] = kernels().plane_ticket_bwd_kernel, _slots(m, args)
        else:
            args["STORE_PART"] = part is not None
        kernel[grid](
            x_ptr=m.x, moments_ptr=saved[0], da_ptr=cotangent.da, dx_ptr=dx, part_ptr=part, STORE_DA=cotangent.da is not None,
            STORE_DX=dx is not None, **args, **cotangent.args(),
        )  # fmt: skip
        found[0] = None if dx is None else m.output(dx)
        if part is not None and any(needs[1:7]):
            found[1:7] = _parameter_grads(part, params, spec, needs[1:7])
        if cotangent.da is not None:
            cotangent.stored()
    if needs[7]:
        found[7] = cotangent.residual_grad(m, g, residual)
    return found


def _parameter_grads(part: Tensor, params: Sequence[Tensor | None], spec: PlaneSpec, needs: Sequence[bool]) -> list[Tensor | None]:
    """From the sums over each plane, by half of a group: dt, and dt times the mean or the normalised value."""
    n, _, c = part.shape
    half = c // (2 * spec.groups)
    plain, scaled = part.view(n, 2, spec.groups, 2, half).sum((0, 2))  # [half of a group, channel in it]
    _, _, sweight, _, gamma, beta = params
    assert sweight is not None
    weight = sweight.to(part.dtype).flatten()
    dsweight = scaled[1] if gamma is None else scaled[1] * gamma.to(part.dtype)
    if beta is not None:
        dsweight = dsweight + plain[1] * beta.to(part.dtype)
    found = (scaled[0], plain[0], dsweight, plain[1], scaled[1] * weight, plain[1] * weight)
    # of their own memory: an op may not return two views of one tensor
    return [torch.empty_like(p).copy_(t.view(p.shape)) if p is not None and need else None for t, p, need in zip(found, params, needs, strict=True)]


def _reference(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, spec: PlaneSpec) -> tuple[Tensor, ...]:
    wide = x.to(reference.accumulator(x.dtype))
    gate = reference.GATES[spec.gate]
    if not spec.groups:
        gated = wide * gate(reference.plane_energy(wide, float(spec.eps)))
        return (reference.finish(gated, x, residual, spec.activation),)
    over = (-1, *(1,) * (x.dim() - 2))
    cweight, cbias, sweight, sbias, norm_weight, norm_bias = (
        None if t is None else t.to(wide.dtype).reshape(over) for t in (cweight, cbias, sweight, sbias, norm_weight, norm_bias)
    )
    first, second = wide.unflatten(1, (spec.groups, 2, -1)).unbind(2)  # [N, G, C / 2G, ...]
    dims = tuple(range(3, first.dim()))
    logits = cweight * first.mean(dims, keepdim=True) + cbias
    apart = second - second.mean(dims, keepdim=True)
    normed = apart * (apart.square().mean(dims, keepdim=True) + float(spec.eps)).rsqrt()
    if norm_weight is not None:
        normed = norm_weight * normed + norm_bias
    gated = torch.stack([first * gate(logits), second * gate(sweight * normed + sbias)], 2)
    shuffled = gated.flatten(1, 3).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():  # in x's layout, which elementwise operators keep
        shuffled = shuffled.movedim(1, -1).contiguous().movedim(-1, 1)
    return (reference.finish(shuffled, x, residual, spec.activation),)


plane_gate = Family(
    "plane_gate",
    inputs=("x", *(f"{name}?" for name in PARAMETERS), "residual?"),
    outputs=("y", "moments"),
    differentiable=1,
    saved=("moments",),
    batched=("x", "residual"),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
    spec=PlaneSpec,
)


def _common(x: Tensor, gate: str, residual: Tensor | None, activation: str, name: str, eps: float) -> None:
    _checks.feature_map(x, ranks=RANKS)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    if not eps > 0:
        raise ValueError(f"{name}: got {eps!r}, expected a positive number")


def simam(
    x: Tensor, *, e_lambda: float = 1e-4, gate: str = "sigmoid", residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """SimAM (Yang et al., 2021, PMLR 139: 11863-11874): y = a(x * f(d / (4 (sum d / (M - 1) + e_lambda)) + 1/2) + residual), d = (x - mean)^2, with
    mean and sum over the M positions of each plane. No parameters.

    One launch each way. The map is read once while a plane fits on chip: up to 8192 positions of a contiguous map (4096 in fp64), 256 of a
    channels-last one (512 in fp32); a larger plane is read twice, the second time from L2.

    Args: x: [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64; e_lambda: positive; gate: f, one of
    sigmoid, hard_sigmoid, relu, none; residual: of x's shape and dtype; activation: a, one of none, relu, silu, hardswish, gelu. Planes of a single
    position give NaN, as in the authors' code, whose M - 1 divides by zero.
    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _common(x, gate, residual, activation, "e_lambda", e_lambda)
    return plane_gate(x, *(None,) * 6, residual, spec=PlaneSpec(0, _text(e_lambda), gate, activation))


def shuffle(
    x: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor, sbias: Tensor, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None,
    *, groups: int = 64, eps: float = 1e-5, gate: str = "sigmoid", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Shuffle attention (Zhang & Yang, 2021, arXiv:2102.00039): y = a(channel_shuffle(gated x, 2) + residual).

    Each of `groups` groups of channels is cut into two halves; the first is gated per plane, x * f(cweight mean(x) + cbias), the second per position,
    x * f(sweight n(x) + sbias), with n(x) each plane normalised by its own mean and variance (+ eps), times norm_weight plus norm_bias. Output
    channel 2 i is channel i of the gated map and 2 i + 1 is channel i + C / 2. One launch each way; the map is read once while a plane fits on chip:
    as in `simam`, but up to 128 positions of a channels-last map (256 in fp32).

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions, C divisible by 2 groups; float32, float16, bfloat16 or float64.
        cweight, cbias, sweight, sbias: [1, C / (2 groups), 1, 1] or [C / (2 groups)]; norm_weight, norm_bias: [C / (2 groups)], both or none.
        gate: f, one of sigmoid, hard_sigmoid, relu, none. residual: of x's shape and dtype, added to the shuffled map.
        activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x); the authors' code returns a contiguous map for a channels-last one. Raises
    TypeError and ValueError naming the argument.
    """
    _common(x, gate, residual, activation, "eps", eps)
    c = x.shape[1]
    (groups,) = {groups}  # through a set, since dynamo has no text of an integer that it takes for dynamic
    if groups < 1 or c % (2 * groups):
        raise ValueError(f"groups: got {groups}, expected a positive number whose double divides the {c} channels of x")
    k = c // (2 * groups)
    for name, t in zip(PARAMETERS, (cweight, cbias, sweight, sbias), strict=False):
        _checks.required(name, t)
        _checks.parameter(name, t, x, (1, k, 1, 1), (k,))
    _checks.parameter("norm_weight", norm_weight, x, (k,))
    _checks.parameter("norm_bias", norm_bias, x, (k,))
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError(f"norm_bias: got {'None' if norm_bias is None else 'a tensor'}, expected norm_weight and norm_bias both or neither")
    spec = PlaneSpec(groups, _text(eps), gate, activation)
    return plane_gate(x, cweight, cbias, sweight, sbias, norm_weight, norm_bias, residual, spec=spec)


def _text(number: float) -> str:
    (number,) = {number}  # through a set, since dynamo has no repr of a float that it takes for dynamic
    return repr(number)
