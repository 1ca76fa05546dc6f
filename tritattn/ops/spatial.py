"""CBAM and its spatial half: statistics over channels, a k x k convolution, perhaps a BatchNorm, and the gate.

A torch module (BatchNorm in training) may stand between squeeze and gate, so these are two ops, `spatial_squeeze` and `spatial_gate`. As a relay they
still write the map's gradient once: the gate hands da on instead of a dx of its own, and the squeeze adds everything up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _replay, reference, tuning
from .._library import Family
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from . import _checks, _excite
from ._launch import Cotangent, Map, gate_backward_channel, gate_backward_column, gate_backward_input, gate_forward, kernels, matrix
from .channel import MAX_GRADS, _refuse_epilogue, mlp_kind, pool_names
from .gate import gate_family

ORDERS = ("mean_max", "max_mean", "mix")
INPUTS = ("x", *_excite.NAMES, "weight?", "bias?", "bn_weight?", "bn_bias?", "bn_mean?", "bn_var?")

# -- the squeeze -----------------------------------------------------------------------------------------------------------------------------


def _logits_dtype(x: Tensor, spec: Spec) -> torch.dtype:
    """fp32 (fp64 for fp64 maps), or what a BatchNorm that follows computes in."""
    return getattr(torch, spec.out) if spec.out else reference.accumulator(x.dtype)


def _fake(x, w1, b1, w2, b2, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: Spec) -> tuple[Tensor, ...]:
    n, _, h, w = x.shape
    acc = reference.accumulator(x.dtype)
    excited = _excite.fake(x, w1, spec)
    if spec.kind == "none":
        excited = _excite.Excited(*(t.new_empty(0) for t in excited))
    stats = x.new_empty((n, 2, h, w), dtype=acc)
    spatial = x.new_empty((n, 1, h, w), dtype=_logits_dtype(x, spec)) if weight is not None else torch.empty_like(stats)
    slots = RelaySqueeze.slot(x), RelaySqueeze.slot(spatial)
    return spatial, excited[0], *slots, *excited[1:], stats, x.new_empty((n, h, w), dtype=torch.int32)


def _launch(x, w1, b1, w2, b2, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: Spec) -> tuple[Tensor, ...]:
    m = Map(x)
    spatial, logits, map_slot, spatial_slot, *excited, stats, aux = _fake(
        m.x, w1, b1, w2, b2, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec
    )  # fmt: skip
    if spec.kind != "none":
        logits, *excited = _squeeze_both(m, (w1, b1, w2, b2), stats, aux, spec)
    else:
        _squeeze_positions(m, logits, stats, aux, spec)
    rest = (logits, map_slot, spatial_slot, *excited, stats, aux)
    if weight is None:
        return stats.clone(), *rest
    _convolution_launch(stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spatial, spec)
    return spatial, *rest


def _squeeze_positions(m: Map, logits: Tensor, stats: Tensor, aux: Tensor, spec: Spec) -> None:
    config = m.config("column")
    kernels().spatial_squeeze_fwd_kernel[(m.n * -(-m.hw // config.block_p),)](
        m.x, logits, stats, aux, **m.args, GATE=spec.gate, HAS_CHANNEL=spec.kind != "none", EVEN=spec.max_grad == "even",
        **config.args,
    )  # fmt: skip


def _squeeze_both(m: Map, params: Sequence[Tensor | None], stats: Tensor, aux: Tensor, spec: Spec) -> _excite.Excited:
    """Channels, then the positions of the gated map: one launch while the excite's weights are small, see kernels/ticket.py."""
    w1, b1, w2, b2 = (matrix(t) for t in params)
    config, column = m.config("ticket"), m.config("column")
    # about as much of an image in each program as in one that squeezes channels, in rows of 64 bytes
    size = m.x.element_size()
    block_p = min(column.block_p, max(64 // size, tuning.power_of_two(tuning.TICKET_BYTES // (m.c * size))))
    ticket = _excite.ticketed(m, w1, w2, -(-m.hw // block_p))
    if ticket is None:
        excited = _excite.forward(m, w1, b1, w2, b2, spec, one_launch=True)
        _squeeze_positions(m, excited.logits, stats, aux, spec)
        return excited
    grid, args = ticket
    excited = _excite.fake(m.x, w1, spec)
    kernels().both_squeezes_ticket_fwd_kernel[grid](
        **_excite.arguments(m, excited, (w1, b1, w2, b2), spec, config, True), **args, stats_ptr=stats, saux_ptr=aux, GATE=spec.gate,
        OTHER_C=max(1, min(tuning.power_of_two(m.c), config.block_c * config.block_p // block_p)), OTHER_P=block_p,
    )  # fmt: skip
    return excited


def _convolution_launch(stats: Tensor, weight: Tensor, bias, bn_weight, bn_bias, bn_mean, bn_var, spatial: Tensor, spec: Spec) -> None:
    """The convolution of (mean, max) [N, 2, H, W], and a BatchNorm folded into it, into `spatial` [N, 1, H, W]."""
    n, _, height, width = stats.shape
    block_h, block_w = tuning.power_of_two(height) if height <= 16 else 8, min(128, tuning.power_of_two(width))
    mean_at, max_at = {"mean_max": (0, 1), "max_mean": (1, 0), "mix": (0, 0)}[spec.order]
    k = kernels()
    k.spatial_convolution_fwd_kernel[(n * -(-height // block_h) * -(-width // block_w),)](
        stats, weight.contiguous(), bias, bn_weight, bn_bias, bn_mean, bn_var, spatial, height, width, float(spec.eps or 0), MEAN_AT=mean_at,
        MAX_AT=max_at, TAPS=weight.shape[-1], HAS_BIAS=bias is not None, HAS_BN=bn_mean is not None,
        BLOCK_H=block_h, BLOCK_W=block_w, ACC=k.tl.float64 if stats.dtype == torch.float64 else k.tl.float32, num_warps=4,
    )  # fmt: skip


def _ordered(stats: Tensor, order: str) -> Tensor:
    """(mean, max) [N, 2, H, W] -> the convolution's input."""
    if order == "mix":
        return 0.5 * stats[:, :1] + 0.5 * stats[:, 1:]
    return stats if order == "mean_max" else stats.flip(1)


def _convolution_gradients(g: Tensor, source: Tensor, kernel: Tensor, pad: int, need_source: bool, need_kernel: bool) -> tuple[Tensor, Tensor]:
    # the same bits every time, and no TF32, which would cost half of the digits of a gradient that is a handful of numbers
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        return torch.ops.aten.convolution_backward(
            g, source, kernel, None, (1, 1), (pad, pad), (1, 1), False, (0, 0), 1, (need_source, need_kernel, False)
        )[:2]


def _convolution_backward(g: Tensor, stats: Tensor, inputs: Sequence[Tensor | None], spec: Spec, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of (stats, weight, bias, bn_weight, bn_bias). The folded BatchNorm is affine: its own gradients follow from the convolution's."""
    weight, bias, bn_weight, bn_bias, bn_mean, bn_var = inputs
    assert weight is not None
    g = g.to(stats.dtype)
    kernel = weight.to(stats.dtype)
    pad = weight.shape[-1] // 2
    source = _ordered(stats, spec.order) if spec.order == "mix" else stats
    if spec.order == "max_mean":
        kernel = kernel.flip(1)  # instead of the statistics
    dsource, dkernel = _replay.operator(_convolution_gradients, g, source, kernel, pad, needs[0], any(needs[1:]))
    total = g.sum() if any(needs[2:]) else None
    scale: Tensor | None = None
    dbn_weight = dbn_bias = None
    if bn_mean is not None:
        assert bn_var is not None
        rstd = (bn_var.to(g.dtype) + float(spec.eps)).rsqrt()
        scale = rstd
        dbn_bias = total
        if bn_weight is not None and total is not None:
            raw = (kernel * dkernel).sum() + total * ((bias.to(g.dtype) if bias is not None else 0) - bn_mean.to(g.dtype))
            dbn_weight = rstd * raw
        if bn_weight is not None:
            scale = rstd * bn_weight.to(g.dtype)
    if spec.order == "max_mean" and needs[1]:
        dkernel = dkernel.flip(1)
    if scale is not None:
        dsource, dkernel, total = (None if t is None else t * scale for t in (dsource, dkernel, total))
    if spec.order == "mix" and needs[0]:
        dsource = (0.5 * dsource).expand(-1, 2, -1, -1)
    return [
        dsource.contiguous() if needs[0] else None,
        dkernel.to(weight.dtype) if needs[1] else None,
        _like(total, bias) if needs[2] else None,
        _like(dbn_weight, bn_weight) if needs[3] else None,
        _like(dbn_bias, bn_bias) if needs[4] else None,
    ]


def _like(t: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if t is None or parameter is None else t.to(parameter.dtype).view(parameter.shape)


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """With da (what flows through the gate) and the gate's spatial logits, dx also holds the gate's share; dlogits comes in complete."""
    dspatial, dlogits, da, spatial = grads
    x, *params = inputs
    logits, z, hidden, aux, stats, saux = saved
    m = Map(x)
    channel = spec.kind != "none"
    found: list[Tensor | None] = [None] * len(inputs)
    upstream = any(needs[:5])
    dstats = None
    if dspatial is not None:
        if inputs[5] is None:
            dstats = dspatial.contiguous()
        else:
            dstats, *found[5:9] = _convolution_backward(dspatial, stats, inputs[5:], spec, (upstream, *needs[5:9]))
    if not upstream:
        return found
    statistics = None if dstats is None else (stats, dstats, saux)
    dz = None
    if channel:
        if statistics is not None:
            extra = None if dlogits is None else dlogits.contiguous()
            dlogits = gate_backward_channel(m, logits, spec, spatial=statistics, extra=extra)
        if dlogits is not None:
            excited = _excite.Excited(logits, z, hidden, aux)
            dz, found[1:5] = _excite.backward(m, dlogits.contiguous(), params[:4], excited, spec, needs[1:5], needs[0])
    if needs[0]:
        cotangent = None if da is None else Cotangent(m, da, None, Spec())
        found[0] = gate_backward_input(
            m, spec, cotangent=cotangent, logits=logits if channel else None,
            spatial=None if spatial is None else spatial.contiguous(), statistics=statistics, pooled=None if dz is None else (z, dz, aux),
        )  # fmt: skip
    return found


def _reference(x, w1, b1, w2, b2, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: Spec) -> tuple[Tensor, ...]:
    acc = reference.accumulator(x.dtype)
    logits = x.new_empty(0, dtype=acc)
    u = x.to(acc)
    if spec.kind != "none":
        logits = _excite.plain(x, w1, b1, w2, b2, spec)
        u = u * reference.GATES[spec.gate](reference.broadcast_channels(logits, x))
    stats = reference.spatial_statistics(u, max_grad=spec.max_grad)
    if weight is None:
        return stats, logits
    return _convolution_reference(stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec)[0], logits


def _convolution_reference(stats: Tensor, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: Spec) -> tuple[Tensor, ...]:
    spatial = reference.spatial_convolution(_ordered(stats, spec.order), weight, bias)
    if bn_mean is not None:
        affine = [None if t is None else t.to(stats.dtype) for t in (bn_mean, bn_var, bn_weight, bn_bias)]
        spatial = F.batch_norm(spatial, *affine, training=False, eps=float(spec.eps))  # type: ignore[arg-type, misc]
    return (spatial.to(_logits_dtype(stats, spec)),)


def _share(da: Tensor, inputs: Sequence[Any], spatial: Tensor | None, spec: Spec) -> tuple[Tensor, ...]:
    """The gate's share of dx: da f(logits) h(spatial)."""
    x, w1, b1, w2, b2, *_ = inputs
    logits = _excite.plain(x, w1, b1, w2, b2, spec) if spec.kind != "none" else None
    return gate_family.reference(da, logits, spatial, None, None, spec._replace(activation="none"))


spatial_squeeze = RelaySqueeze(
    "spatial_squeeze",
    inputs=INPUTS,
    outputs=("spatial", "logits", "map_slot", "spatial_slot", *_excite.RESULTS[1:], "stats", "saux"),
    differentiable=4,
    saved=(*_excite.RESULTS, "stats", "saux"),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
    share=_share,
)

# -- the convolution alone, of statistics that another squeeze took ----------------------------------------------------------------------------


def _alone_launch(stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: Spec) -> tuple[Tensor, ...]:
    spatial = stats.new_empty((stats.shape[0], 1, *stats.shape[2:]), dtype=_logits_dtype(stats, spec))
    _convolution_launch(stats.contiguous(), weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spatial, spec)
    return (spatial,)


spatial_convolution = Family(
    "spatial_convolution",
    inputs=("stats", *INPUTS[5:]),
    outputs=("spatial",),
    differentiable=1,
    saved=(),
    batched=("stats",),
    fake=lambda stats, weight, bias, bn_weight, bn_bias, bn_mean, bn_var, spec: (
        stats.new_empty((stats.shape[0], 1, *stats.shape[2:]), dtype=_logits_dtype(stats, spec)),
    ),
    launch=_alone_launch,
    backward=lambda grads, inputs, saved, spec, needs: [
        *_convolution_backward(grads[0], inputs[0].contiguous(), inputs[1:], spec, needs), None, None
    ],
    reference=_convolution_reference,
)  # fmt: skip

# -- the gate --------------------------------------------------------------------------------------------------------------------------------


def _gate_launch(x, channel, spatial, residual, map_slot, spatial_slot, channel_slot, spec: Spec) -> tuple[Tensor, ...]:
    return (gate_forward(Map(x), matrix(channel), spatial.contiguous(), residual, spec),)


def _gate_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da, the gradients of the channel logits and of the spatial logits."""
    (g,) = grads
    x, channel, spatial, residual, *_ = inputs
    m = Map(x)
    cotangent = Cotangent(m, g, residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    dtype = None if channel is None else channel.dtype
    dspatial, dchannel = gate_backward_column(m, matrix(channel), spatial.contiguous(), spec, cotangent, dtype=dtype)
    da = cotangent.da
    return None if da is None else m.output(da), dchannel, dspatial, None, None, None, None


def _gate_reference(x, channel, spatial, residual, map_slot, spatial_slot, channel_slot, spec: Spec) -> tuple[Tensor, ...]:
    return gate_family.reference(x, channel, spatial, None, residual, spec)


spatial_gate = RelayGate(
    "spatial_gate",
    inputs=("x", "channel?", "spatial", "residual?", "map_slot?", "spatial_slot?", "channel_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "channel", "spatial", "residual", "map_slot", "spatial_slot", "channel_slot"),
    fake=lambda x, channel, spatial, residual, map_slot, spatial_slot, channel_slot, spec: (torch.empty_like(x),),
    launch=_gate_launch,
    backward=_gate_backward,
    reference=_gate_reference,
)

# -- public functions ------------------------------------------------------------------------------------------------------------------------

def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Any, order: str, max_grad: str) -> None:
    _checks.feature_map(x)
    _checks.choice("order", order, ORDERS)
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    check_convolution(x, weight, bias, norm, 1 if order == "mix" else 2)


def check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Any, channels: int, of: str = "") -> None:
    """`of`: what the names of the arguments begin with, where there are several convolutions."""
    _checks.required(f"{of}weight", weight)
    if weight.dim() != 4 or weight.shape[-1] % 2 == 0:
        raise ValueError(f"{of}weight: got shape {list(weight.shape)}, expected [1, {channels}, k, k] with k odd")
    k = weight.shape[-1]
    _checks.parameter(f"{of}weight", weight, x, (1, channels, k, k))
    _checks.parameter(f"{of}bias", bias, x, (1,))
    if norm is not None and (not isinstance(norm, _excite.Norm) or norm.num_features != 1):
        raise TypeError(f"{of}norm: got {type(norm).__name__}, expected None or a BatchNorm2d or SyncBatchNorm with one feature")


def fold(norm: Any, x: Tensor, spec: Spec) -> tuple[tuple[Tensor | None, ...], Spec, Any]:
    """(weight, bias, running mean and variance to fold into the convolution, the options, what is left of norm to call after it)."""
    if norm is not None and _excite.plain_norm(norm):
        (eps,) = {norm.eps}  # through a set, since dynamo has no repr of a float that it takes for dynamic
        return (norm.weight, norm.bias, norm.running_mean, norm.running_var), spec._replace(eps=repr(eps)), None
    if norm is not None and norm.weight is not None and norm.weight.dtype != reference.accumulator(x.dtype):
        spec = spec._replace(out=str(norm.weight.dtype).removeprefix("torch."))
    return (None,) * 4, spec, norm


def _attend(
    x: Tensor, params: tuple[Tensor | None, ...], weight: Tensor, bias: Tensor | None, norm: Callable[[Tensor], Tensor] | None, spec: Spec,
    residual: Tensor | None, apply: bool = True,
) -> Tensor:  # fmt: skip
    folded, spec, norm = fold(norm, x, spec)
    inputs = (x, *params, weight, bias, *folded)
    spatial, logits, *slots = spatial_squeeze(*inputs, spec=spec)
    if norm is not None:
        spatial = norm(spatial)
    if not apply:
        return reference.GATES[spec.spatial_gate](spatial).to(x.dtype)
    channel = logits if spec.kind != "none" else None
    if not slots:  # the squeeze took the reference
        return gate_family(x, channel, spatial, None, residual, spec=spec)
    return spatial_gate(x, channel, spatial, residual, *slots, None, spec=spec)


def spatial_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: torch.nn.Module | None = None, order: str = "mean_max", gate: str = "sigmoid",
    max_grad: str = "first", apply: bool = True, residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Spatial half of CBAM (Woo et al., 2018, arXiv:1807.06521): y = a(x * f(norm(conv([mean_c x, max_c x]))) + residual).

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        weight: [1, 2, k, k], k odd, 'same' padding; [1, 1, k, k] for order="mix". bias: [1] or None.
        norm: a BatchNorm2d(1) or SyncBatchNorm(1) module, called in training so that its statistics move, folded into the convolution in eval.
        order: channels of the convolution's input: "mean_max", "max_mean" (the authors' code), or "mix", (mean + max) / 2 alone.
        gate: f, one of sigmoid, hard_sigmoid, relu, none. max_grad: "first" (the first channel of the maximum) or "even" (shared among ties).
        apply: False returns the gate [N, 1, H, W] instead of the gated map.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _check(x, weight, bias, norm, order, max_grad)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    spec = Spec(spatial_gate=gate, order=order, max_grad=max_grad, activation=activation)
    if not apply:
        _refuse_epilogue(residual, activation)
    return _attend(x, (None,) * 4, weight, bias, norm, spec, residual, apply)


def cbam(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, weight: Tensor, bias: Tensor | None = None, *,
    norm: torch.nn.Module | None = None, pools: Sequence[str] = ("avg", "max"), hidden: str = "relu", gate: str = "sigmoid",
    spatial_gate: str = "sigmoid", order: str = "mean_max", max_grad: str = "first", residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Convolutional Block Attention Module (Woo et al., 2018, arXiv:1807.06521): u = x * s, y = a(u * m + residual), with s the gate of
    `channel_attention` and m that of `spatial_attention` on u; u is never stored.

    w1, b1, w2, b2, pools, hidden, gate as in `channel_attention`; weight, bias, norm, order, spatial_gate as in `spatial_attention`; max_grad for
    both. The authors' code feeds the convolution [max, mean] and normalises it; several others use [mean, max] without a BatchNorm.
    """
    _check(x, weight, bias, norm, order, max_grad)
    _checks.choice("spatial_gate", spatial_gate, reference.GATES)
    _checks.choice("gate", gate, reference.GATES)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    kind = mlp_kind(x, w1, b1, w2, b2, hidden)
    spec = Spec(pool_names(pools), kind, hidden, gate, spatial_gate, order, max_grad=max_grad, activation=activation)
    return _attend(x, (w1, b1, w2, b2), weight, bias, norm, spec, residual)


def spatial_statistics(x: Tensor, kinds: Sequence[str] = ("mean", "max"), *, max_grad: str = "first") -> Tensor:
    """Statistics of every position over its channels, from one read of the map: [N, K, H, W] in fp32 (fp64 for fp64 maps).

    x: [N, C, H, W]; kinds: of mean, max, and mix ((mean + max) / 2); max_grad and errors as in `spatial_attention`.
    """
    _checks.feature_map(x)
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    if isinstance(kinds, str) or not kinds:
        raise ValueError(f"kinds: got {kinds!r}, expected a non-empty sequence of 'mean', 'max', 'mix'")
    for kind in kinds:
        _checks.choice("kinds", kind, ("mean", "max", "mix"))
    stats, *_ = spatial_squeeze(x, *(None,) * 10, spec=Spec(max_grad=max_grad))
    rows = {"mean": stats[:, 0], "max": stats[:, 1]}
    if tuple(kinds) == ("mean", "max"):
        return stats
    return torch.stack([rows[k] if k in rows else 0.5 * rows["mean"] + 0.5 * rows["max"] for k in kinds], 1)
