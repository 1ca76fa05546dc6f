"""The code that people run, in plain torch: what every op is compared with. Parameters come in a dict, named as in tritattn.ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Any]

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda t: t,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    # F.gelu(Inf) is NaN on some CPUs
    "gelu": lambda t: 0.5 * t * (1 + torch.erf(t * math.sqrt(0.5))),
}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid, "relu": F.relu, "none": lambda t: t}
TAILS = {name: HIDDEN[name] for name in ("none", "relu", "silu", "hardswish", "gelu")}


def pooled(x: Tensor, pool: str, max_grad: str = "first") -> Tensor:
    """[N, C]"""
    if pool == "avg":
        return x.flatten(2).mean(-1)
    if pool == "max":
        if max_grad == "even":
            return x.flatten(2).amax(-1)
        adaptive = {3: F.adaptive_max_pool1d, 4: F.adaptive_max_pool2d, 5: F.adaptive_max_pool3d}[x.dim()]
        return adaptive(x, 1).flatten(1)
    if pool == "avg_max":
        return 0.5 * pooled(x, "avg") + 0.5 * pooled(x, "max", max_grad)
    if pool == "lp":
        m = math.prod(x.shape[2:])
        return F.lp_pool1d(x.flatten(2), 2, m, stride=m).flatten(1)
    return x.flatten(2).logsumexp(-1)


def over(s: Tensor, x: Tensor) -> Tensor:
    return s.reshape(*s.shape, *(1,) * (x.dim() - 2))


def layers(z: Tensor, p: Params, hidden: str) -> Tensor:
    if p.get("w1") is not None:
        z = HIDDEN[hidden](F.linear(z, p["w1"].flatten(1), p["b1"]))
    return F.linear(z, p["w2"].flatten(1), p["b2"])


def channel_gate(
    x: Tensor, p: Params, pools: Sequence[str] = ("avg",), hidden: str = "relu", gate: str = "sigmoid", max_grad: str = "first"
) -> Tensor:
    return over(GATES[gate](torch.stack([layers(pooled(x, pool, max_grad), p, hidden) for pool in pools]).sum(0)), x)


def conv_gate(x: Tensor, p: Params, padding: str = "zeros", gate: str = "sigmoid") -> Tensor:
    """A kernel slid along the channels: with zeros a Conv1d, circular written as shifted copies."""
    z, w = pooled(x, "avg"), p["w"].flatten()
    if padding == "zeros":
        logits = F.conv1d(z[:, None], p["w"], p["b"], padding=len(w) // 2)[:, 0]
    else:
        logits = sum(w[j] * z.roll(len(w) // 2 - j, 1) for j in range(len(w)))
        logits = logits if p["b"] is None else logits + p["b"]
    return over(GATES[gate](logits), x)


def pixel_gate(x: Tensor, p: Params, gate: str = "sigmoid") -> Tensor:
    return GATES[gate](F.conv2d(x, p["w"].reshape(1, -1, 1, 1), p["b"]))


def spatial_gate(x: Tensor, p: Params, order: str = "mean_max", gate: str = "sigmoid", max_grad: str = "first") -> Tensor:
    mean = x.mean(1, keepdim=True)
    top = x.amax(1, keepdim=True) if max_grad == "even" else x.max(1, keepdim=True)[0]
    stats = 0.5 * mean + 0.5 * top if order == "mix" else torch.cat([mean, top] if order == "mean_max" else [top, mean], 1)
    logits = F.conv2d(stats, p["weight"], p["bias"], padding=p["weight"].shape[-1] // 2)
    return GATES[gate](logits if p.get("norm") is None else p["norm"](logits))


def statistics_of_positions(x: Tensor, kinds: Sequence[str], max_grad: str = "first") -> Tensor:
    mean, top = x.mean(1), x.amax(1) if max_grad == "even" else x.max(1)[0]
    return torch.stack([{"mean": mean, "max": top, "mix": (mean + top) / 2}[kind] for kind in kinds], 1)


def local_gate(x: Tensor, p: Params, extent: int, hidden: str = "relu", gate: str = "sigmoid") -> Tensor:
    """Gather-excite with local means, or with p["gather"]."""
    if p.get("gather") is not None:
        z = p["gather"](x)
    elif extent:
        z = F.avg_pool2d(x, 2 * extent - 1, extent, extent - 1, count_include_pad=False)
    else:
        z = x.mean((2, 3), keepdim=True)
    if p.get("w1") is not None:
        w1, w2 = (p[name].flatten(1)[:, :, None, None] for name in ("w1", "w2"))
        z = F.conv2d(HIDDEN[hidden](F.conv2d(z, w1, p["b1"])), w2, p["b2"])
    return GATES[gate](F.interpolate(z, size=x.shape[2:]))


def simam(x: Tensor, e_lambda: float = 1e-4, gate: str = "sigmoid") -> Tensor:
    dims = tuple(range(2, x.dim()))
    d = (x - x.mean(dims, keepdim=True)).pow(2)
    energy = d / (4 * (d.sum(dims, keepdim=True) / (math.prod(x.shape[2:]) - 1) + e_lambda)) + 0.5
    return x * GATES[gate](energy)


def shuffled_attention(x: Tensor, p: Params, groups: int, eps: float = 1e-5, gate: str = "sigmoid") -> Tensor:
    n, c, *size = x.shape
    x0, x1 = x.reshape(n * groups, c // groups, *size).chunk(2, 1)
    cweight, cbias, sweight, sbias = (p[name].reshape(-1, *(1,) * len(size)) for name in ("cweight", "cbias", "sweight", "sbias"))
    x0 = x0 * GATES[gate](cweight * over(pooled(x0, "avg"), x0) + cbias)
    x1 = x1 * GATES[gate](sweight * F.group_norm(x1, x1.shape[1], p["norm_weight"], p["norm_bias"], eps) + sbias)
    return torch.cat([x0, x1], 1).reshape(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)


def coordinate_gate(x: Tensor, p: Params, hidden: str = "hardswish", gate: str = "sigmoid", combine: str = "product") -> Tensor:
    h = x.shape[2]
    z = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
    t = F.conv2d(z, p["w1"].reshape(*p["w1"].shape[:2], 1, 1), p["b1"])
    t = HIDDEN[hidden](t if p["norm"] is None else p["norm"](t))
    rows = F.conv2d(t[:, :, :h], p["w_h"].reshape(*p["w_h"].shape[:2], 1, 1), p["b_h"])
    columns = F.conv2d(t[:, :, h:], p["w_w"].reshape(*p["w_w"].shape[:2], 1, 1), p["b_w"]).transpose(2, 3)
    return GATES[gate](rows + columns) if combine == "logits" else GATES[gate](columns) * GATES[gate](rows)


def strip_gate(x: Tensor, p: Params, hidden: str = "none", gate: str = "sigmoid", combine: str = "logits") -> Tensor:
    heads = []
    for d, dim in (("h", 3), ("w", 2)):
        t = x.mean(dim, keepdim=True)
        if p[f"w_{d}"] is not None:
            k = max(p[f"w_{d}"].shape[2:])
            t = F.conv2d(t, p[f"w_{d}"], p[f"b_{d}"], padding=(k // 2, 0) if d == "h" else (0, k // 2), groups=x.shape[1])
        heads.append(HIDDEN[hidden](t if p[f"norm_{d}"] is None else p[f"norm_{d}"](t)))
    rows, columns = heads
    return GATES[gate](rows + columns) if combine == "logits" else GATES[gate](rows) * GATES[gate](columns)


def triplet_branches(x: Tensor, p: Params, order: str = "max_mean", gate: str = "sigmoid", max_grad: str = "first") -> list[Tensor]:
    """The spatial half of CBAM on the map turned so that another axis stands in the place of the channels, and turned back."""
    branches = []
    for plane, turn in (("cw", (0, 2, 1, 3)), ("hc", (0, 3, 2, 1)), ("hw", (0, 1, 2, 3))):
        if f"{plane}_weight" in p:
            turned = x.permute(turn)
            own = {name: p[f"{plane}_{name}"] for name in ("weight", "bias", "norm")}
            branches.append((turned * spatial_gate(turned, own, order, gate, max_grad)).permute(turn))
    return branches
