"""Coordinate attention as in its authors' repository, houqb/CoordAttention."""

import torch
from torch import nn


class h_sigmoid(nn.Module):
    def __init__(self, inplace=True):
        super().__init__()
        self.relu = nn.ReLU6(inplace=inplace)

    def forward(self, x):
        return self.relu(x + 3) / 6


class h_swish(nn.Module):
    def __init__(self, inplace=True):
        super().__init__()
        self.sigmoid = h_sigmoid(inplace=inplace)

    def forward(self, x):
        return x * self.sigmoid(x)


class CoordAtt(nn.Module):
    def __init__(self, inp, oup, reduction=32):
        super().__init__()
        hidden = max(8, inp // reduction)
        self.pool_h = nn.AdaptiveAvgPool2d((None, 1))
        self.pool_w = nn.AdaptiveAvgPool2d((1, None))
        self.conv1 = nn.Conv2d(inp, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act = h_swish()
        self.conv_h = nn.Conv2d(hidden, oup, 1)
        self.conv_w = nn.Conv2d(hidden, oup, 1)

    def forward(self, x):
        z = torch.cat((self.pool_h(x), self.pool_w(x).transpose(2, 3)), 2)
        rows, columns = self.act(self.bn1(self.conv1(z))).split(x.shape[2:], 2)
        return x * self.conv_w(columns.transpose(2, 3)).sigmoid() * self.conv_h(rows).sigmoid()

