"""scSE as in its authors' repository, ai-med/squeeze_and_excitation, without the import that cannot run."""

import torch
import torch.nn.functional as F
from torch import nn


class ChannelSELayer(nn.Module):
    def __init__(self, num_channels, reduction_ratio=2):
        super().__init__()
        self.reduction_ratio = reduction_ratio
        self.fc1 = nn.Linear(num_channels, num_channels // reduction_ratio)
        self.fc2 = nn.Linear(num_channels // reduction_ratio, num_channels)
        self.relu = nn.ReLU()
        self.sigmoid = nn.Sigmoid()

    def forward(self, input_tensor):
        n, c, _, _ = input_tensor.size()
        means = input_tensor.reshape(n, c, -1).mean(dim=2)
        return input_tensor * self.sigmoid(self.fc2(self.relu(self.fc1(means)))).view(n, c, 1, 1)


class SpatialSELayer(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.conv = nn.Conv2d(num_channels, 1, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, input_tensor, weights=None):
        n, c, h, w = input_tensor.size()
        out = self.conv(input_tensor) if weights is None else F.conv2d(input_tensor, weights.mean(dim=0).view(1, c, 1, 1))
        return input_tensor * self.sigmoid(out).view(n, 1, h, w)


class ChannelSpatialSELayer(nn.Module):
    def __init__(self, num_channels, reduction_ratio=2):
        super().__init__()
        self.cSE = ChannelSELayer(num_channels, reduction_ratio)
        self.sSE = SpatialSELayer(num_channels)

    def forward(self, input_tensor):
        return torch.max(self.cSE(input_tensor), self.sSE(input_tensor))
