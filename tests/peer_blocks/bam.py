"""BAM as on 0809zheng.github.io, which is that of its authors' repository without the line that cannot run (`Published` has it), and
External-Attention-pytorch's, BAMBlock."""

import torch
import torch.nn.functional as F
from torch import nn


class Flatten(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


class ChannelGate(nn.Module):
    def __init__(self, gate_channel, reduction_ratio=16, num_layers=1):
        super().__init__()
        sizes = [gate_channel, *[gate_channel // reduction_ratio] * num_layers, gate_channel]
        self.gate_c = nn.Sequential()
        self.gate_c.add_module("flatten", Flatten())
        for i in range(num_layers):
            self.gate_c.add_module(f"gate_c_fc_{i}", nn.Linear(sizes[i], sizes[i + 1]))
            self.gate_c.add_module(f"gate_c_bn_{i + 1}", nn.BatchNorm1d(sizes[i + 1]))
            self.gate_c.add_module(f"gate_c_relu_{i + 1}", nn.ReLU())
        self.gate_c.add_module("gate_c_fc_final", nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x):
        means = F.avg_pool2d(x, x.size(2), stride=x.size(2))
        return self.gate_c(means).unsqueeze(2).unsqueeze(3).expand_as(x)


class SpatialGate(nn.Module):
    def __init__(self, gate_channel, reduction_ratio=16, dilation_conv_num=2, dilation_val=4):
        super().__init__()
        width = gate_channel // reduction_ratio
        self.gate_s = nn.Sequential()
        self.gate_s.add_module("gate_s_conv_reduce0", nn.Conv2d(gate_channel, width, 1))
        self.gate_s.add_module("gate_s_bn_reduce0", nn.BatchNorm2d(width))
        self.gate_s.add_module("gate_s_relu_reduce0", nn.ReLU())
        for i in range(dilation_conv_num):
            self.gate_s.add_module(f"gate_s_conv_di_{i}", nn.Conv2d(width, width, 3, padding=dilation_val, dilation=dilation_val))
            self.gate_s.add_module(f"gate_s_bn_di_{i}", nn.BatchNorm2d(width))
            self.gate_s.add_module(f"gate_s_relu_di_{i}", nn.ReLU())
        self.gate_s.add_module("gate_s_conv_final", nn.Conv2d(width, 1, 1))

    def forward(self, x):
        return self.gate_s(x).expand_as(x)


class BAM(nn.Module):
    def __init__(self, gate_channel):
        super().__init__()
        self.channel_att = ChannelGate(gate_channel)
        self.spatial_att = SpatialGate(gate_channel)

    def forward(self, x):
        return (1 + torch.sigmoid(self.channel_att(x) * self.spatial_att(x))) * x


class Published(ChannelGate):
    """The authors' ChannelGate, whose constructor takes an activation from nowhere."""

    def __init__(self, gate_channel, reduction_ratio=16, num_layers=1):
        super().__init__(gate_channel, reduction_ratio, num_layers)
        self.gate_activation = gate_activation  # noqa: F821


class ChannelAttention(nn.Module):
    def __init__(self, channel, reduction=16, num_layers=3):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        sizes = [channel, *[channel // reduction] * num_layers, channel]
        self.ca = nn.Sequential()
        self.ca.add_module("flatten", Flatten())
        for i in range(num_layers):
            self.ca.add_module(f"fc{i}", nn.Linear(sizes[i], sizes[i + 1]))
            self.ca.add_module(f"bn{i}", nn.BatchNorm1d(sizes[i + 1]))
            self.ca.add_module(f"relu{i}", nn.ReLU())
        self.ca.add_module("last_fc", nn.Linear(sizes[-2], sizes[-1]))

    def forward(self, x):
        return self.ca(self.avgpool(x)).unsqueeze(-1).unsqueeze(-1).expand_as(x)


class SpatialAttention(nn.Module):
    def __init__(self, channel, reduction=16, num_layers=3, dia_val=2):
        super().__init__()
        width = channel // reduction
        self.sa = nn.Sequential()
        self.sa.add_module("conv_reduce1", nn.Conv2d(channel, width, 1))
        self.sa.add_module("bn_reduce1", nn.BatchNorm2d(width))
        self.sa.add_module("relu_reduce1", nn.ReLU())
        for i in range(num_layers):
            self.sa.add_module(f"conv_{i}", nn.Conv2d(width, width, 3, padding=1, dilation=dia_val))
            self.sa.add_module(f"bn_{i}", nn.BatchNorm2d(width))
            self.sa.add_module(f"relu_{i}", nn.ReLU())
        self.sa.add_module("last_conv", nn.Conv2d(width, 1, 1))

    def forward(self, x):
        return self.sa(x).expand_as(x)


class BAMBlock(nn.Module):
    def __init__(self, channel=512, reduction=16, dia_val=2):
        super().__init__()
        self.ca = ChannelAttention(channel, reduction)
        self.sa = SpatialAttention(channel, reduction, dia_val=dia_val)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return (1 + self.sigmoid(self.sa(x) + self.ca(x))) * x
