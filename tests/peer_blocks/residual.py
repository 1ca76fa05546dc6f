"""Residual blocks as papers' repositories paste them around their attention, made from torchvision's two: only the name of the attention differs."""

from torch import nn


class Basic(nn.Module):
    def __init__(self, inplanes, planes, attention, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        setattr(self, self.place, attention)
        self.downsample = downsample

    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        out = getattr(self, self.place)(self.branch(x))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(Basic):
    def __init__(self, inplanes, planes, attention, stride=1, downsample=None):
        super().__init__(inplanes, planes, attention, stride, downsample)
        self.conv3 = nn.Conv2d(planes, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)

    def branch(self, x):
        return self.bn3(self.conv3(self.relu(super().branch(x))))


def named(kind, name, place):
    return type(name, (kind,), {"place": place})
