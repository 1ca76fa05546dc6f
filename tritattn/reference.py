"""Plain torch definitions of every op: the fp64 oracle of the tests, the CPU path, and the source of double backward, vmap and jvp.

Arithmetic is done in fp32 for fp16 and bf16 maps (fp64 for fp64 maps) and rounded once, at the output, as the kernels do. Every function is
differentiable by autograd to any order and traces to standard ATen ops. Shapes: x [N, C, *spatial], gates broadcastable to x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "relu": torch.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}
HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "relu6": F.relu6, "leaky_relu": F.leaky_relu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "relu": torch.relu,
    "none": lambda t: t,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which maps of `dtype` are reduced and gated: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _acc(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(accumulator(like.dtype))


def prologue(x: Tensor, norm: Sequence[Tensor | None], before: str, eps: str) -> Tensor:
    """b(norm(x)) in fp32 (fp64 for fp64 maps), norm = (weight, bias, mean, variance) of a BatchNorm; x itself where there is neither b nor norm."""
    if norm[2] is not None:
        weight, bias, mean, var = (_acc(t, x) for t in norm)
        x = F.batch_norm(x.to(accumulator(x.dtype)), mean, var, weight, bias, training=False, eps=float(eps))
    return x if before == "none" else HIDDEN[before](x.to(accumulator(x.dtype)))


def _maximum(x: Tensor, dim: int, max_grad: str, keepdim: bool = False) -> Tensor:
    """Maximum over `dim`; its gradient goes to one index ("first", as max pooling) or is shared among ties ("even", as amax)."""
    return x.max(dim, keepdim=keepdim).values if max_grad == "first" else x.amax(dim, keepdim=keepdim)


def channel_statistics(x: Tensor, pools: Sequence[str] = ("avg", "max"), *, max_grad: str = "first") -> Tensor:
    """Statistics of every channel over all positions, in fp32 (fp64 for fp64 maps): [N, K, C].

    avg: mean; max: maximum; avg_max: (mean + maximum) / 2; lp: (sum x^2)^(1/2); lse: log sum exp x.
    """
    flat = x.flatten(2).to(accumulator(x.dtype))  # [N, C, M]
    values = []
    for pool in pools:
        if pool == "avg":
            values.append(flat.mean(-1))
        elif pool == "max":
            values.append(_maximum(flat, -1, max_grad))
        elif pool == "avg_max":
            values.append(0.5 * flat.mean(-1) + 0.5 * _maximum(flat, -1, max_grad))
        elif pool == "lp":
            values.append(torch.linalg.vector_norm(flat, dim=-1))  # its gradient at zero is zero, as in torch's lp_pool2d
        else:
            values.append(flat.logsumexp(-1))
    return values[0][:, None] if len(values) == 1 else torch.stack(values, 1)


def spatial_statistics(x: Tensor, kinds: Sequence[str] = ("mean", "max"), *, max_grad: str = "first") -> Tensor:
    """Statistics of every position over all channels, in fp32 (fp64 for fp64 maps): [N, K, H, W].

    mean, max, and mix = (mean + max) / 2.
    """
    x = x.to(accumulator(x.dtype))
    values = []
    for kind in kinds:
        if kind == "mean":
            values.append(x.mean(1))
        elif kind == "max":
            values.append(_maximum(x, 1, max_grad))
        else:
            values.append(0.5 * x.mean(1) + 0.5 * _maximum(x, 1, max_grad))
    return torch.stack(values, 1)


def axis_statistics(x: Tensor, dim: int, maximum: bool, max_grad: str = "first") -> Tensor:
    """Mean over one dimension of x [N, C, H, W], in fp32 (fp64 for fp64 maps), [N, ...]; with `maximum` mean and maximum, [N, 2, ...]."""
    x = x.to(accumulator(x.dtype))
    mean = x.mean(dim)
    return torch.stack([mean, _maximum(x, dim, max_grad)], 1) if maximum else mean


def gate_lines(x: Tensor, row: Tensor, column: Tensor, pixel: Tensor | None, gate: str, combine: str) -> Tensor:
    """x [N, C, H, W] times gates of its rows [N, H, C], of its columns [N, W, C] and perhaps of its pixels [N, H, W], in the accumulator's dtype.

    product: f(row) f(column); logits: f(row + column); mean: of all gates.
    """
    acc = accumulator(x.dtype)
    x = x.to(acc)
    r = row.to(acc).transpose(1, 2)[..., None]
    q = column.to(acc).transpose(1, 2)[..., None, :]
    f = GATES[gate]
    if combine == "product":
        return x * f(q) * f(r)
    if combine == "logits":
        return x * f(r + q)
    gated = [x * f(t) for t in (r, q, *(() if pixel is None else (pixel.to(acc)[:, None],)))]
    return sum(gated[1:], gated[0]) / len(gated)


def excite(
    z: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None, *, kind: str, hidden: str,
    norm: torch.nn.Module | None = None, groups: int = 1,
) -> Tensor:  # fmt: skip
    """The small network between squeeze and gate: statistics z [N, K, C] -> logits [N, C], or as many as w2 has rows.

    mlp: sum_k (w2 hidden(norm(w1 z_k + b1)) + b2), in `groups` as a convolution has them; fc: sum_k (w2 z_k + b2); conv, circular: a 1-D convolution
    of z along the channels with the odd kernel w2, zero or circular padding, and before it hidden of one with the kernel w1 [R, 1, 1] where there is
    one. norm takes one statistic, and [N, R, 1, 1].
    """
    w1, b1, w2, b2 = (_acc(t, z) for t in (w1, b1, w2, b2))
    assert w2 is not None
    if kind in ("conv", "circular"):
        k = w2.shape[-1]
        if kind == "circular":
            # a gather, because torch's circular padding refuses a pad wider than the input
            index = torch.arange(-(k // 2), z.shape[-1] + k // 2, device=z.device) % z.shape[-1]
            z = z[..., index]
        if w1 is not None:
            z = HIDDEN[hidden](F.conv1d(z, w1, b1))
        return F.conv1d(z, w2, b2, padding=k // 2 if kind == "conv" else 0)[:, 0]
    if kind == "mlp":
        assert w1 is not None
        z = _linear(z, w1, b1, groups)
        if norm is not None:
            dtype = next((p.dtype for p in norm.parameters()), z.dtype)
            z = norm(z.to(dtype).transpose(1, 2)[..., None]).to(z.dtype)[..., 0].transpose(1, 2)
        z = HIDDEN[hidden](z)
    t = _linear(z, w2, b2, groups)
    return t.squeeze(1) if t.shape[1] == 1 else t.sum(1)


def _linear(z: Tensor, w: Tensor, b: Tensor | None, groups: int) -> Tensor:
    """A 1x1 convolution of z [N, K, C]; as matrix products, which no setting lets round to TF32 as convolutions may."""
    w = w.flatten(1)
    if groups == 1:
        return F.linear(z, w, b)
    n, k, c = z.shape
    rows = w.shape[0]
    columns = z.reshape(n * k, groups, c // groups).transpose(0, 1)
    t = (columns @ w.view(groups, rows // groups, c // groups).transpose(1, 2)).transpose(0, 1).reshape(n, k, rows)
    return t if b is None else t + b


def finish(gated: Tensor, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(gated + residual), rounded to x's dtype; gated is the caller's to overwrite."""
    if residual is not None:
        gated = gated + residual.to(gated.dtype)
    # on a CPU another map costs more than the arithmetic on it
    return (gated.relu_() if activation == "relu" else ACTIVATIONS[activation](gated)).to(x.dtype)


def joint_factor(s: Tensor, q: Tensor, combine: str, gate: str) -> Tensor:
    """BAM's gate of channel and spatial logits together: 1 + f(s q) or 1 + f(s + q)."""
    return 1 + GATES[gate](s + q if combine == "sum" else s * q)


def apply_factor(x: Tensor, factor: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(x * factor + residual), rounded to x's dtype; factor broadcastable to x and in the accumulator's dtype."""
    wide = x.to(factor.dtype)
    gated = wide * factor if residual is None else torch.addcmul(residual.to(factor.dtype), wide, factor)
    return finish(gated, x, None, activation)


def gate(x: Tensor, weights: Tensor, *, gate: str = "none", residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """y = activation(x * f(weights) + residual), weights broadcastable to x."""
    return apply_factor(x, GATES[gate](weights.to(accumulator(x.dtype))), residual, activation)


def blend(
    x: Tensor, other: Tensor | None, local: Tensor, pooled: Tensor | None, *, gate: str, factor: int, residual: Tensor | None, activation: str
) -> Tensor:
    """y = activation(factor (x w + other (1 - w)) + residual), w = f(local + pooled), pooled [N, C]; without other, factor x w + residual."""
    wide = x.to(accumulator(x.dtype))
    t = local.to(wide.dtype)
    if pooled is not None:
        t = t + broadcast_channels(pooled.to(wide.dtype), x)
    w = GATES[gate](t)
    y = wide * w
    if other is not None:
        y = y + other.to(wide.dtype) * (1 - w)
    return finish(factor * y, x, residual, activation)


def broadcast_channels(t: Tensor, x: Tensor) -> Tensor:
    """[N, C] -> [N, C, 1, ...] with x's rank."""
    return t.view(*t.shape, *(1,) * (x.dim() - 2))


def pixel_logits(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """q[n, 0, h, w] = sum_c w_c x[n, c, h, w] + b."""
    acc = accumulator(x.dtype)
    q = (x.to(acc) * w.to(acc).reshape(1, -1, 1, 1)).sum(1, keepdim=True)
    return q if b is None else q + b.to(acc)


def context(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """Mean of the map over its positions, in fp32 (fp64 for fp64 maps): [N, C]; under the softmax of `pixel_logits`, or the plain mean without w."""
    if w is None:
        return channel_statistics(x, ("avg",))[:, 0]
    a = pixel_logits(x, w, b).flatten(2).softmax(-1)  # [N, 1, M]
    return (x.flatten(2).to(a.dtype) @ a.transpose(1, 2))[..., 0]


def covariance(x: Tensor) -> Tensor:
    """Covariance of the channels over all positions, in fp32 (fp64 for fp64 maps): [N, C, C]."""
    flat = x.flatten(2).to(accumulator(x.dtype))
    centred = flat - flat.mean(-1, keepdim=True)
    return centred @ centred.transpose(1, 2) / flat.shape[-1]


def local_mean(x: Tensor, extent: int) -> Tensor:
    """z[n, c, i, j] = mean of x[n, c, h, w] over |h - e i| < e, |w - e j| < e inside the map."""
    return F.avg_pool2d(x, 2 * extent - 1, extent, extent - 1, count_include_pad=False)


def nearest(small: Tensor, x: Tensor) -> Tensor:
    """A small map spread over the positions of x, each taking the nearest, in the accumulator's dtype."""
    return F.interpolate(small.to(accumulator(x.dtype)), size=x.shape[2:])


def plane_energy(x: Tensor, e_lambda: float) -> Tensor:
    """SimAM's inverse energy of every element, d / (4 (sum d / (M - 1) + e_lambda)) + 1/2 with d = (x - mean)^2 over the M positions of its plane."""
    flat = x.flatten(2)
    d = (flat - flat.mean(2, keepdim=True)).square()
    variance = d.sum(2, keepdim=True) / (flat.shape[2] - 1)
    return (d / (4 * (variance + e_lambda)) + 0.5).view(x.shape)


def concurrent(x: Tensor, s: Tensor, q: Tensor, combine: str) -> Tensor:
    """scSE's two gates on one map: x s + x q, or their element-wise maximum."""
    x = x.to(accumulator(x.dtype))
    return torch.addcmul(x * s, x, q) if combine == "sum" else torch.maximum(x * s, x * q)


def spatial_convolution(stats: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The k x k convolution of a spatial gate, 'same' padding: [N, K, H, W] -> [N, 1, H, W]."""
    # a number even where shapes are symbols: the convolution's double backward takes no symbolic padding
    return F.conv2d(stats, weight.to(stats.dtype), _acc(bias, stats), padding=int(weight.shape[-1]) // 2)
