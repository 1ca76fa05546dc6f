"""Coordinate attention as in the MobileNetV2 of its authors' repository, houqb/CoordAttention."""

import torch
from torch import nn

from .coordinate import h_swish


class CoordAtt(nn.Module):
    def __init__(self, inp, oup, groups=32):
        super().__init__()
        hidden = max(8, inp // groups)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, oup, 1)
        self.conv3 = nn.Conv2d(hidden, oup, 1)
        self.relu = h_swish()

    def forward(self, x):
        z = torch.cat((self.pool_h(x), self.pool_w(x).transpose(2, 3)), 2)
        rows, columns = self.relu(self.bn1(self.conv1(z))).split(x.shape[2:], 2)
        return x * self.conv3(columns.transpose(2, 3)).sigmoid().expand_as(x) * self.conv2(rows).sigmoid().expand_as(x)
