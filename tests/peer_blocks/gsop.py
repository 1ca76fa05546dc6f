"""GSoP's residual block and covariance layers as in its authors' repository, ZilinGao/Global-Second-order-Pooling-Convolutional-Networks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Covpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        n, dim, h, w = input.shape
        m = h * w
        flat = input.reshape(n, dim, m)
        centring = ((torch.eye(m) - torch.ones(m, m).to(flat) / m) / m).expand(n, m, m)
        ctx.save_for_backward(input, centring)
        return flat.bmm(centring).bmm(flat.transpose(1, 2))

    @staticmethod
    def backward(ctx, grad):
        input, centring = ctx.saved_tensors
        both = grad + grad.transpose(1, 2)
        return both.bmm(input.flatten(2)).bmm(centring).reshape(input.shape)


class Sqrtm(torch.autograd.Function):
    """Only for two iterations and more: for one the original returns another matrix than its backward is about."""

    @staticmethod
    def forward(ctx, input, iterN):
        three = 3 * torch.eye(input.shape[1]).to(input).expand_as(input)
        norm = input.diagonal(dim1=1, dim2=2).sum(1)
        a = input / norm[:, None, None]
        zy = 0.5 * (three - a)
        ys, zs = [a.bmm(zy)], [zy]
        for _ in range(1, iterN - 1):
            zy = 0.5 * (three - zs[-1].bmm(ys[-1]))
            ys.append(ys[-1].bmm(zy))
            zs.append(zy.bmm(zs[-1]))
        last = zy if iterN < 2 else 0.5 * ys[-1].bmm(three - zs[-1].bmm(ys[-1]))
        ctx.save_for_backward(input, a, last, norm, *ys, *zs)
        return last * norm.sqrt()[:, None, None]

    @staticmethod
    def backward(ctx, grad):
        input, a, last, norm, *steps = ctx.saved_tensors
        ys, zs = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        three = 3 * torch.eye(input.shape[1]).to(input).expand_as(input)
        post = grad * norm.sqrt()[:, None, None]
        auxiliary = (grad * last).sum((1, 2)) / (2 * norm.sqrt())
        y, z = ys[-1], zs[-1]
        dy = 0.5 * (post.bmm(three - y.bmm(z)) - z.bmm(y).bmm(post))
        dz = -0.5 * y.bmm(post).bmm(y)
        for y, z in zip(ys[-2::-1], zs[-2::-1], strict=True):
            yz, zy = three - y.bmm(z), z.bmm(y)
            dy, dz = (
                0.5 * (dy.bmm(yz) - z.bmm(dz).bmm(z) - zy.bmm(dy)),
                0.5 * (yz.bmm(dz) - y.bmm(dy).bmm(y) - dz.bmm(zy)),
            )
        inner = 0.5 * (dy.bmm(three - a) - dz - a.bmm(dy))
        shift = auxiliary - (inner * input).sum((1, 2)) / norm**2
        return inner / norm[:, None, None] + shift[:, None, None] * torch.eye(input.shape[1]).to(input), None


def triuvec(input):
    n, dim, _ = input.shape
    index = torch.ones(dim, dim).triu().t().reshape(dim * dim).nonzero()[:, 0]
    return input.reshape(n, dim * dim)[:, index]


class Head(nn.Module):
    """What GSoP-Net2 does between its last stage and its classifier."""

    def __init__(self, channels, isqrt_dim=256, iterN=3):
        super().__init__()
        self.layer_reduce = nn.Conv2d(channels, isqrt_dim, kernel_size=1, bias=False)
        self.layer_reduce_bn = nn.BatchNorm2d(isqrt_dim)
        self.layer_reduce_relu = nn.ReLU(inplace=True)
        self.iterN = iterN

    def forward(self, x):
        x = self.layer_reduce_relu(self.layer_reduce_bn(self.layer_reduce(x)))
        return triuvec(Sqrtm.apply(Covpool.apply(x), self.iterN))


def cov_feature(x):
    n, dim, h, w = x.shape
    m = h * w
    flat = x.reshape(n, dim, m)
    centring = ((torch.eye(dim) - torch.ones(dim, dim).to(flat) / m) / m).expand(n, dim, dim)
    return flat.transpose(1, 2).bmm(centring).bmm(flat)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, attention="0", att_dim=128):
        super().__init__()
        wide = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, wide, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.relu_normal = nn.ReLU(inplace=False)
        if attention in {"1", "+", "M", "&"}:
            self.conv_for_DR = nn.Conv2d(wide, att_dim, kernel_size=1, stride=1 if planes > 64 else 2)
            self.bn_for_DR = nn.BatchNorm2d(att_dim)
            self.row_bn = nn.BatchNorm2d(att_dim)
            self.row_conv_group = nn.Conv2d(att_dim, 4 * att_dim, kernel_size=(att_dim, 1), groups=att_dim)
            self.fc_adapt_channels = nn.Conv2d(4 * att_dim, wide, kernel_size=1)
            self.sigmoid = nn.Sigmoid()
        if attention in {"2", "+", "M", "&"}:
            self.conv_for_DR_spatial = nn.Conv2d(wide, att_dim, kernel_size=1)
            self.bn_for_DR_spatial = nn.BatchNorm2d(att_dim)
            self.adppool = nn.AdaptiveAvgPool2d((8, 8))
            self.row_bn_for_spatial = nn.BatchNorm2d(64)
            self.row_conv_group_for_spatial = nn.Conv2d(64, 256, kernel_size=(64, 1), groups=64)
            self.fc_adapt_channels_for_spatial = nn.Conv2d(256, 64, kernel_size=1)
            self.sigmoid = nn.Sigmoid()
            self.adpunpool = F.adaptive_avg_pool2d
        if attention == "&":
            groups = int(wide / 64)
            factor = int(math.log(32 / groups, 2))
            options = {"kernel_size": (factor * 2 + 5, 1), "padding": (factor + 2, 0), "groups": groups}
            self.dilate_conv_for_concat1 = nn.Conv2d(wide, wide, **options)
            self.dilate_conv_for_concat2 = nn.Conv2d(wide, wide, **options)
            self.bn_for_concat = nn.BatchNorm2d(wide)
        self.downsample = downsample
        self.stride = stride
        self.attention = attention

    def chan_att(self, out):
        out = self.relu(self.bn_for_DR(self.conv_for_DR(self.relu_normal(out))))
        out = Covpool.apply(out).unsqueeze(3)
        return self.sigmoid(self.fc_adapt_channels(self.row_conv_group(self.row_bn(out))))

    def pos_att(self, pre_att):
        out = self.adppool(self.bn_for_DR_spatial(self.conv_for_DR_spatial(self.relu_normal(pre_att))))
        out = self.row_bn_for_spatial(cov_feature(out).unsqueeze(3))
        out = self.sigmoid(self.fc_adapt_channels_for_spatial(self.relu(self.row_conv_group_for_spatial(out))))
        return self.adpunpool(out.view(out.size(0), 1, 8, 8), (pre_att.size(2), pre_att.size(3)))

    def attend(self, out):
        by_channel = out * self.chan_att(out) if self.attention != "2" else None
        by_position = self.relu_normal(out * self.pos_att(out)) if self.attention != "1" else None
        if self.attention == "1":
            return by_channel
        if self.attention == "2":
            return by_position
        if self.attention == "+":
            return by_channel + by_position
        if self.attention == "M":
            return torch.max(by_channel, by_position)
        return self.bn_for_concat(self.dilate_conv_for_concat1(by_channel) + self.dilate_conv_for_concat2(by_position))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        residual = x if self.downsample is None else self.downsample(x)
        if self.attention != "0":
            out = self.attend(out)
        out += residual
        return self.relu(out)
