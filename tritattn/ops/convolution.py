"""The 1x1 convolution of a rectified map to few channels, as the squeeze of a relay: its backward writes what flows back through it and through a
channel gate on the same map in one pass, and takes the weight's gradient along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference, tuning
from .._library import INTERPRET
from .._relay import RelaySqueeze
from .._spec import Spec
from ._channel import channel_relay_gate
from ._launch import NO_NORM, Cotangent, Map, gate_backward_input, kernels, matrix
from ._networks import hooked

STEPS = 32  # that a program takes at least, where there are so many


class ConvolutionSpec(NamedTuple):
    before: str = "relu"  # activation of the map
    gate: str = "sigmoid"  # of the channel logits that come back
    stride: int = 1


def _out_like(x: Tensor, w: Tensor, spec: ConvolutionSpec) -> Tensor:
    """Empty, of the result's shape, with x's order of dimensions."""
    sizes = w.shape[0], *((size - 1) // spec.stride + 1 for size in x.shape[2:])
    for dim, size in enumerate(sizes, 1):
        x = x.narrow(dim, 0, size)
    return torch.empty_like(x)


def _fake(x, w, b, spec: ConvolutionSpec) -> tuple[Tensor, ...]:
    logits = x.new_empty(x.shape[:2], dtype=reference.accumulator(x.dtype))
    return _out_like(x, w, spec), RelaySqueeze.slot(x), RelaySqueeze.slot(logits)


def _args(m: Map, out: Map, role: str, spec: ConvolutionSpec) -> tuple[tuning.Config, dict[str, Any]]:
    """The tiles, and what both kernels are told. Matrix units take no fewer than 16 of anything."""
    config = m.config(role)
    args = dict(
        m.args, D=out.c, P=out.hw, W=m.x.shape[-1], OUT_W=out.x.shape[-1], BEFORE=spec.before, STRIDE=spec.stride, INTERPRETED=INTERPRET,
        OUT_LAST=out.channels_last, BLOCK_D=max(16, tuning.power_of_two(out.c)), BLOCK_C=max(16, config.block_c), BLOCK_P=max(16, config.block_p),
        **config.options,
    )  # fmt: skip
    return config, args


def _launch(x, w, b, spec: ConvolutionSpec) -> tuple[Tensor, ...]:
    m = Map(x)
    out, *slots = _fake(x, w, b, spec)
    found = out if m.x is x else _out_like(m.x, w, spec)
    _, args = _args(m, Map(found), "convolution", spec)
    programs = m.n * -(-args["P"] // args["BLOCK_P"])
    kernels().pointwise_convolution_fwd_kernel[(programs,)](m.x, matrix(w), matrix(b), found, **args, HAS_B=b is not None)
    return out if found is out else out.copy_(found), *slots


def _backward(grads, inputs, saved, spec: ConvolutionSpec, needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """With da (what flows through the gate) and the gate's logits, dx also holds the gate's share."""
    g, da, logits = grads
    x, w, b = inputs
    m = Map(x)
    logits = None if da is None else logits.contiguous()
    if g is None:
        return gate_backward_input(m, Spec(gate=spec.gate), cotangent=Cotangent(m, da, None, Spec()), logits=logits), None, None
    dx, dw = m.empty() if needs[0] else None, None
    if needs[0] or needs[1]:
        out = Map(g)
        config, args = _args(m, out, "convolution_bwd" if spec.stride == 1 else "strided_convolution_bwd", spec)
        # a share of the weight's gradient weighs as much as a program's part of the map in a few steps
        splits = min(config.splits, max(1, m.n * -(-m.hw // args["BLOCK_P"]) // STEPS))
        dw = m.small(splits, *w.shape) if needs[1] else None
        kernels().pointwise_convolution_bwd_kernel[(splits * -(-m.c // args["BLOCK_C"]),)](
            m.same(da), m.x, matrix(w), out.x, logits, dx, dw, **args, N=m.n, SPLITS=splits, GATE=spec.gate, HAS_DA=da is not None,
            STORE_DX=dx is not None, STORE_DW=dw is not None, BLOCK_K=args["BLOCK_D"] if x.element_size() == 2 else 16,
        )  # fmt: skip
    return (
        None if dx is None else m.output(dx),
        None if dw is None else dw.sum(0).to(w.dtype),
        g.sum((0, 2, 3), dtype=m.acc).to(b.dtype) if needs[2] else None,
    )


def _share(da: Tensor, inputs: Sequence[Any], logits: Tensor | None, spec: ConvolutionSpec) -> tuple[Tensor, ...]:
    """The gate's share of dx: da f(logits)."""
    return channel_relay_gate.reference(da, *NO_NORM, logits, None, None, None, Spec(gate=spec.gate))


pointwise_convolution = RelaySqueeze(
    "pointwise_convolution",
    inputs=("x", "w", "b?"),
    outputs=("out", "map_slot", "logits_slot"),
    differentiable=3,
    saved=(),
    batched=("x",),
    fake=_fake,
    launch=_launch,
    backward=_backward,
    reference=lambda x, w, b, spec: (F.conv2d(reference.HIDDEN[spec.before](x), w, b, spec.stride),),
    share=_share,
    spec=ConvolutionSpec,
)


def _called_dtype(net: nn.Conv2d, x: Tensor) -> torch.dtype:
    """In which dtype a call of net computes: that of its weight, or autocast's."""
    kind = x.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return net.weight.dtype


def pointwise(net: Any, x: Tensor) -> bool:
    """Whether `convolve` may stand in for a call of net on what x becomes by its ReLU."""
    return (
        type(net) is nn.Conv2d
        and net.kernel_size == (1, 1)
        and net.stride in ((1, 1), (2, 2))
        and net.padding in ((0, 0), "valid", "same")
        and net.groups == 1
        and net.in_channels == x.shape[1]
        and net.out_channels <= min(net.in_channels, tuning.CONVOLUTION_CHANNELS)
        and not hooked(net)
        and net.weight.device == x.device
        and _called_dtype(net, x) == x.dtype
    )


def convolve(x: Tensor, net: nn.Conv2d, gate: str) -> Sequence[Tensor]:
    """net(relu(x)), and the slots of a relay; gate: that of the channel logits that come back."""
    (stride,) = {net.stride[0]}  # through a set, since dynamo has no text of an integer that it takes for dynamic
    b = None if net.bias is None else net.bias.to(x.dtype)
    return pointwise_convolution(x, net.weight.to(x.dtype), b, spec=ConvolutionSpec(gate=gate, stride=stride))
