"""Second-order pooling: covariances of channels, and the channel gate that small networks make of them (GSoP).

The networks, one of which reads the rectified map itself, are torch modules. So `rectify` and `channel_relay_gate` are joined as a relay: the
rectified map's gradient and the gate's meet in one pass that writes dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference, tuning
from .._library import INTERPRET, Family
from .._relay import RelaySqueeze
from .._spec import Spec
from . import _checks
from ._channel import channel_relay_gate
from ._launch import NO_NORM, Cotangent, Map, gate_backward_input, gate_forward, kernels
from ._networks import Networks, called, each, network
from .convolution import convolve, pointwise

# -- the covariance --------------------------------------------------------------------------------------------------------------------------


class CovarianceSpec(NamedTuple):
    before: str = "none"  # activation of the map


def _fake(x, spec: CovarianceSpec) -> tuple[Tensor, ...]:
    n, c = x.shape[:2]
    acc = reference.accumulator(x.dtype)
    return x.new_empty((n, c, c), dtype=acc), x.new_empty((n, 2, c), dtype=acc)


def _args(m: Map, role: str, spec: CovarianceSpec) -> tuple[int, int, dict]:
    """(blocks of channels, blocks of positions, the kernels' arguments about them). Matrix units take no fewer than 16 of either."""
    config = m.config(role)
    block_c, block_p = max(16, config.block_c), max(16, config.block_p)
    args = dict(m.args, BEFORE=spec.before, INTERPRETED=INTERPRET, BLOCK_C=block_c, BLOCK_P=block_p, **config.options)
    return -(-m.c // block_c), -(-m.hw // block_p), args


def _launch(x, spec: CovarianceSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    found, mean = _fake(x, spec)
    blocks_c, _, args = _args(m, "covariance", spec)
    kernels().covariance_fwd_kernel[(m.n * blocks_c * blocks_c,)](m.x, found, mean, **args, WHOLE=blocks_c == 1)
    return found, mean


def _backward(grads, inputs, saved, spec: CovarianceSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    m = Map(inputs[0])
    dx = m.empty()
    blocks_c, blocks_p, args = _args(m, "covariance_bwd", spec)
    kernels().covariance_bwd_kernel[(m.n * blocks_c * blocks_p,)](grads[0].contiguous(), m.x, saved[0], dx, **args, BLOCK_J=16)
    return [m.output(dx)]


covariance_family = Family(
    "covariance",
    inputs=("x",),
    outputs=("covariance", "mean"),
    differentiable=1,
    saved=("mean",),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=lambda x, spec: (reference.covariance(reference.HIDDEN[spec.before](x)),),
    spec=CovarianceSpec,
)

# -- the rectified map ------------------------------------------------------------------------------------------------------------------------


def _rectify_fake(x, spec: Spec) -> tuple[Tensor, ...]:
    return torch.empty_like(x), RelaySqueeze.slot(x), RelaySqueeze.slot(x.new_empty(x.shape[:2], dtype=reference.accumulator(x.dtype)))


def _rectify_launch(x, spec: Spec) -> tuple[Tensor, ...]:
    return gate_forward(Map(x), None, None, None, Spec(activation="relu")), *_rectify_fake(x, spec)[1:]


def _rectify_backward(grads, inputs, saved, spec: Spec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    drectified, da, logits = grads
    m = Map(inputs[0])
    cotangent, logits = (None, None) if da is None else (Cotangent(m, da, None, Spec()), logits.contiguous())
    return [gate_backward_input(m, Spec(gate=spec.gate), cotangent=cotangent, logits=logits, through=drectified, of="relu")]


rectify = RelaySqueeze(
    "rectify",
    inputs=("x",),
    outputs=("rectified", "map_slot", "logits_slot"),
    differentiable=3,
    saved=(),
    batched=("x",),
    fake=_rectify_fake,
    launch=_rectify_launch,
    backward=_rectify_backward,
    reference=lambda x, spec: (x.relu(),),
    share=lambda da, inputs, logits, spec: channel_relay_gate.reference(da, *NO_NORM, logits, None, None, None, spec._replace(activation="none")),
)

CONVOLUTIONS = ("auto", "fused", "torch")

# -- public functions ------------------------------------------------------------------------------------------------------------------------


def covariance(x: Tensor, *, before: str = "none") -> Tensor:
    """Covariance of the channels of u = b(x) over all positions, in fp32 (fp64 for fp64 maps):
    cov[n, i, j] = mean_p (u_ip - mean_p u_ip) (u_jp - mean_p u_jp).

    x: [N, C, *spatial] with one to three spatial dimensions; float32, float16, bfloat16 or float64. before: b, one of none, relu, silu, hardswish,
    gelu and the other activations of hidden layers. Returns [N, C, C]. On matrix units, with the digits of fp32; where the first 16 positions are
    unlike all others, which they centre, with up to HW / 16 times its rounding. The authors of MPN-COV (Li et al., 2018, arXiv:1712.01034) multiply
    by a centring matrix of positions x positions instead. Raises TypeError and ValueError naming the argument.
    """
    _checks.feature_map(x, ranks=(3, 4, 5))
    _checks.choice("before", before, reference.HIDDEN)
    return covariance_family(x, spec=CovarianceSpec(before))


def gsop(
    x: Tensor, reduce: Networks, excite: Networks, *, convolution: str = "auto", gate: str = "sigmoid", residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:  # fmt: skip
    """Global second-order pooling, channel attention (Gao et al., 2019, arXiv:1811.12006): y = a(x * f(excite(cov(u))) + residual),
    u = relu(reduce(relu(x))).

    Args:
        x: [N, C, H, W]; float32, float16, bfloat16 or float64.
        reduce: a module or function, or several called in turn, from relu(x) to a map [N, D, h, w] of fewer channels: in the paper a 1x1 convolution
            and a BatchNorm.
        excite: the same from the covariances [N, D, D, 1] to logits [N, C, 1, 1]: in the paper a BatchNorm of the rows, a convolution of each row and
            a 1x1 convolution. Modules get their input in the dtype of their parameters.
        convolution: who computes the first of `reduce`, where that is an nn.Conv2d of 1x1 with a stride of 1 or 2 to at most 128 channels that does
            nothing else when called, in x's dtype: "fused", the kernels that also take relu(x), so that x moves 3 times forward and 5 backward;
            "torch", then x moves 5 times forward and 8 backward; or "auto", fused for float16 and bfloat16.
        gate: f, one of sigmoid, hard_sigmoid, relu, none.
        residual: of x's shape and dtype. activation: a, one of none, relu, silu, hardswish, gelu.

    Returns y, x's dtype, with the strides of torch.empty_like(x). Raises TypeError and ValueError naming the argument.
    """
    _checks.feature_map(x)
    _checks.residual(residual, x)
    _checks.choice("activation", activation, reference.ACTIVATIONS)
    _checks.choice("gate", gate, reference.GATES)
    _checks.choice("convolution", convolution, CONVOLUTIONS)
    network("reduce", reduce)
    network("excite", excite)
    n, c = x.shape[:2]
    spec = Spec(gate=gate, activation=activation)
    first, *rest = each(reduce)
    fits = convolution != "torch" and pointwise(first, x)
    if convolution == "fused" and not fits:
        raise ValueError(f"convolution: got 'fused', expected reduce to begin with a plain 1x1 nn.Conv2d in {x.dtype}, not {first!r}")
    if fits and (convolution == "fused" or tuning.fused_convolution(x.element_size())):
        reduced, *slots = convolve(x, first, gate)
    else:
        reduced, *slots = rectify(x, spec=spec)
        rest = [first, *rest]
    found = covariance(called("reduce", rest, reduced, (n, None, None, None)), before="relu")
    logits = called("excite", excite, found.unsqueeze(-1), (n, c, 1, 1)).flatten(1)
    if not slots:  # the squeeze took the reference
        return channel_relay_gate.reference(x, *NO_NORM, logits, residual, None, None, spec)[0]
    return channel_relay_gate(x, *NO_NORM, logits, residual, *slots, spec=spec)
