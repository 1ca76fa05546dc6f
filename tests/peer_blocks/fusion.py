"""Attentional feature fusion as in YimianDai/open-aff, aff_pytorch."""

from torch import nn


def local(channels, inter_channels):
    return nn.Sequential(
        nn.Conv2d(channels, inter_channels, kernel_size=1, stride=1, padding=0),
        nn.BatchNorm2d(inter_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(inter_channels, channels, kernel_size=1, stride=1, padding=0),
        nn.BatchNorm2d(channels),
    )


def pooled(channels, inter_channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *local(channels, inter_channels))


class AFF(nn.Module):
    def __init__(self, channels=64, r=4):
        super().__init__()
        self.local_att = local(channels, channels // r)
        self.global_att = pooled(channels, channels // r)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x, residual):
        xa = x + residual
        xl = self.local_att(xa)
        xg = self.global_att(xa)
        wei = self.sigmoid(xl + xg)
        return 2 * x * wei + 2 * residual * (1 - wei)


class iAFF(nn.Module):
    def __init__(self, channels=64, r=4):
        super().__init__()
        self.local_att = local(channels, channels // r)
        self.global_att = pooled(channels, channels // r)
        self.local_att2 = local(channels, channels // r)
        self.global_att2 = pooled(channels, channels // r)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x, residual):
        xa = x + residual
        xl = self.local_att(xa)
        xg = self.global_att(xa)
        wei = self.sigmoid(xl + xg)
        xi = x * wei + residual * (1 - wei)
        xl2 = self.local_att2(xi)
        xg2 = self.global_att(xi)  # not the second one
        wei2 = self.sigmoid(xl2 + xg2)
        return x * wei2 + residual * (1 - wei2)


class MS_CAM(nn.Module):
    def __init__(self, channels=64, r=4):
        super().__init__()
        self.local_att = local(channels, channels // r)
        self.global_att = pooled(channels, channels // r)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        xl = self.local_att(x)
        xg = self.global_att(x)
        return x * self.sigmoid(xl + xg)
