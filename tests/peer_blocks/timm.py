"""timm's GatherExcite with its device and dtype passed by name: as it is released it raises TypeError where it has parameters."""

import math

import torch.nn.functional as F
from torch import nn


class ConvMlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer=nn.ReLU, drop=0.0):
        super().__init__()
        self.fc1 = nn.Conv2d(in_features, hidden_features, kernel_size=1)
        self.norm = nn.Identity()
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden_features, in_features, kernel_size=1)

    def forward(self, x):
        return self.fc2(self.drop(self.act(self.norm(self.fc1(x)))))


class GatherExcite(nn.Module):
    def __init__(self, channels, feat_size=None, extra_params=False, extent=0, use_mlp=True, rd_channels=None, add_maxpool=False, act_layer=nn.ReLU):
        super().__init__()
        self.add_maxpool = add_maxpool
        self.extent = extent
        self.gather = None
        if extra_params:
            self.gather = nn.Sequential()
            if extent == 0:
                padding = tuple((size - 1) // 2 for size in feat_size)
                self.gather.add_module("conv1", nn.Conv2d(channels, channels, feat_size, padding=padding, groups=channels, bias=False))
                self.gather.add_module("norm1", nn.BatchNorm2d(channels))
            num_conv = int(math.log2(extent)) if extent else 0
            for i in range(num_conv):
                self.gather.add_module(f"conv{i + 1}", nn.Conv2d(channels, channels, 3, 2, 1, groups=channels, bias=False))
                self.gather.add_module(f"norm{i + 1}", nn.BatchNorm2d(channels))
                if i != num_conv - 1:
                    self.gather.add_module(f"act{i + 1}", act_layer(inplace=True))
        self.gk, self.gs = (extent * 2 - 1, extent) if extent else (0, 0)
        self.mlp = ConvMlp(channels, rd_channels or max(1, round(channels / 16)), act_layer) if use_mlp else nn.Identity()
        self.gate = nn.Sigmoid()

    def forward(self, x):
        size = x.shape[-2:]
        if self.gather is not None:
            x_ge = self.gather(x)
        elif self.extent == 0:
            x_ge = x.mean(dim=(2, 3), keepdim=True)
            if self.add_maxpool:
                x_ge = 0.5 * x_ge + 0.5 * x.amax((2, 3), keepdim=True)
        else:
            x_ge = F.avg_pool2d(x, kernel_size=self.gk, stride=self.gs, padding=self.gk // 2, count_include_pad=False)
        x_ge = self.mlp(x_ge)
        if x_ge.shape[-1] != 1 or x_ge.shape[-2] != 1:
            x_ge = F.interpolate(x_ge, size=size)
        return x * self.gate(x_ge)
