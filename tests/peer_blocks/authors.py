"""CBAM as in its authors' repository, Jongchan/attention-module."""

import torch
import torch.nn.functional as F
from torch import nn


class BasicConv(nn.Module):
    def __init__(self, in_planes, out_planes, kernel_size, padding):
        super().__init__()
        self.conv = nn.Conv2d(in_planes, out_planes, kernel_size, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_planes, momentum=0.01)
        self.relu = None

    def forward(self, x):
        return self.bn(self.conv(x))


class Flatten(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


def logsumexp_2d(x):
    flat = x.view(*x.shape[:2], -1)
    largest = flat.max(2, keepdim=True)[0]
    return largest + (flat - largest).exp().sum(2, keepdim=True).log()


class ChannelGate(nn.Module):
    def __init__(self, gate_channels, reduction_ratio, pool_types):
        super().__init__()
        hidden = gate_channels // reduction_ratio
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(Flatten(), nn.Linear(gate_channels, hidden), nn.ReLU(), nn.Linear(hidden, gate_channels))
        self.pool_types = pool_types

    def forward(self, x):
        window = x.shape[2:]
        pools = {
            "avg": lambda: F.avg_pool2d(x, window, stride=window),
            "max": lambda: F.max_pool2d(x, window, stride=window),
            "lp": lambda: F.lp_pool2d(x, 2, window, stride=window),
            "lse": lambda: logsumexp_2d(x),
        }
        logits = sum(self.mlp(pools[name]()) for name in self.pool_types)
        return x * torch.sigmoid(logits)[:, :, None, None].expand_as(x)


class ChannelPool(nn.Module):
    def forward(self, x):
        return torch.stack((x.max(1)[0], x.mean(1)), 1)


class SpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.compress = ChannelPool()
        self.spatial = BasicConv(2, 1, 7, padding=3)

    def forward(self, x):
        return x * torch.sigmoid(self.spatial(self.compress(x)))


class CBAM(nn.Module):
    def __init__(self, gate_channels, reduction_ratio=16, pool_types=("avg", "max"), no_spatial=False):
        super().__init__()
        self.ChannelGate = ChannelGate(gate_channels, reduction_ratio, pool_types)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = SpatialGate()

    def forward(self, x):
        x = self.ChannelGate(x)
        return x if self.no_spatial else self.SpatialGate(x)
