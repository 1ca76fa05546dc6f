"""scSE and CBAM as on 0809zheng.github.io: no biases, no ReLU in cSE, ratio 4 and no BatchNorm in CBAM, gates returned."""

import torch
from torch import nn


class sSE(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.Conv1x1 = nn.Conv2d(in_channels, 1, 1, bias=False)
        self.norm = nn.Sigmoid()

    def forward(self, U):
        return U * self.norm(self.Conv1x1(U))


class cSE(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.Conv_Squeeze = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.Conv_Excitation = nn.Conv2d(in_channels // 2, in_channels, 1, bias=False)
        self.norm = nn.Sigmoid()

    def forward(self, U):
        logits = self.Conv_Excitation(self.Conv_Squeeze(self.avgpool(U)))
        return U * self.norm(logits).expand_as(U)


class csSE(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.cSE = cSE(in_channels)
        self.sSE = sSE(in_channels)

    def forward(self, U):
        return self.cSE(U) + self.sSE(U)


class ChannelAttention(nn.Module):
    def __init__(self, in_planes, ratio=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.sharedMLP = nn.Sequential(
            nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False),
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.sharedMLP(self.avg_pool(x)) + self.sharedMLP(self.max_pool(x)))


class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding={3: 1, 7: 3}[kernel_size], bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        statistics = [x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]]
        return self.sigmoid(self.conv(torch.cat(statistics, 1)))


class BasicBlock(nn.Module):
    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.ca = ChannelAttention(planes)
        self.sa = SpatialAttention()
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = self.ca(out) * out
        out = self.sa(out) * out
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Network(nn.Module):
    """A small network of these blocks: a residual stage with and without a shortcut convolution, then an scSE decoder step."""

    def __init__(self, width=8, classes=5):
        super().__init__()
        shortcut = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, 2, shortcut)
        self.scse = csSE(2 * width)
        self.ca = ChannelAttention(2 * width)
        self.sa = SpatialAttention(3)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.scse(self.layer2(self.layer1(self.stem(x))))
        x = x * self.ca(x)
        x = x * self.sa(x)
        return self.fc(x.mean((2, 3)))
