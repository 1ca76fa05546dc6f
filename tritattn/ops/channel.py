"""Channel gates: SE, ESE, ECA, cSE and CBAM's channel half. One autograd node, while the weights are small one launch forward, and the map's gradient
written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from .._library import Family, _without_autocast
from .._relay import RelayGate, RelaySqueeze
from .._spec import Spec
from . import _checks, _excite
from ._launch import NO_NORM, NORM, Cotangent, Map, Norm, gate_backward_channel, gate_backward_input, gate_forward
from ._prologue import prepared
from .gate import gate_family

# -- the gated map ---------------------------------------------------------------------------------------------------------------------------


# Inputs of every family: the map, the excite's parameters where it is fused, and the norm of the prologue, whose parameters get no gradient.
_NORM = tuple(f"{name}?" for name in NORM)


def _map(x, norm: Norm, spec: Spec) -> Map:
    return Map(x, norm=norm, before=spec.before, eps=spec.eps)


def _fake(x, w1, *rest) -> tuple[Tensor, ...]:
    return (torch.empty_like(x), *_excite.fake(x, w1, rest[-1]))


def _launch(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, residual, spec = rest
    y, excited = _excite.gated(_map(x, norm, spec), (w1, b1, w2, b2), residual, spec)
    return (y, *excited)


def _backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (g,) = grads
    x, params, norm, residual = inputs[0], inputs[1:5], inputs[5:9], inputs[9]
    m = _map(x, norm, spec)
    excited = _excite.Excited(*saved)
    cotangent = Cotangent(m, g, residual, spec)
    found: list[Tensor | None] = [None] * 10
    if any(needs[:5]):
        found[:5] = _excite.gated_backward(m, cotangent, params, excited, spec, needs[:5])
    elif needs[9]:
        gate_backward_channel(m, excited.logits, spec, cotangent=cotangent)
        cotangent.stored()
    if needs[9]:
        found[9] = cotangent.residual_grad(m, g, residual)
    return found


def _reference(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, residual, spec = rest
    u = reference.prologue(x, norm, spec.before, spec.eps)
    logits = reference.broadcast_channels(_excite.plain(u, w1, b1, w2, b2, spec), u)
    return (reference.gate(u, logits, gate=spec.gate, residual=residual, activation=spec.activation).to(x.dtype),)


channel_gate = Family(
    "channel_gate",
    inputs=("x", *_excite.NAMES, *_NORM, "residual?"),
    outputs=("y", *_excite.RESULTS),
    differentiable=1,
    saved=_excite.RESULTS,
    batched=("x", "residual"),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=_reference,
)

# -- the logits alone ------------------------------------------------------------------------------------------------------------------------


def _squeeze_fake(x, w1, *rest) -> tuple[Tensor, ...]:
    spec = rest[-1]
    excited = _excite.fake(x, w1, spec)
    return (_squeeze_result(excited, spec).clone(memory_format=torch.contiguous_format), *excited)


def _squeeze_result(excited: _excite.Excited, spec: Spec) -> Tensor:
    return excited.z[:, : spec.pools.count("+") + 1] if spec.kind == "none" else excited.logits


def _squeeze_launch(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    excited = _excite.forward(_map(x, norm, spec), w1, b1, w2, b2, spec)
    # an op may not return one tensor twice
    return (_squeeze_result(excited, spec).clone(memory_format=torch.contiguous_format), *excited)


def _squeeze_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    (dlogits,) = grads
    params = inputs[1:5]
    m = _map(inputs[0], inputs[5:], spec)
    excited = _excite.Excited(*saved)
    dlogits = dlogits.contiguous()
    found: list[Tensor | None] = [None] * 9
    dz: Tensor | None = dlogits
    if spec.kind != "none":
        dz, found[1:5] = _excite.backward(m, dlogits, params, excited, spec, needs[1:5], needs[0])
    if needs[0]:
        assert dz is not None
        found[0] = gate_backward_input(m, spec, pooled=(excited.z, dz, excited.aux))
    return found


def _squeeze_reference(x, w1, b1, w2, b2, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    return (_excite.plain(reference.prologue(x, norm, spec.before, spec.eps), w1, b1, w2, b2, spec),)


channel_squeeze = Family(
    "channel_squeeze",
    inputs=("x", *_excite.NAMES, *_NORM),
    outputs=("result", *_excite.RESULTS),
    differentiable=1,
    saved=_excite.RESULTS,
    batched=("x",),
    fake=_squeeze_fake,
    launch=_squeeze_launch,
    backward=_squeeze_backward,
    reference=_squeeze_reference,
)

# -- the statistics, and their gate, with torch modules between ------------------------------------------------------------------------------


def _relay_fake(x, *rest) -> tuple[Tensor, ...]:
    spec = rest[-1]
    _, z, _, aux = _excite.fake(x, None, spec)
    result = z.new_empty((z.shape[0], spec.pools.count("+") + 1, z.shape[2]))
    return result, *_relay_slots(x, z), z, aux


def _relay_slots(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return RelaySqueeze.slot(x), RelaySqueeze.slot(z.select(1, 0)), RelaySqueeze.slot(x.narrow(1, 0, 1), z.dtype), RelaySqueeze.slot(x)


def _relay_launch(x, *rest) -> tuple[Tensor, ...]:
    *norm, spec = rest
    excited = _excite.forward(_map(x, norm, spec), None, None, None, None, spec)
    return _squeeze_result(excited, spec).clone(), *_relay_slots(x, excited.z), excited.z, excited.aux


def _relay_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    dz, da, logits, spatial, through = grads
    z, aux = saved
    m = _map(inputs[0], inputs[1:], spec)
    pooled = None if dz is None else (z, dz.contiguous(), aux)
    cotangent = None if da is None else Cotangent(m, da, None, Spec())
    logits, spatial = (None if t is None else t.contiguous() for t in (logits, spatial))
    dx = gate_backward_input(m, spec, cotangent=cotangent, logits=logits, spatial=spatial, pooled=pooled, through=through)
    return [dx, *NO_NORM]


def _relay_share(da: Tensor, inputs: Sequence[Tensor | None], logits: Tensor, spatial: Tensor | None, spec: Spec) -> Sequence[Tensor | None]:
    x, *norm = inputs
    u, vjp = torch.func.vjp(lambda x: reference.prologue(x, norm, spec.before, spec.eps), x)  # type: ignore[misc]
    (du,) = gate_family.reference(da.to(u.dtype), logits, spatial, None, None, spec._replace(activation="none"))
    return vjp(du)


def _relay_gate_launch(x, *rest) -> tuple[Tensor, ...]:
    *norm, logits, residual, _, _, spec = rest
    return (gate_forward(_map(x, norm, spec), logits.contiguous(), None, residual, spec),)


def _relay_gate_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """da and the gradient of the logits."""
    x, *norm, logits, residual, _, _ = inputs
    m = _map(x, norm, spec)
    cotangent = Cotangent(m, grads[0], residual, spec)
    if needs[0]:
        cotangent.da = m.empty()
    dlogits = gate_backward_channel(m, logits.contiguous(), spec, cotangent=cotangent, dtype=logits.dtype)
    return None if cotangent.da is None else m.output(cotangent.da), *NO_NORM, dlogits, None, None, None


def _relay_gate_reference(x, *rest) -> tuple[Tensor, ...]:
    *norm, logits, residual, _, _, spec = rest
    u = reference.prologue(x, norm, spec.before, spec.eps)
    logits = reference.broadcast_channels(logits, u)
    return (reference.gate(u, logits, gate=spec.gate, residual=residual, activation=spec.activation).to(x.dtype),)


channel_relay = RelaySqueeze(
    "channel_relay",
    inputs=("x", *_NORM),
    outputs=("result", "map_slot", "logits_slot", "spatial_slot", "through_slot", "z", "aux"),
    differentiable=5,
    saved=("z", "aux"),
    batched=("x",),
    fake=_relay_fake,
    launch=_relay_launch,
    backward=_relay_backward,
    reference=lambda x, *rest: _squeeze_reference(x, None, None, None, None, *rest),
    share=_relay_share,
)
channel_relay_gate = RelayGate(
    "channel_relay_gate",
    inputs=("x", *_NORM, "logits", "residual?", "map_slot?", "logits_slot?"),
    outputs=("y",),
    differentiable=1,
    saved=(),
    batched=("x", "logits", "residual", "map_slot", "logits_slot"),
    fake=lambda x, *rest: (torch.empty_like(x),),
    launch=_relay_gate_launch,
    backward=_relay_gate_backward,
    reference=_relay_gate_reference,
)


def attend(x: Tensor, excite: Callable[[Tensor], Tensor], residual: Tensor | None, spec: Spec, norm: Norm = NO_NORM) -> Tensor:
    """y = a(u * f(excite(z)) + residual): torch modules between the statistics z [N, K, C] and the logits [N, C], and dx still written once."""
    z, *slots = channel_relay(x, *norm, spec=spec)
    logits = excite(z)
    if not slots:  # the squeeze took the reference
        return _relay_gate_reference(x, *norm, logits, residual, None, None, spec)[0]
    return channel_relay_gate(x, *norm, logits, residual, *slots[:2], spec=spec)


# -- public functions ------------------------------------------------------------------------------------------------------------------------

RANKS = (3, 4, 5)
POOLS = ("avg", "max", "lp", "lse", "avg_max")
MAX_GRADS = ("first", "even")


def _common(x: Tensor, residual: Tensor | None, activation: str, gate: str) -> None:
    _checks.feature_map(x, ranks=RANKS)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("gate", gate, reference.GATES)


def mlp_kind(x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, hidden: str) -> str:
    """Checks the excite's layers; "mlp", or "fc" where there is no first layer."""
    _checks.choice("hidden", hidden, reference.HIDDEN)
    c = x.shape[1]
    if w1 is None:
        if b1 is not None:
            raise ValueError("b1: got a tensor, expected None where w1 is None")
        _checks.layer("w2", w2, x, c, c)
        kind = "fc"
    else:
        r = _checks.layer("w1", w1, x, None, c)
        _checks.parameter("b1", b1, x, (r,))
        _checks.layer("w2", w2, x, c, r)
        kind = "mlp"
    _checks.parameter("b2", b2, x, (c,))
    return kind


def pool_names(pools: Sequence[str]) -> str:
    """Checks a selection of pools and joins it."""
    if isinstance(pools, str) or not pools:
        raise ValueError(f"pools: got {pools!r}, expected a non-empty sequence of {', '.join(map(repr, POOLS))}")
    for pool in pools:
        _checks.choice("pools", pool, POOLS)
    if len(set(pools)) != len(pools):
        raise ValueError(f"pools: got {tuple(pools)!r}, expected each at most once")
    if "avg_max" in pools and len(pools) > 1:
        raise ValueError(f"pools: got {tuple(pools)!r}, expected 'avg_max' alone")
    return "+".join(pools)


def se(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, norm: torch.nn.Module | None = None, pool: str = "avg",
    hidden: str = "relu", gate: str = "sigmoid", max_grad: str = "first", before: str = "none", before_norm: torch.nn.Module | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Squeeze-and-Excitation (Hu et al., 2018, arXiv:1709.01507): y = a(u * f(w2 h(norm(w1 z + b1)) + b2) + residual), z = pool(u),
    u = b(before_norm(x)).

    Args:
        x: [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64.
        w1: [R, C] or the 1x1 convolution's [R, C, 1, ...]; b1: [R] or None; w2: [C, R] likewise; b2: [C] or None. Their dtype may differ from x's.
        norm: a module on [N, R, 1, 1] between the first layer and h (timm's norm_layer), such as a BatchNorm2d(R); most blocks have none.
        pool: "avg" (mean over positions) or "avg_max" (half mean, half maximum, as timm's add_maxpool).
        hidden: h, one of none, relu, relu6, leaky_relu (slope 0.01), silu, hardswish, gelu.
        gate: f, one of sigmoid, hard_sigmoid (relu6(t + 3) / 6), relu, none.
        max_grad: a maximum's gradient goes to its "first" index (torch's max pooling) or is shared "even" among ties (amax).
        before: b, one of those of `hidden`. before_norm: a module on x before it, which returns its shape. What stands between a convolution and the
            block: neither is stored, as b is part of the passes, and so is a BatchNorm(C) in eval whose parameters need no gradient; every other
            module is called.
        residual: of x's shape and dtype, added after the gate. activation: a, one of none, relu, silu, hardswish, gelu (erf).

    Returns: y, x's dtype, with the strides of torch.empty_like(x).
    Raises: TypeError for a wrong dtype or layout, ValueError for a wrong shape, device or option; both name the argument.
    """
    _common(x, residual, activation, gate)
    _checks.choice("pool", pool, ("avg", "avg_max"))
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    _checks.required("w1", w1)
    kind = mlp_kind(x, w1, b1, w2, b2, hidden)
    if norm is not None and not isinstance(norm, torch.nn.Module):
        raise TypeError(f"norm: got {type(norm).__name__}, expected None or a module")
    x, first, spec = prepared(x, before_norm, Spec(pool, kind, hidden, gate, max_grad=max_grad, activation=activation, before=before))
    if norm is None:
        return channel_gate(x, w1, b1, w2, b2, *first, residual, spec=spec)
    if _excite.plain_norm(norm):
        return channel_gate(x, *_excite.folded(w1, b1, norm, reference.accumulator(x.dtype)), w2, b2, *first, residual, spec=spec)
    return _attend_small(x, first, (w1, b1, w2, b2), residual, spec, norm)


def _attend_small(
    x: Tensor, first: Norm, params: tuple[Tensor | None, ...], residual: Tensor | None, spec: Spec, norm: torch.nn.Module | None = None
) -> Tensor:
    """The reference's excite between the two passes, in the accumulator's arithmetic whatever autocast says."""

    def excite(z: Tensor) -> Tensor:
        with _without_autocast(x.device.type):
            return reference.excite(z, *params, kind=spec.kind, hidden=spec.hidden, norm=norm)

    return attend(x, excite, residual, spec._replace(kind="none", hidden="none"), first)


def ese(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, gate: str = "hard_sigmoid", before: str = "none",
    before_norm: torch.nn.Module | None = None, residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Effective Squeeze-Excitation (Lee & Park, 2020, arXiv:1911.06667): y = a(u * f(w z + b) + residual), z the mean of u over positions, u as in
    `se`.

    x: [N, C, *spatial]; w: [C, C] or [C, C, 1, ...]; b: [C] or None. Other arguments, result and errors as in `se`. The paper's gate is the
    hard sigmoid; HGNet's is the sigmoid.
    """
    _common(x, residual, activation, gate)
    _checks.layer("w", w, x, x.shape[1], x.shape[1])
    _checks.parameter("b", b, x, (x.shape[1],))
    x, first, spec = prepared(x, before_norm, Spec("avg", "fc", "none", gate, activation=activation, before=before))
    return channel_gate(x, None, None, w, b, *first, residual, spec=spec)


def eca(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, w1: Tensor | None = None, b1: Tensor | None = None, hidden: str = "relu",
    padding: str = "zeros", gate: str = "sigmoid", before: str = "none", before_norm: torch.nn.Module | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Efficient Channel Attention (Wang et al., 2020, arXiv:1910.03151): y = a(u * f(conv1d(z)) + residual), z the mean of u over positions, u as in
    `se`.

    x: [N, C, *spatial]; w: [1, 1, k] with k odd, slid along the channels; b: [1] or None; padding: "zeros", or "circular" as timm's CecaModule.
    w1 [R, 1, 1], b1 [R] or None, hidden: with them conv1d slides w [1, R, k] over hidden(w1 z + b1), as timm's EcaModule with use_mlp does.
    Other arguments, result and errors as in `se`.
    """
    _common(x, residual, activation, gate)
    _checks.choice("padding", padding, ("zeros", "circular"))
    _checks.choice("hidden", hidden, reference.HIDDEN)
    _checks.required("w", w)
    rows = 1
    if w1 is not None:
        rows = _checks.layer("w1", w1, x, None, 1)
        _checks.parameter("w1", w1, x, (rows, 1, 1))
        _checks.parameter("b1", b1, x, (rows,))
    elif b1 is not None:
        raise ValueError("b1: got a tensor, expected None where w1 is None")
    if w.dim() != 3 or w.shape[-1] % 2 == 0:
        raise ValueError(f"w: got shape {list(w.shape)}, expected [1, {rows}, k] with k odd")
    _checks.parameter("w", w, x, (1, rows, w.shape[-1]))
    _checks.parameter("b", b, x, (1,))
    kind = "conv" if padding == "zeros" else "circular"
    spec = Spec("avg", kind, "none" if w1 is None else hidden, gate, activation=activation, before=before)
    x, first, spec = prepared(x, before_norm, spec)
    if w1 is not None:
        return _attend_small(x, first, (w1, b1, w, b), residual, spec)
    return channel_gate(x, None, None, w, b, *first, residual, spec=spec)


def cse(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, hidden: str = "relu", gate: str = "sigmoid",
    before: str = "none", before_norm: torch.nn.Module | None = None, residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Channel squeeze and excitation of scSE (Roy et al., 2018, arXiv:1803.02579): `se` with the mean; there R = C / 2.

    Some published copies have no activation between the layers: hidden="none".
    """
    return se(
        x, w1, b1, w2, b2, hidden=hidden, gate=gate, before=before, before_norm=before_norm, residual=residual, activation=activation
    )  # fmt: skip


def channel_attention(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, pools: Sequence[str] = ("avg", "max"), hidden: str = "relu",
    gate: str = "sigmoid", max_grad: str = "first", apply: bool = True, before: str = "none", before_norm: torch.nn.Module | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """Channel half of CBAM (Woo et al., 2018, arXiv:1807.06521): y = a(u * f(sum over pools k of MLP(pool_k(u))) + residual), u as in `se`.

    MLP(z) = w2 h(w1 z + b1) + b2 is shared by the pools; with w1=None it is the single layer w2 [C, C].
    pools: of avg (mean), max, lp ((sum u^2)^(1/2)) and lse (log sum exp), as in the authors' code, or avg_max (half mean, half maximum) alone.
    apply: False returns the gate f(...) [N, C, 1, ...] instead of the gated map. Other arguments, result and errors as in `se`.
    """
    _common(x, residual, activation, gate)
    names = pool_names(pools)
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    kind = mlp_kind(x, w1, b1, w2, b2, hidden)
    if not apply:
        _refuse_epilogue(residual, activation)
    spec = Spec(names, kind, hidden, gate, max_grad=max_grad, activation=activation, before=before)
    x, first, spec = prepared(x, before_norm, spec)
    if apply:
        return channel_gate(x, w1, b1, w2, b2, *first, residual, spec=spec)
    logits = channel_squeeze(x, w1, b1, w2, b2, *first, spec=spec)
    return reference.broadcast_channels(reference.GATES[gate](logits).to(x.dtype), x)


def _refuse_epilogue(residual: Tensor | None, activation: str) -> None:
    if residual is not None or activation != "none":
        raise ValueError("apply: got False together with a residual or an activation, which belong to the gated map")


def channel_statistics(x: Tensor, pools: Sequence[str] = ("avg", "max"), *, max_grad: str = "first") -> Tensor:
    """Statistics of every channel over its positions, from one read of the map: [N, K, C] in fp32 (fp64 for fp64 maps).

    x: [N, C, *spatial]; pools: of avg (mean), max, lp ((sum x^2)^(1/2)), lse (log sum exp), or avg_max (half mean, half maximum) alone; max_grad and
    errors as in `se`.
    """
    _checks.feature_map(x, ranks=RANKS)
    names = pool_names(pools)
    _checks.choice("max_grad", max_grad, MAX_GRADS)
    return channel_squeeze(x, None, None, None, None, *NO_NORM, spec=Spec(names, max_grad=max_grad))
