"""The global context block as in open-mmlab/mmcv, where its authors' own has gone."""

import torch
from torch import nn


class ContextBlock(nn.Module):
    def __init__(self, in_channels, ratio, pooling_type="att", fusion_types=("channel_add",)):
        super().__init__()
        self.in_channels = in_channels
        self.ratio = ratio
        self.planes = int(in_channels * ratio)
        self.pooling_type = pooling_type
        self.fusion_types = fusion_types
        if pooling_type == "att":
            self.conv_mask = nn.Conv2d(in_channels, 1, kernel_size=1)
            self.softmax = nn.Softmax(dim=2)
        else:
            self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.channel_add_conv = self._branch() if "channel_add" in fusion_types else None
        self.channel_mul_conv = self._branch() if "channel_mul" in fusion_types else None

    def _branch(self):
        return nn.Sequential(
            nn.Conv2d(self.in_channels, self.planes, kernel_size=1),
            nn.LayerNorm([self.planes, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.planes, self.in_channels, kernel_size=1),
        )

    def spatial_pool(self, x):
        n, c, h, w = x.size()
        if self.pooling_type == "avg":
            return self.avg_pool(x)
        mask = self.softmax(self.conv_mask(x).view(n, 1, h * w)).unsqueeze(-1)
        return torch.matmul(x.view(n, c, h * w).unsqueeze(1), mask).view(n, c, 1, 1)

    def forward(self, x):
        context = self.spatial_pool(x)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out
