"""Split attention as in its authors' repository, zhanghang1989/ResNeSt."""

import torch
import torch.nn.functional as F
from torch import nn


class rSoftMax(nn.Module):
    def __init__(self, radix, cardinality):
        super().__init__()
        self.radix = radix
        self.cardinality = cardinality

    def forward(self, x):
        batch = x.size(0)
        if self.radix == 1:
            return torch.sigmoid(x)
        x = x.view(batch, self.cardinality, self.radix, -1).transpose(1, 2)
        return F.softmax(x, dim=1).reshape(batch, -1)


class SplAtConv2d(nn.Module):
    def __init__(
        self, in_channels, channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True, radix=2, reduction_factor=4, norm_layer=None
    ):
        super().__init__()
        inter_channels = max(in_channels * radix // reduction_factor, 32)
        self.radix = radix
        self.cardinality = groups
        self.dropblock_prob = 0.0
        self.conv = nn.Conv2d(in_channels, channels * radix, kernel_size, stride, padding, dilation, groups * radix, bias)
        self.use_bn = norm_layer is not None
        if self.use_bn:
            self.bn0 = norm_layer(channels * radix)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(channels, inter_channels, 1, groups=groups)
        if self.use_bn:
            self.bn1 = norm_layer(inter_channels)
        self.fc2 = nn.Conv2d(inter_channels, channels * radix, 1, groups=groups)
        self.rsoftmax = rSoftMax(radix, groups)

    def forward(self, x):
        x = self.conv(x)
        if self.use_bn:
            x = self.bn0(x)
        x = self.relu(x)
        splits = torch.split(x, x.shape[1] // self.radix, dim=1)
        gap = self.fc1(F.adaptive_avg_pool2d(sum(splits), 1))
        if self.use_bn:
            gap = self.bn1(gap)
        attention = self.rsoftmax(self.fc2(self.relu(gap))).view(x.shape[0], -1, 1, 1)
        attentions = torch.split(attention, x.shape[1] // self.radix, dim=1)
        return sum(a * s for a, s in zip(attentions, splits, strict=True)).contiguous()
