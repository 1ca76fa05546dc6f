"""Channel gates: SE, ESE, ECA, cSE and CBAM's channel half. One autograd node, while the weights are small one launch forward, and the map's gradient
written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._library import _without_autocast
from .._spec import Spec
from . import _checks, _excite, _norm
from ._channel import attend, channel_gate, channel_squeeze
from ._launch import NO_NORM
from ._prologue import prepared

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
            block: neither is stored, as b is part of the passes, and so is a BatchNorm(C) in eval whose parameters need no gradient, or one that
            computes its statistics where the only pool is the mean (forward it reads x once more where there is b, backward never; momentum may not
            be None); every other module is called.
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
    spec = Spec(pool, kind, hidden, gate, max_grad=max_grad, activation=activation, before=before)
    if norm is not None and not _excite.plain_norm(norm):
        return _attend_small(x, (w1, b1, w2, b2), before_norm, residual, spec, norm)
    if norm is not None:
        w1, b1 = _excite.folded(w1, b1, norm, reference.accumulator(x.dtype))
    return _gated(x, (w1, b1, w2, b2), before_norm, residual, spec)


Params = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _gated(x: Tensor, params: Params, before_norm: torch.nn.Module | None, residual: Tensor | None, spec: Spec) -> Tensor:
    if _norm.trains(before_norm, x, spec):
        return _norm.gated(x, params, before_norm, residual, spec)
    x, first, spec = prepared(x, before_norm, spec)
    return channel_gate(x, *params, *first, residual, spec=spec)


def _attend_small(
    x: Tensor, params: Params, before_norm: torch.nn.Module | None, residual: Tensor | None, spec: Spec, norm: torch.nn.Module | None = None
) -> Tensor:
    """The reference's excite between the two passes, in the accumulator's arithmetic whatever autocast says."""
    x, first, spec = prepared(x, before_norm, spec)

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
    return _gated(x, (None, None, w, b), before_norm, residual, Spec("avg", "fc", "none", gate, activation=activation, before=before))


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
    if w1 is not None:
        return _attend_small(x, (w1, b1, w, b), before_norm, residual, spec)
    return _gated(x, (None, None, w, b), before_norm, residual, spec)


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
    if apply:
        return _gated(x, (w1, b1, w2, b2), before_norm, residual, spec)
    x, first, spec = prepared(x, before_norm, spec)
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
