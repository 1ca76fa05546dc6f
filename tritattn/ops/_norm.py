"""A BatchNorm that trains, an activation or none, and the channel gate after them, in the same passes: the norm's gradients come from the pass that
the gate's takes, and without an activation its statistics from the one that squeezes. Neither map between them is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference, tuning
from .._library import Family
from .._spec import Spec
from . import _checks, _excite
from ._launch import Cotangent, Map, Norm, gate_forward, kernels, matrix
from ._networks import hooked

SAVED = ("mean", "var", "rest", "start", "apart", *_excite.RESULTS)


def _fake(x, w1, *rest) -> tuple[Tensor, ...]:
    n, c = x.shape[:2]
    acc, spec = reference.accumulator(x.dtype), rest[-1]
    statistics = (x.new_empty(shape, dtype=acc) for shape in (*[(c,)] * 4, (n, c) if spec.before == "none" else (0,)))
    return torch.empty_like(x), *statistics, *_excite.fake(x, w1, spec)


def _map(x, norm: Norm, spec: Spec) -> Map:
    return Map(x, norm=norm, before=spec.before, eps=spec.eps)


def _per_channel(m: Map) -> dict[str, Any]:
    """Tiles of the kernels that take the statistics of all images: programs enough, and few rows of them that follow each other."""
    # fewer programs than multiprocessors: no spills for the sake of a second on one
    return dict(BLOCK_N=min(tuning.power_of_two(m.n), 128), BLOCK_C=min(tuning.power_of_two(m.c), 16), ACC=m.acc_tl, **tuning.options(8, 248))


def _launch(x, w1, b1, w2, b2, weight, bias, residual, spec: Spec) -> tuple[Tensor, ...]:
    _, mean, var, rest, start, apart, *excited = _fake(x, w1, spec)
    out = _excite.Excited(*excited)
    linear = spec.before == "none"  # then the statistics are the squeeze
    m = _map(x, (weight, start, mean, var), spec)
    config = m.config("channel")
    part = m.small(m.n, config.splits, 3, m.c)
    kernels().channel_moments_kernel[(m.n * -(-m.c // config.block_c) * config.splits,)](
        x_ptr=m.x, part_ptr=part, SPLITS=config.splits, **m.args, **config.args
    )
    tiles, steps = _per_channel(m), -(-m.hw // config.block_p)
    kernels().norm_statistics_kernel[(-(-m.c // tiles["BLOCK_C"]),)](
        part, matrix(weight), matrix(bias), mean, var, rest, start, apart if linear else None, out.z if linear else None, m.n, m.c, m.hw,
        -(-steps // config.splits) * config.block_p, float(spec.eps), SPLITS=config.splits, **tiles,
    )  # fmt: skip
    params = [matrix(t) for t in (w1, b1, w2, b2)]
    if linear:
        _excite.excite(m, out, params, spec)
        y = gate_forward(m, out.logits, None, residual, spec)
    else:
        y, out = _excite.gated(m, params, residual, spec)
    return y, mean, var, rest, start, apart, *out


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    g, *dstatistics = grads
    dmean, dvar = (matrix(t) for t in dstatistics)
    x, *params, weight, bias, residual = inputs
    mean, var, rest, start, apart, *excited = saved
    m = _map(x, (weight, start, mean, var), spec)
    g = torch.zeros_like(x) if g is None else g
    cotangent = Cotangent(m, g, residual, spec)
    out = _excite.Excited(*excited)
    norm = m.prologue
    linear = spec.before == "none"
    # with five sums of a tile, those of two maps are too many
    config = m.config("channel", maps=2 if linear else 3)
    splits, count = config.splits, 2 if linear else 5
    part = m.small(m.n, splits, count, m.c)
    kernels().norm_gate_bwd_reduce_kernel[(m.n * -(-m.c // config.block_c) * splits,)](
        x_ptr=m.x, logits_ptr=out.logits, part_ptr=part, da_ptr=cotangent.da, SPLITS=splits, SUMS=count, GATE=spec.gate,
        STORE_DA=cotangent.da is not None, **cotangent.args(), **norm, **m.args, **config.args,
    )  # fmt: skip
    cotangent.stored()
    found: list[Tensor | None] = [None] * 8
    if needs[7]:
        found[7] = cotangent.residual_grad(m, g, residual)
    if not any(needs[:7]):
        return found
    sums, dlogits = m.small(m.n, 4, m.c), m.small(m.n, m.c)
    eps, tiles = norm["eps"], _per_channel(m)
    block_n, block_c = min(tuning.power_of_two(m.n), 4), min(tuning.power_of_two(m.c), 128)
    kernels().norm_gate_bwd_logits_kernel[(-(-m.n // block_n) * -(-m.c // block_c),)](
        part, out.logits, norm["bn_weight_ptr"], start, var, rest, apart if linear else None, sums, dlogits, m.n, m.c, m.hw, eps,
        SPLITS=splits, SUMS=count, BEFORE=spec.before, GATE=spec.gate, BLOCK_N=block_n, BLOCK_C=block_c, ACC=m.acc_tl, **tuning.options(4, 64),
    )  # fmt: skip
    dz, found[1:5] = _excite.backward(m, dlogits, params, out, spec, needs[1:5], needs[0] or needs[5] or needs[6])
    if dz is None:
        return found
    shift, slope = m.small(m.c), m.small(m.c)
    dweight, dbias = (None if t is None else t.new_empty(t.shape) for t in (weight, bias))
    kernels().norm_gate_bwd_statistics_kernel[(-(-m.c // tiles["BLOCK_C"]),)](
        sums, out.logits, dz, norm["bn_weight_ptr"], var, dmean, dvar, dweight, dbias, shift, slope, m.n, m.c, m.hw, eps, GATE=spec.gate, **tiles,
    )  # fmt: skip
    found[5:7] = dweight, dbias
    if needs[0]:
        dx, config = m.empty(), m.config("tile")
        kernels().norm_gate_bwd_input_kernel[(m.n * -(-m.c // config.block_c) * -(-m.hw // config.block_p),)](
            x_ptr=m.x, logits_ptr=out.logits, dz_ptr=dz, shift_ptr=shift, slope_ptr=slope, dx_ptr=dx, GATE=spec.gate, **cotangent.args(), **norm,
            **m.args, **config.args,
        )  # fmt: skip
        found[0] = m.output(dx)
    return found


def _reference(x, w1, b1, w2, b2, weight, bias, residual, spec: Spec) -> tuple[Tensor, ...]:
    wide = x.to(reference.accumulator(x.dtype))
    dims = (0, *range(2, x.dim()))
    mean = wide.mean(dims)
    apart = wide - reference.broadcast_channels(mean[None], x)
    var = apart.square().mean(dims)
    slope = (var + float(spec.eps)).rsqrt()
    u = apart * reference.broadcast_channels((slope if weight is None else slope * weight.to(wide.dtype))[None], x)
    if bias is not None:
        u = u + reference.broadcast_channels(bias.to(wide.dtype)[None], x)
    u = reference.HIDDEN[spec.before](u)
    logits = reference.broadcast_channels(_excite.plain(u, w1, b1, w2, b2, spec), u)
    return reference.gate(u, logits, gate=spec.gate, residual=residual, activation=spec.activation).to(x.dtype), mean, var


norm_gate = Family(
    "norm_gate",
    inputs=("x", *_excite.NAMES, "weight?", "bias?", "residual?"),
    outputs=("y", *SAVED),
    differentiable=3,
    saved=SAVED,
    batched=(),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
)


def trains(norm: Any, x: Tensor, spec: Spec) -> bool:
    """Whether norm is a BatchNorm that takes its statistics from x and does nothing else when called, and the squeeze is a mean."""
    return (
        isinstance(norm, _excite.Norm)
        and norm.num_features == x.shape[1]
        and (norm.training or norm.running_mean is None)
        and type(norm).forward is _excite.Norm.forward
        and not hooked(norm)
        and (norm.running_mean is None or norm.momentum is not None)
        and spec.pools == "avg"
        and x.numel() > x.shape[1]  # torch refuses one value per channel
        and norm_gate.reaches_kernels(x)
    )


def gated(x: Tensor, params: Sequence[Tensor | None], norm: Any, residual: Tensor | None, spec: Spec) -> Tensor:
    """The gated map of a norm that `trains`, whose running statistics are updated as a call of it does."""
    _checks.choice("before", spec.before, reference.HIDDEN)
    for t in (norm.weight, norm.bias):
        _checks.parameter("before_norm", t, x, (x.shape[1],))
    (eps,) = {norm.eps}  # through a set: dynamo writes no number into a string that it takes for dynamic
    y, mean, var = norm_gate(x, *params, norm.weight, norm.bias, residual, spec=spec._replace(eps=repr(eps)))
    if norm.running_mean is not None:
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
            for running, found, factor in ((norm.running_mean, mean, 1.0), (norm.running_var, var, count / (count - 1))):
                running.mul_(1 - norm.momentum).add_(found, alpha=norm.momentum * factor)
    return y
