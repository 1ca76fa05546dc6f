"""The modules against formulas written out here, on the path of the machine: fused, and with every layer called as a module."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from mirrored import Mirrored
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm

from tritattn import nn as tn
from tritattn.nn._base import ChannelGate

C = 12


def mean(x):
    return x.flatten(2).mean(2)


def largest(x, even=False):
    return x.flatten(2).amax(2) if even else x.flatten(2).max(2)[0]


def dense(layer, z):
    return F.linear(z, layer.weight.flatten(1), layer.bias)


def mlp(m, z, act=torch.relu):
    return dense(m.fc2, act(dense(m.fc1, z)))


def over(s, x):
    return s.reshape(*s.shape, *(1,) * (x.dim() - 2))


def spatial_logits(m, x, order=("max", "mean"), even=False):
    top = x.amax(1) if even else x.max(1)[0]
    statistics = {"mean": x.mean(1), "max": top, "mix": (x.mean(1) + top) / 2}
    stacked = torch.stack([statistics[name] for name in order], 1)
    return F.conv2d(stacked, m.conv.weight, m.conv.bias, padding=m.conv.weight.shape[-1] // 2)


def normed(bn, t):
    over_all = {"dim": (0, 2, 3), "keepdim": True}
    statistics = (t.mean(**over_all), t.var(unbiased=False, **over_all)) if bn.training else (bn.running_mean, bn.running_var)
    mean, var, weight, bias = (s.reshape(1, -1, 1, 1) for s in (*statistics, bn.weight, bn.bias))
    return (t - mean) / (var + bn.eps).sqrt() * weight + bias


def circular(m, z):
    k = m.conv.weight.shape[-1]
    shifted = [w * z.roll(k // 2 - j, 1) for j, w in enumerate(m.conv.weight.flatten())]
    return sum(shifted)


def cbam(m, x, bn=True):
    u = x * over(torch.sigmoid(mlp(m.channel, mean(x)) + mlp(m.channel, largest(x))), x)
    q = spatial_logits(m.spatial, u)
    return u * torch.sigmoid(normed(m.spatial.bn, q) if bn else q)


def shuffled(m, x):
    """Plane by plane: output 2 i is plane i, output 2 i + 1 is plane i + C / 2."""
    planes, group, half = x.unbind(1), C // m.groups, C // (2 * m.groups)
    gated = []
    for c, plane in enumerate(planes):
        flat, k = plane.flatten(1), c % group % half
        if c % group < half:
            t = m.cweight.flatten()[k] * flat.mean(1, keepdim=True) + m.cbias.flatten()[k]
        else:
            normed = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + m.gn.eps).sqrt()
            t = m.sweight.flatten()[k] * (normed * m.gn.weight[k] + m.gn.bias[k]) + m.sbias.flatten()[k]
        gated.append((flat * torch.sigmoid(t)).view_as(plane))
    return torch.stack([gated[c // 2 + c % 2 * (C // 2)] for c in range(C)], 1)


def local_means(x, e):
    rows = []
    for h in range(0, x.shape[2], e):
        band = x[:, :, max(h - e + 1, 0) : h + e]
        rows.append(torch.stack([band[..., max(w - e + 1, 0) : w + e].mean((2, 3)) for w in range(0, x.shape[3], e)], -1))
    return torch.stack(rows, 2)


def spread(small, x):
    rows, columns = (torch.arange(size) * s // size for size, s in zip(x.shape[2:], small.shape[2:], strict=True))
    return small[:, :, rows][..., columns]


def pointwise_mlp(m, z, act=torch.relu):
    return F.conv2d(act(F.conv2d(z, m.fc1.weight, m.fc1.bias)), m.fc2.weight, m.fc2.bias)


def ge_se(m, x):
    z = ((mean(x) + largest(x)) / 2)[:, :, None, None]
    return x * torch.sigmoid(pointwise_mlp(m.mlp, z, F.silu))


def depthwise(m, x, count):
    for i in range(1, count + 1):
        x = F.conv2d(x, m.get_submodule(f"conv{i}").weight, stride=2, padding=1, groups=C)
        bn, dims = m.get_submodule(f"norm{i}"), (0, 2, 3)
        mu, var = (x.mean(dims), x.var(dims, unbiased=False)) if bn.training else (bn.running_mean, bn.running_var)
        x = ((x.movedim(1, -1) - mu) * (var + bn.eps).rsqrt() * bn.weight + bn.bias).movedim(-1, 1)
        x = torch.relu(x) if i < count else x
    return x


def simam(m, x):
    d = (x - over(mean(x), x)).square()
    return x * torch.sigmoid(d / (4 * (over(d.flatten(2).sum(2), x) / (x[0, 0].numel() - 1) + m.e_lambda)) + 0.5)
def context(m, t):
    return normed(m.bn2, F.conv2d(torch.relu(normed(m.bn1, F.conv2d(t, m.fc1.weight, m.fc1.bias))), m.fc2.weight, m.fc2.bias))


def contexts(local, pooled, t):
    return torch.sigmoid(context(local, t) + context(pooled, t.mean((2, 3), keepdim=True)))


def aff(m, x, r, factor):
    w = contexts(m.local, m.pooled, x + r)
    return factor * (x * w + r * (1 - w))


def iaff(m, x, r, reuse=False):
    w = contexts(m.local2, m.pooled if reuse else m.pooled2, aff(m, x, r, 1))
    return x * w + r * (1 - w)


def coordinate(m, x, act=F.hardswish, gate=torch.sigmoid):
    u = torch.cat([x.mean(3), x.mean(2)], 2)
    u = torch.einsum("rc,ncl->nrl", m.conv1.weight.flatten(1), u) + (0 if m.conv1.bias is None else m.conv1.bias[:, None])
    if m.bn1 is not None:
        mean, var = (u.mean((0, 2)), u.var((0, 2), unbiased=False)) if m.training else (m.bn1.running_mean, m.bn1.running_var)
        scale = m.bn1.weight / (var + m.bn1.eps).sqrt()
        u = (u - mean[:, None]) * scale[:, None] + m.bn1.bias[:, None]
    u = act(u)
    rows, columns = (
        torch.einsum("cr,nrl->ncl", conv.weight.flatten(1), part) + (0 if conv.bias is None else conv.bias[:, None])
        for conv, part in ((m.conv_h, u[..., : x.shape[2]]), (m.conv_w, u[..., x.shape[2] :]))
    )
    rows, columns = rows[..., None], columns[..., None, :]
    return gate(rows + columns) if m.combine == "logits" else gate(rows) * gate(columns)


def strips(m, x):
    """Logits of rows [N, C, H, 1] and of columns [N, C, 1, W]."""
    found = []
    for conv, norm, mean in ((m.conv_h, m.norm_h, x.mean(3)), (m.conv_w, m.norm_w, x.mean(2))):
        k = max(conv.weight.shape[2:])
        t = F.conv1d(mean, conv.weight.reshape(C, 1, k), conv.bias, padding=k // 2, groups=C)
        if norm is not None:
            t = (t - t.mean((1, 2), keepdim=True)) / (t.var((1, 2), unbiased=False, keepdim=True) + norm.eps).sqrt()
            t = t * norm.weight[:, None] + norm.bias[:, None]
        found.append(t)
    return found[0][..., None], found[1][..., None, :]


def triplet(m, x, order=("max", "mean"), even=False):
    gated = []
    for half, turn in ((m.cw, (0, 2, 1, 3)), (m.hc, (0, 3, 2, 1)), (m.hw, (0, 1, 2, 3))):
        if half is not None:
            turned = x.permute(turn)
            logits = spatial_logits(half, turned, order, even)
            gated.append((turned * torch.sigmoid(logits if half.bn is None else normed(half.bn, logits))).permute(turn))
    return sum(gated) / len(gated)


def branches(m, x):
    return over(m.channel.mlp(mean(x)), x), m.spatial.convs(x)


def selected(branches, fc1, bn, fc2s, act=torch.relu, groups=1):
    """sum_k softmax_k(fc2_k(act(bn(fc1(mean of the sum))))) branches_k, fc2's rows in `groups` of K."""
    stacked = torch.stack(branches, 1)
    h = F.conv2d(mean(stacked.sum(1))[..., None, None], fc1.weight, fc1.bias, groups=groups)
    if bn is not None:
        running = () if bn.training else (bn.running_mean, bn.running_var)
        h = F.batch_norm(h, *(running or (None, None)), bn.weight, bn.bias, bn.training)
    logits = torch.cat([F.conv2d(act(h), fc2.weight, fc2.bias, groups=groups) for fc2 in fc2s], 1)
    weights = logits.view(len(h), groups, len(branches), -1).transpose(1, 2).flatten(2).softmax(1)
    return (stacked * weights[..., None, None]).sum(1)


def split(m, x):
    u = m.conv(x) if m.bn0 is None else m.bn0(m.conv(x))
    return selected(torch.relu(u).chunk(m.radix, 1), m.fc1, m.bn1, [m.fc2], groups=m.cardinality)


def bottleneck(m, z):
    h = m.fc1(z[..., None, None]).flatten(1)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + m.norm.eps).sqrt()
    return m.fc2(F.relu(h * m.norm.weight.flatten() + m.norm.bias.flatten())[..., None, None])


def global_context(m, x):
    a = m.attn(x).flatten(1).exp()
    context = torch.einsum("np,ncp->nc", a / a.sum(1, keepdim=True), x.flatten(2))
    return x * torch.sigmoid(bottleneck(m.scale, context)) + bottleneck(m.add, context)


def second_order(m, x):
    u = F.relu(m.bn(m.conv(F.relu(x)))).flatten(2)
    products = torch.einsum("nip,njp->nij", u, u) / u.shape[2]
    covariance = products - u.mean(2)[:, :, None] * u.mean(2)[:, None, :]
    return x * torch.sigmoid(m.fc(m.row_conv(m.row_bn(covariance[..., None]))))


# name -> (module, its definition, ranks of x)
BLOCKS = {
    "se": (lambda: tn.SqueezeExcite(C), lambda m, x: x * over(torch.sigmoid(mlp(m, mean(x))), x), (3, 4, 5)),
    "se-options": (
        lambda: tn.SqueezeExcite(C, pool="avg_max", bias=False, act="silu", gate="hard_sigmoid", max_grad="even"),
        lambda m, x: x * over(F.hardsigmoid(mlp(m, (mean(x) + largest(x, True)) / 2, F.silu)), x),
        (3, 4, 5),
    ),
    "se-residual-relu": (
        lambda: tn.SqueezeExcite(C, residual=True, activation="relu"),
        lambda m, x: torch.relu(x * over(torch.sigmoid(mlp(m, mean(x))), x) + x),
        (4,),
    ),
    "se-relu-gate": (
        lambda: tn.SqueezeExcite(C, act="leaky_relu", gate="relu"),
        lambda m, x: x * over(torch.relu(mlp(m, mean(x), F.leaky_relu)), x),
        (4,),
    ),
    "ese": (
        lambda: tn.EffectiveSqueezeExcite(C),
        lambda m, x: x * over(F.hardsigmoid(dense(m.fc, mean(x))), x),
        (3, 4, 5),
    ),
    "eca": (
        lambda: tn.ECA(C, kernel_size=5, bias=True),
        lambda m, x: x * over(torch.sigmoid(F.conv1d(mean(x)[:, None], m.conv.weight, m.conv.bias, padding=2)[:, 0]), x),
        (3, 4, 5),
    ),
    "eca-circular": (
        lambda: tn.ECA(C, kernel_size=3, padding="circular", activation="gelu"),
        lambda m, x: F.gelu(x * over(torch.sigmoid(circular(m, mean(x))), x)),
        (4,),
    ),
    "cse": (lambda: tn.ChannelSE(C, act="none"), lambda m, x: x * over(torch.sigmoid(mlp(m, mean(x), lambda t: t)), x), (3, 4, 5)),
    "sse": (lambda: tn.SpatialSE(C), lambda m, x: x * torch.sigmoid(F.conv2d(x, m.conv.weight, m.conv.bias)), (4,)),
    "scse": (
        lambda: tn.ConcurrentSE(C),
        lambda m, x: x * over(torch.sigmoid(mlp(m.channel, mean(x))), x)
        + x * torch.sigmoid(F.conv2d(x, m.spatial.conv.weight, m.spatial.conv.bias)),
        (4,),
    ),
    "scse-max": (
        lambda: tn.ConcurrentSE(C, combine="max", bias=False, activation="silu"),
        lambda m, x: F.silu(
            torch.maximum(
                x * over(torch.sigmoid(mlp(m.channel, mean(x))), x), x * torch.sigmoid(F.conv2d(x, m.spatial.conv.weight))
            )
        ),
        (4,),
    ),
    "channel": (
        lambda: tn.ChannelAttention(C, rd_ratio=1 / 4, pools=("avg", "max", "lp", "lse")),
        lambda m, x: x
        * over(torch.sigmoid(sum(mlp(m, z) for z in (mean(x), largest(x), x.flatten(2).norm(dim=2), x.flatten(2).logsumexp(2)))), x),
        (3, 4, 5),
    ),
    "channel-fc-gate": (
        lambda: tn.ChannelAttention(C, bottleneck=False, pools=("avg",), apply=False),
        lambda m, x: over(torch.sigmoid(dense(m.fc2, mean(x))), x),
        (3, 4, 5),
    ),
    "spatial": (lambda: tn.SpatialAttention(C), lambda m, x: x * torch.sigmoid(normed(m.bn, spatial_logits(m, x))), (4,)),
    "spatial-mix-gate": (
        lambda: tn.SpatialAttention(C, 3, order="mix", norm=False, bias=True, gate="hard_sigmoid", max_grad="even", apply=False),
        lambda m, x: F.hardsigmoid(spatial_logits(m, x, ("mix",), True)),
        (4,),
    ),
    "cbam": (lambda: tn.CBAM(C, rd_ratio=1 / 4), cbam, (4,)),
    "cbam-residual-relu": (
        lambda: tn.CBAM(C, rd_ratio=1 / 4, norm=False, kernel_size=3, residual=True, activation="relu"),
        lambda m, x: torch.relu(cbam(m, x, bn=False) + x),
        (4,),
    ),
    "shuffle": (lambda: tn.ShuffleAttention(C, groups=3), shuffled, (3, 4, 5)),
    "simam": (lambda: tn.SimAM(e_lambda=0.1, activation="relu"), lambda m, x: torch.relu(simam(m, x)), (3, 4, 5)),
    "coordinate": (lambda: tn.CoordinateAttention(C, bias=False), lambda m, x: x * coordinate(m, x), (4,)),
    "coordinate-logits": (
        lambda: tn.CoordinateAttention(C, 1 / 4, rd_divisor=2, act="silu", norm=False, combine="logits", gate="hard_sigmoid", residual=True),
        lambda m, x: x * coordinate(m, x, F.silu, F.hardsigmoid) + x,
        (4,),
    ),
    "strip": (lambda: tn.StripAttention(C, bias=True), lambda m, x: x * torch.sigmoid(sum(strips(m, x))), (4,)),
    "strip-product": (
        lambda: tn.StripAttention(C, 5, act="silu", norm=True, combine="product", activation="relu"),
        lambda m, x: torch.relu(x * math.prod(torch.sigmoid(F.silu(t)) for t in strips(m, x))),
        (4,),
    ),
    "triplet": (lambda: tn.TripletAttention(C), triplet, (4,)),
    "triplet-two": (
        lambda: tn.TripletAttention(C, 3, spatial=False, order="mean_max", norm=False, bias=True, max_grad="even", activation="silu"),
        lambda m, x: F.silu(triplet(m, x, ("mean", "max"), True)),
        (4,),
    ),
    "ge": (lambda: tn.GatherExcite(extent=2, use_mlp=False), lambda m, x: x * spread(torch.sigmoid(local_means(x, 2)), x), (4,)),
    "ge-mlp": (
        lambda: tn.GatherExcite(C, extent=4, rd_channels=3, act="gelu", gate="hard_sigmoid", activation="silu"),
        lambda m, x: F.silu(x * spread(F.hardsigmoid(pointwise_mlp(m.mlp, local_means(x, 4), F.gelu)), x)),
        (4,),
    ),
    "ge-global": (lambda: tn.GatherExcite(use_mlp=False), lambda m, x: x * over(torch.sigmoid(mean(x)), x), (4,)),
    "ge-se": (lambda: tn.GatherExcite(C, pool="avg_max", act="silu"), ge_se, (4,)),
    "ge-params": (
        lambda: tn.GatherExcite(C, None, True, 4, residual=True),
        lambda m, x: x * spread(torch.sigmoid(pointwise_mlp(m.mlp, depthwise(m.gather, x, 2))), x) + x,
        (4,),
    ),
    "ge-whole": (
        lambda: tn.GatherExcite(C, (6, 7), True, use_mlp=False, norm=False),
        lambda m, x: x * torch.sigmoid((x * m.gather.conv1.weight[:, 0]).sum((2, 3), keepdim=True)),
        (4,),
    ),
    "bam": (lambda: tn.BAM(C, 1 / 4, dilation=2), lambda m, x: x * (1 + torch.sigmoid(branches(m, x)[0] * branches(m, x)[1])), (4,)),
    "bam-paper": (
        lambda: tn.BAM(C, 1 / 2, num_layers=2, dilated_convs=1, dilation=1, norm="last", combine="sum", gate="hard_sigmoid", activation="silu"),
        lambda m, x: F.silu(x * (1 + F.hardsigmoid(sum(branches(m, x))))),
        (4,),
    ),
    "bam-channel": (lambda: tn.BAMChannelGate(C, 1 / 4), lambda m, x: over(m.mlp(mean(x)), x).expand_as(x), (4,)),
    "bam-spatial": (lambda: tn.BAMSpatialGate(C, 1 / 4), lambda m, x: m.convs(x).expand_as(x), (4,)),
    "mscam": (
        lambda: tn.MSCAM(C, rd_channels=9, residual=True, activation="relu"),
        lambda m, x: torch.relu(x * contexts(m.local, m.pooled, x) + x),
        (4,),
    ),
    "aff": (lambda: Mirrored(tn.AFF(C, 1, activation="relu")), lambda m, x: torch.relu(aff(m.block, x, x.flip(-1), 2)), (4,)),
    "aff-paper": (lambda: Mirrored(tn.AFF(C, 1, factor=1)), lambda m, x: aff(m.block, x, x.flip(-1), 1), (4,)),
    "iaff": (lambda: Mirrored(tn.IAFF(C, 1)), lambda m, x: iaff(m.block, x, x.flip(-1)), (4,)),
    "sk": (
        lambda: tn.SelectiveKernel(C, rd_channels=5, groups=2, activation="silu"),
        lambda m, x: F.silu(
            selected([torch.relu(path(x)) for path in m.paths], m.attn.fc_reduce, m.attn.bn, [m.attn.fc_select])
        ),
        (4,),
    ),
    "sk-options": (
        lambda: tn.SelectiveKernel(
            C, kernel_size=(1, 3, 5), keep_3x3=False, split_input=True, norm=False, bias=True, select_bias=True, separate=True, act="none",
            residual=True,
        ),
        lambda m, x: x
        + selected(
            [torch.relu(path(part)) for path, part in zip(m.paths, x.chunk(3, 1), strict=True)], m.attn.fc_reduce, None, m.attn.fc_select,
            lambda t: t,
        ),
        (4,),
    ),
    "splat": (lambda: tn.SplitAttention(C, groups=2, rd_channels=6), split, (4,)),
    "splat-options": (lambda: tn.SplitAttention(C, radix=3, rd_channels=6, norm=False, residual=True), lambda m, x: split(m, x) + x, (4,)),
    "gc": (lambda: tn.GlobalContext(C, rd_channels=6, fuse_scale=True), global_context, (4,)),
    "gsop": (lambda: tn.GSoP(C, 5, activation="relu"), lambda m, x: torch.relu(second_order(m, x)), (4,)),
    "attention": (
        lambda: tn.Attention(nn.Sequential(nn.Conv2d(C, 1, 1), nn.Sigmoid())),
        lambda m, x: x * torch.sigmoid(F.conv2d(x, m.layer[0].weight, m.layer[0].bias)),
        (4,),
    ),
    "attention-options": (
        lambda: tn.Attention(nn.AdaptiveAvgPool2d(1), gate="sigmoid", residual=True, activation="hardswish"),
        lambda m, x: F.hardswish(x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + x),
        (4,),
    ),
}


def build(name):
    torch.manual_seed(0)
    module = BLOCKS[name][0]().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))  # no bias and no norm stays at its neutral value
    return module


def sample(rank, ties=False):
    size = {3: (11,), 4: (6, 7), 5: (3, 4, 2)}[rank]
    x = torch.randn(3, C, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (2 * x).round().relu() / 2 if ties else x


def trace(function, module, x):
    """Output, and gradients of the input and of every parameter."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
        assert bool(t.abs().max() > 0) or name == "attn.bias", f"{name} is zero and shows nothing"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("ties", [False, True], ids=["smooth", "ties"])
@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, (_, _, ranks) in BLOCKS.items() for rank in ranks])
def test_definition(name, rank, ties, training):
    module = build(name).train(training)
    x = sample(rank, ties)
    assert_same(trace(module, module, x), trace(lambda t: BLOCKS[name][1](module, t), module, x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("name", "rank"), [(name, rank) for name, (_, _, ranks) in BLOCKS.items() for rank in ranks])
def test_hooked_layers_are_called(name, rank, training):
    """A hook on a layer runs, and changes nothing else: outputs, gradients and BatchNorm's buffers are those of the fused pass."""
    fused = build(name).train(training)
    hooked = copy.deepcopy(fused)
    layers = {name: m for name, m in hooked.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm))}
    calls = set()
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: calls.add(path))
    x = sample(rank, ties=True)
    assert_same(trace(hooked, hooked, x), trace(fused, fused, x))
    assert calls == set(layers)
    for (key, ours), theirs in zip(hooked.named_buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0, msg=lambda text, key=key: f"{key}: {text}")


HALVES = {"cbam": ("channel", "spatial"), "cbam-residual-relu": ("channel", "spatial"), "scse": ("channel", "spatial")}
HALVES |= {"scse-max": ("channel", "spatial"), "bam": ("channel", "spatial"), "bam-paper": ("channel", "spatial")}
HALVES |= {"triplet": ("cw", "hc", "hw"), "triplet-two": ("cw", "hc"), "sk": ("attn",), "sk-options": ("attn",)}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of SK's attention, which takes a list of maps
@pytest.mark.parametrize(("name", "half"), [(name, half) for name, halves in HALVES.items() for half in halves])
def test_hooked_halves_are_called(name, half, training):
    fused = build(name).train(training)
    hooked, calls = copy.deepcopy(fused), []
    part = hooked.get_submodule(half)
    part.register_forward_pre_hook(lambda *_: calls.append("pre"))
    part.register_forward_hook(lambda *_: calls.append("forward"))
    part.register_full_backward_hook(lambda *_: calls.append("backward"))
    x = sample(4, ties=True)
    assert_same(trace(hooked, hooked, x), trace(fused, fused, x))
    assert calls == ["pre", "forward", "backward"]
    part.register_forward_hook(lambda m, args, y: 2 * y)
    assert not torch.allclose(hooked(x), fused(x))


def test_replaced_halves_are_called():
    module, x = build("cbam"), sample(4)
    module.spatial = nn.Identity()
    torch.testing.assert_close(module(x), module.channel(x))
    assert "Identity" in repr(module)
    module = build("scse")
    module.channel = nn.Identity()
    torch.testing.assert_close(module(x), x + module.spatial(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(module))(x), module(x))
    with pytest.raises(ValueError, match=r"^residual: got "):
        module(x, x[:, :1])


@pytest.mark.parametrize("name", ["se", "cbam", "sse", "scse-max", "attention"])
def test_residual_argument(name):
    module = build(name).eval()
    x, r = sample(4), sample(4, ties=True)
    activation = {"scse-max": F.silu}.get(name, lambda t: t)
    plain = copy.deepcopy(module)
    plain.activation = "none"
    torch.testing.assert_close(module(x, r), activation(plain(x) + r))


PRECEDED = [name for name in BLOCKS if isinstance(build(name), ChannelGate)]


@pytest.mark.parametrize("hooked", [False, True], ids=["fused", "hooked"])
@pytest.mark.parametrize("name", PRECEDED)
def test_what_stands_before_a_channel_gate(name, hooked):
    module, norm, x = build(name), nn.BatchNorm2d(C).double().eval(), sample(4)
    with torch.no_grad():
        for t in (*norm.parameters(), norm.running_mean, norm.running_var):
            t.uniform_(0.5, 1.5)
    r = None if name.endswith("gate") else sample(4, ties=True)
    expected = module(F.silu(norm(x)), r)
    if hooked:
        next(layer for layer in module.modules() if isinstance(layer, (nn.Conv1d, nn.Conv2d))).register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(x, r, "silu", norm), expected)
    torch.testing.assert_close(module(x, r, before="silu", before_norm=norm.requires_grad_(False)), expected)
    with pytest.raises(ValueError, match=r"^before: got 'tanh'"):
        module(x, r, before="tanh")


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.l1_unstructured(layer, "bias", 1),
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["prune", "prune-bias", "weight_norm", "spectral_norm", "new-weight_norm", "new-spectral_norm"],
)
@pytest.mark.parametrize("name", ["se", "channel", "cbam"])
def test_weights_are_read_at_call_time(name, change):
    module = build(name).eval()
    change((module if name == "se" else getattr(module, "channel", module)).fc1)
    before = module(sample(4))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(1.5)
    x = sample(4)
    found = trace(module, module, x)
    assert not torch.equal(found["y"], before)
    for m in module.modules():  # as a call of the layers would leave them
        for hook in m._forward_pre_hooks.values():
            hook(m, None)
    assert_same(found, trace(lambda t: BLOCKS[name][1](module, t), module, x))


def test_replaced_layers_are_called():
    class LowRank(nn.Module):
        """An adapter around a layer, whose weight still looks like the layer's."""

        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.delta = nn.Parameter(0.1 * torch.ones_like(layer.weight))

        weight = property(lambda self: self.layer.weight)
        bias = property(lambda self: self.layer.bias)

        def forward(self, x):
            return self.layer(x) + F.conv2d(x, self.delta)

    module = build("se")
    expected = copy.deepcopy(module)
    module.fc1 = LowRank(module.fc1)
    with torch.no_grad():
        expected.fc1.weight.add_(0.1)
    torch.testing.assert_close(module(sample(4)), expected(sample(4)))


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        # numbers of timm's networks: rounded to a multiple of 8, at least 8
        ({"channels": 64}, 8),
        ({"channels": 72}, 8),
        ({"channels": 256}, 16),
        ({"channels": 2048}, 128),
        ({"channels": 200, "rd_ratio": 0.25}, 48),
        ({"channels": 100, "rd_ratio": 0.25, "rd_divisor": 1}, 25),
        # channels // r
        ({"channels": 40, "rd_divisor": None}, 2),
        ({"channels": 49, "rd_ratio": 1 / 49, "rd_divisor": None}, 1),
        ({"channels": 8, "rd_divisor": None}, 1),
        ({"channels": 96, "rd_channels": 7}, 7),
    ],
)
def test_reduction_rules(arguments, width):
    assert tn.SqueezeExcite(**arguments).fc1.out_channels == width


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (12, 2), (64, 32), (192, 32), (256, 64), (2048, 64)])
def test_groups_of_shuffle_attention(channels, groups):
    assert tn.ShuffleAttention(channels).groups == groups


@pytest.mark.parametrize(
    ("channels", "rule", "k"),
    [(4, "authors", 1), (4, "timm", 3), (64, "timm", 3), (128, "timm", 5), (1024, "timm", 5), (2048, "timm", 7), (2048, "authors", 7)],
)
def test_eca_kernel_rule(channels, rule, k):
    assert tn.ECA(channels, rule=rule).conv.kernel_size == (k,)


KEYS = {
    tn.SqueezeExcite: {"fc1.weight": (1, 8, 1, 1), "fc1.bias": (1,), "fc2.weight": (8, 1, 1, 1), "fc2.bias": (8,)},
    tn.EffectiveSqueezeExcite: {"fc.weight": (8, 8, 1, 1), "fc.bias": (8,)},
    tn.ECA: {"conv.weight": (1, 1, 3)},
    tn.ChannelSE: {"fc1.weight": (4, 8, 1, 1), "fc1.bias": (4,), "fc2.weight": (8, 4, 1, 1), "fc2.bias": (8,)},
    tn.SpatialSE: {"conv.weight": (1, 8, 1, 1), "conv.bias": (1,)},
    tn.ChannelAttention: {"fc1.weight": (1, 8, 1, 1), "fc1.bias": (1,), "fc2.weight": (8, 1, 1, 1), "fc2.bias": (8,)},
    tn.SpatialAttention: {
        "conv.weight": (1, 2, 7, 7),
        **{f"bn.{key}": (1,) for key in ("weight", "bias", "running_mean", "running_var")},
        "bn.num_batches_tracked": (),
    },
}
KEYS[tn.ShuffleAttention] = {f"{gate}{part}": (1, 2, 1, 1) for gate in "cs" for part in ("weight", "bias")} | {"gn.weight": (2,), "gn.bias": (2,)}
KEYS[tn.GatherExcite] = {
    **{"mlp.fc1.weight": (1, 8, 1, 1), "mlp.fc1.bias": (1,), "mlp.fc2.weight": (8, 1, 1, 1), "mlp.fc2.bias": (8,)},
    **{f"gather.norm1.{key}": (8,) for key in ("weight", "bias", "running_mean", "running_var")},
    "gather.conv1.weight": (8, 1, 3, 3),
    "gather.norm1.num_batches_tracked": (),
}
CONTEXT = {"fc1.weight": (2, 8, 1, 1), "fc1.bias": (2,), "fc2.weight": (8, 2, 1, 1), "fc2.bias": (8,)}
for bn, size in (("bn1", 2), ("bn2", 8)):
    CONTEXT |= {f"{bn}.{key}": (size,) for key in ("weight", "bias", "running_mean", "running_var")} | {f"{bn}.num_batches_tracked": ()}
for kind in (tn.MSCAM, tn.AFF, tn.IAFF):
    KEYS[kind] = {f"{part}.{k}": v for part in kind.layers for k, v in CONTEXT.items()}
KEYS[tn.ConcurrentSE] = {f"{half}.{k}": v for half, kind in (("channel", tn.ChannelSE), ("spatial", tn.SpatialSE)) for k, v in KEYS[kind].items()}
KEYS[tn.CBAM] = {
    f"{half}.{k}": v for half, kind in (("channel", tn.ChannelAttention), ("spatial", tn.SpatialAttention)) for k, v in KEYS[kind].items()
}
TWO_MAPS = (tn.AFF, tn.IAFF)
KEYS[tn.GlobalContext] = {"attn.weight": (1, 8, 1, 1), "attn.bias": (1,)}
for layer, size in {"fc1": (1, 8, 1, 1), "norm": (1, 1, 1), "fc2": (8, 1, 1, 1)}.items():
    KEYS[tn.GlobalContext] |= {f"add.{layer}.weight": size, f"add.{layer}.bias": size if layer == "norm" else size[:1]}
KEYS[tn.GSoP] = {}
for layer, size in {"conv": (4, 8, 1, 1), "row_conv": (16, 1, 4, 1), "fc": (8, 16, 1, 1)}.items():
    KEYS[tn.GSoP] |= {f"{layer}.weight": size, f"{layer}.bias": size[:1]}
for layer in ("bn", "row_bn"):
    KEYS[tn.GSoP] |= {f"{layer}.{key}": (4,) for key in ("weight", "bias", "running_mean", "running_var")} | {f"{layer}.num_batches_tracked": ()}
OPTIONS = {tn.SqueezeExcite: {"rd_divisor": None}, tn.ShuffleAttention: {"groups": 2}, tn.GatherExcite: {"extra_params": True, "extent": 2}}
OPTIONS[tn.GSoP] = {"dim": 4}


def _norm_keys(path, c):
    return {**{f"{path}.{key}": (c,) for key in ("weight", "bias", "running_mean", "running_var")}, f"{path}.num_batches_tracked": ()}


KEYS[tn.SelectiveKernel] = {
    **{f"paths.{k}.conv.weight": (8, 8, 3, 3) for k in range(2)}, **_norm_keys("paths.0.bn", 8), **_norm_keys("paths.1.bn", 8),
    **_norm_keys("attn.bn", 32), "attn.fc_reduce.weight": (32, 8, 1, 1), "attn.fc_select.weight": (16, 32, 1, 1),
}  # fmt: skip
KEYS[tn.SplitAttention] = {
    "conv.weight": (16, 4, 3, 3), **_norm_keys("bn0", 16), **_norm_keys("bn1", 32), "fc1.weight": (32, 8, 1, 1), "fc1.bias": (32,),
    "fc2.weight": (16, 32, 1, 1), "fc2.bias": (16,),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEYS, ids=lambda kind: kind.__name__)
def test_parameters(kind):
    """Names and shapes are a contract with checkpoints; device and dtype reach every layer; modules copy and pickle."""
    module = kind(8, **OPTIONS.get(kind, {}))
    assert {key: tuple(t.shape) for key, t in module.state_dict().items()} == KEYS[kind]
    assert all(t.is_meta for t in kind(8, device="meta", **OPTIONS.get(kind, {})).state_dict().values())
    half = kind(8, dtype=torch.bfloat16, **OPTIONS.get(kind, {}))
    assert {t.dtype for t in half.parameters()} == {torch.bfloat16}
    module.eval()
    maps = torch.randn(1 + (kind in TWO_MAPS), 2, 8, 5, 5)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(*maps), module(*maps))
    y = half(*maps.bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: tn.SqueezeExcite(0), "channels"),
        (lambda: tn.SqueezeExcite(8.0), "channels"),
        (lambda: tn.SqueezeExcite(8, rd_ratio=2), "rd_ratio"),
        (lambda: tn.SqueezeExcite(8, rd_channels=0), "rd_channels"),
        (lambda: tn.SqueezeExcite(8, rd_divisor=0), "rd_divisor"),
        (lambda: tn.SqueezeExcite(8, pool="max"), "pool"),
        (lambda: tn.SqueezeExcite(8, act="mish"), "act"),
        (lambda: tn.SqueezeExcite(8, gate="tanh"), "gate"),
        (lambda: tn.SqueezeExcite(8, max_grad="all"), "max_grad"),
        (lambda: tn.SqueezeExcite(8, activation="relu6"), "activation"),
        (lambda: tn.EffectiveSqueezeExcite(8, gate="tanh"), "gate"),
        (lambda: tn.ECA(), "channels"),
        (lambda: tn.ECA(8, 4), "kernel_size"),
        (lambda: tn.ECA(8, rule="mine"), "rule"),
        (lambda: tn.ECA(8, padding="reflect"), "padding"),
        (lambda: tn.ConcurrentSE(8, combine="mean"), "combine"),
        (lambda: tn.ChannelAttention(8, pools="avg"), "pools"),
        (lambda: tn.ChannelAttention(8, pools=("avg", "min")), "pools"),
        (lambda: tn.ChannelAttention(8, apply=False, activation="relu"), "apply"),
        (lambda: tn.SpatialAttention(8, 4), "kernel_size"),
        (lambda: tn.SpatialAttention(8, order="mean"), "order"),
        (lambda: tn.CBAM(8, spatial_gate="tanh"), "spatial_gate"),
        (lambda: tn.BAM(8, combine="max"), "combine"),
        (lambda: tn.BAM(8, norm="none"), "norm"),
        (lambda: tn.BAM(8, num_layers=0), "num_layers"),
        (lambda: tn.BAM(8, dilation=0), "dilation"),
        (lambda: tn.BAMSpatialGate(8)(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 2)), "residual"),
        (lambda: tn.ShuffleAttention(8, 3), "groups"),
        (lambda: tn.ShuffleAttention(7), "groups"),
        (lambda: tn.SimAM(e_lambda=0), "e_lambda"),
        (lambda: tn.GatherExcite(), "channels"),
        (lambda: tn.GatherExcite(8, extent=6), "extent"),
        (lambda: tn.GatherExcite(8, extra_params=True), "feat_size"),
        (lambda: tn.GatherExcite(8, padded=True), "padded"),
        (lambda: tn.GatherExcite(8, extent=2, pool="avg_max"), "pool"),
        (lambda: tn.AFF(0), "channels"),
        (lambda: tn.AFF(8, factor=3), "factor"),
        (lambda: tn.AFF(8)(torch.zeros(1, 8, 2, 2)), "residual"),
        (lambda: tn.AFF(8)(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 1)), "residual"),
        (lambda: tn.IAFF(8)(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 1)), "residual"),
        (lambda: tn.IAFF(8, gate="tanh"), "gate"),
        (lambda: tn.MSCAM(8, rd_channels=0), "rd_channels"),
        (lambda: tn.SelectiveKernel(9, split_input=True), "channels"),
        (lambda: tn.SelectiveKernel(8, kernel_size=(3, 4)), "kernel_size"),
        (lambda: tn.SelectiveKernel(8, kernel_size=(3,)), "num_paths"),
        (lambda: tn.SelectiveKernelAttention(8, path_act="tanh"), "path_act"),
        (lambda: tn.SelectiveKernelAttention(8, gate="tanh"), "gate"),
        (lambda: tn.SelectiveKernelAttention(8)((torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 1))), r"x\[1\]"),
        (lambda: tn.SelectiveKernel(8, groups=3), "groups"),
        (lambda: tn.SplitAttention(8, radix=0), "radix"),
        (lambda: tn.SplitAttention(9, 8, groups=2), "groups"),
        (lambda: tn.SplitAttention(8, groups=2, rd_channels=5), "groups"),
        (lambda: tn.SplitAttention(8, rd_min=0), "rd_min"),
        (lambda: tn.GlobalContext(8, pool="max"), "pool"),
        (lambda: tn.GlobalContext(8, fuse_add=False), "fuse_add"),
        (lambda: tn.GSoP(64, mode="both"), "mode"),
        (lambda: tn.GSoP(96, mode="concat"), "channels"),
        (lambda: tn.ISqrtCovPooling(8, iterations=0), "iterations"),
        (lambda: tn.ISqrtCovPooling(8, 0), "dim"),
        (lambda: tn.Attention(torch.sigmoid), "layer"),
    ],
)
def test_bad_options_are_named(build, argument):
    with pytest.raises(ValueError, match=rf"^{argument}: got "):
        build()


def test_global_context_starts_as_its_authors():
    """Their constructor leaves the map as it is, or halves it."""
    x = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(tn.GlobalContext(8)(x), x)
    torch.testing.assert_close(tn.GlobalContext(8, fuse_add=False, fuse_scale=True)(x), x / 2)


def test_repr_shows_the_options():
    text = repr(tn.CBAM(32, activation="relu"))
    for part in ("pools=('avg', 'max')", "act=relu", "order=max_mean", "activation=relu", "(fc1): Conv2d(32, 2"):
        assert part in text


@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_as_one_graph(name):
    torch.compiler.reset()
    module = build(name)
    x = sample(4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(trace(compiled, module, x), trace(module, module, x))


def test_script_is_refused_with_advice():
    with pytest.raises(RuntimeError, match=r"torch\.compile, torch\.export or torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(tn.SqueezeExcite(8)))


def test_sync_batch_norm_conversion():
    module = build("cbam").eval()
    x = sample(4)
    expected = module(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted.spatial.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)


@pytest.mark.filterwarnings("ignore")  # deprecated in favour of torchao, and still what many models use
def test_quantisation_aware_training_replaces_layers():
    module = build("se").float().train()
    module.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    prepared = torch.ao.quantization.prepare_qat(module)
    x = sample(4).float()
    y = prepared(x).detach()
    assert type(prepared.fc1) is not nn.Conv2d
    assert prepared.fc1.weight_fake_quant.activation_post_process.max_val.numel() > 0  # its observer saw the weight
    # int8 weights and activations: a gate within a few steps of 1 / 256
    assert float((y - module.eval()(x).detach()).abs().max()) < 0.1 * float(x.abs().max())


def test_parametrized_layers_stay_fused():
    """Reading a weight runs its parametrization, so no layer is called."""

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = build("se")
    x = sample(4)
    expected = copy.deepcopy(module)
    with torch.no_grad():
        expected.fc1.weight.mul_(2)
    parametrize.register_parametrization(module.fc1, "weight", Double())
    module.composed = None  # would raise
    torch.testing.assert_close(module(x), expected(x))
