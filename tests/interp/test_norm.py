"""A BatchNorm that trains in front of a channel gate, and an activation between: when they are part of the gate's passes, and what the norm keeps
doing."""

import copy

import peer_blocks
import pytest
import torch
import torch.nn.functional as F
from eager_blocks import HIDDEN
from peer_blocks import residual
from peer_imports import peer
from peer_pairs import assert_same, step
from torch import nn

import tritattn
from tritattn import nn as tn
from tritattn import ops
from tritattn._spec import Spec
from tritattn.ops._norm import norm_gate

C = 6
KERNELS = {
    "none": ["channel_moments_kernel", "norm_statistics_kernel", "linear_kernel", "linear_kernel", "gate_fwd_kernel"],
    "silu": ["channel_moments_kernel", "norm_statistics_kernel", "channel_gate_stages_fwd_kernel"],
}
BEFORE = tuple(KERNELS)


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((3, C), (3,), (C, 3), (C,))]


def sample(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + 1


def called(norm, x, **options):
    """(y, buffers, the kernels' names)."""
    from interpreter import recorded

    with recorded() as names:
        y = ops.se(x, *parameters(), before_norm=norm, **options)
    return y, dict(norm.named_buffers()), list(names)


def compare(norm, x, fused, before="none", **options):
    """The same as if the norm were called, in its training's statistics too; whether its passes were the gate's."""
    again = copy.deepcopy(norm)
    y, buffers, names = called(norm, x, before=before, **options)
    torch.testing.assert_close(y, ops.se(HIDDEN[before](again(x)), *parameters(), **options))
    torch.testing.assert_close(buffers, dict(again.named_buffers()))
    assert (names == KERNELS[before]) is fused, names


@pytest.mark.parametrize(
    "options, fused",
    [
        ({}, True),
        ({"eps": 0.1, "momentum": 0.5}, True),
        ({"affine": False}, True),
        ({"track_running_stats": False}, True),
        ({"momentum": None}, False),  # whose factor is known on the device alone
    ],
    ids=str,
)
@pytest.mark.parametrize("before", BEFORE)
def test_options(options, fused, before):
    norm = nn.BatchNorm2d(C, **options)
    for _ in range(2):
        compare(norm, sample(3, C, 4, 5), fused, before, activation="relu", residual=sample(3, C, 4, 5))
    if norm.running_mean is None:
        compare(norm.eval(), sample(3, C, 4, 5), fused, before)
    if norm.bias is not None:
        norm.register_parameter("bias", None)
        compare(norm.train(), sample(3, C, 4, 5), fused, before)


def test_parameters_with_strides():
    norm = nn.BatchNorm2d(C)
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(torch.randn(C, 2, generator=torch.Generator().manual_seed(2))[:, 0]))
    compare(norm, sample(2, C, 3, 4), True)


def test_other_ranks():
    compare(nn.BatchNorm1d(C), sample(3, C, 7), True)
    for before in BEFORE:
        compare(nn.BatchNorm3d(C), sample(2, C, 2, 3, 2).to(memory_format=torch.channels_last_3d), True, before)


def test_what_else_a_call_does():
    class Twice(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = nn.BatchNorm2d(C)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    for norm in (Twice(C), hooked, nn.SyncBatchNorm(C).eval(), nn.GroupNorm(2, C)):
        for before in BEFORE:
            compare(norm, sample(2, C, 3, 4), False, before)
    for before in BEFORE:
        compare(nn.BatchNorm2d(C), sample(2, C, 3, 4), False, before, pool="avg_max")


def test_too_few_values():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.se(sample(1, C, 1, 1), *parameters(), before_norm=nn.BatchNorm2d(C))
    for before in BEFORE:
        compare(nn.BatchNorm2d(C), sample(1, C, 1, 2), True, before)
    assert ops.se(sample(0, C, 3, 4), *parameters(), before_norm=nn.BatchNorm2d(C)).shape == (0, C, 3, 4)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"^before: got 'tanh'"):
        ops.se(sample(2, C, 3, 4), *parameters(), before="tanh", before_norm=nn.BatchNorm2d(C))
    with pytest.raises(ValueError, match=r"^before_norm: got a BatchNorm2d of 5 channels, expected 6"):
        ops.se(sample(2, C, 3, 4), *parameters(), before_norm=nn.BatchNorm2d(5))
    with pytest.raises(TypeError, match=r"^before_norm: got int"):
        ops.se(sample(2, C, 3, 4), *parameters(), before_norm=3)


@pytest.mark.parametrize("before", BEFORE)
def test_only_the_gradients_that_are_asked_for(before):
    x, r, norm = sample(2, C, 3, 4), sample(2, C, 3, 4), nn.BatchNorm2d(C)
    params = parameters()
    leaves = {"x": x, "residual": r, "w1": params[0], "b2": params[3], "weight": norm.weight, "bias": norm.bias}

    def gradients(names):
        for name, t in leaves.items():
            t.requires_grad_(name in names)
        y = ops.se(x, *params, before=before, before_norm=norm, residual=r, activation="silu")
        return dict(zip(names, torch.autograd.grad(y, [leaves[name] for name in names], torch.ones_like(y)), strict=True))

    every = gradients(list(leaves))
    for name in leaves:
        torch.testing.assert_close(gradients([name])[name], every[name], rtol=0, atol=0)


@pytest.mark.parametrize("before", BEFORE)
def test_gradients_of_gradients(before):
    def second(gated):
        x, norm = sample(2, C, 2, 2).double().requires_grad_(), nn.BatchNorm2d(C).double()
        params = [p.double().requires_grad_() for p in parameters()]
        y = gated(x, norm, params)
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum(), [x, *params, norm.weight, norm.bias])

    found = second(lambda x, norm, params: ops.se(x, *params, before=before, before_norm=norm, hidden="silu"))
    torch.testing.assert_close(found, second(lambda x, norm, params: ops.se(HIDDEN[before](norm(x)), *params, hidden="silu")))


@pytest.mark.parametrize("before", ["none", "relu", "gelu"])
def test_a_mean_that_fp32_rounds(before):
    """By up to 2^-13; every gradient of the same sign would let that into the weight's."""
    x = sample(4, C, 8, 8) + 4096.3

    def weight_gradient(dtype):
        norm = nn.BatchNorm2d(C, dtype=dtype)
        y = ops.se(x.to(dtype), *(p.to(dtype) for p in parameters()), before=before, before_norm=norm)
        return torch.autograd.grad((y * (1 + 0.1 * sample(4, C, 8, 8).to(dtype))).sum(), norm.weight)[0]

    torch.testing.assert_close(weight_gradient(torch.float32).double(), weight_gradient(torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("before", BEFORE)
def test_gradients_of_the_statistics(before):
    """Which nothing but running statistics takes, without gradients; they are results all the same."""
    x, norm, spec = sample(2, C, 3, 5).double(), nn.BatchNorm2d(C).double(), Spec("avg", "mlp", "relu", eps="1e-05", before=before)
    leaves = [t.detach().double().requires_grad_() for t in (x, *parameters(), norm.weight, norm.bias)]
    weigh = sample(2, C).double()

    def gradients():
        y, mean, var = norm_gate(*leaves, None, spec=spec)
        return torch.autograd.grad(y.square().sum() + (weigh[0] * mean + weigh[1] * var).sum(), leaves)

    found = gradients()
    with tritattn.backend("reference"):
        torch.testing.assert_close(found, gradients())


def test_under_autocast_and_compiled():
    module, norm, x = tn.SqueezeExcite(C, rd_channels=3), nn.BatchNorm2d(C), sample(2, C, 4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, before_norm=copy.deepcopy(norm))
        expected = module(norm(x))
    torch.testing.assert_close(y, expected, atol=0.05, rtol=0.05)

    x = sample(2, C, 4, 4).requires_grad_()
    plain = copy.deepcopy(norm)
    compiled = torch.compile(lambda x: module(x, x, before_norm=norm), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found, wanted = compiled(x), module(x, x, before_norm=plain)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x), rtol=0, atol=0)
    # how the compiler of some torch versions multiplies and adds rounds once less
    torch.testing.assert_close(dict(norm.named_buffers()), dict(plain.named_buffers()))


def test_transforms_see_torchs_own_norm():
    norm = nn.BatchNorm2d(C, track_running_stats=False)
    x, dx = sample(2, C, 3, 4), sample(2, C, 3, 4)
    _, found = torch.func.jvp(lambda x: ops.se(x, *parameters(), before_norm=norm), (x,), (dx,))
    _, expected = torch.func.jvp(lambda x: ops.se(F.batch_norm(x, None, None, norm.weight, norm.bias, True), *parameters()), (x,), (dx,))
    torch.testing.assert_close(found, expected)


def two_steps(original, block, x, launches):
    """Of training: the converted block as the one without conversion, the normalised map never stored."""
    for _ in range(2):
        launches.clear()
        found = step(block, x)
        assert launches.count("norm_statistics_kernel") == launches.count("norm_gate_bwd_input_kernel") == 1
        with tritattn.backend("reference"):
            assert_same(found, step(original, x))


def test_a_converted_residual_block(launches):
    torch.manual_seed(0)
    kind = residual.named(residual.Bottleneck, "SEBottleneck", "se")
    original = kind(8, 8, peer_blocks.external.SEAttention(8, 4), 1, None).double()
    block = copy.deepcopy(original)
    tritattn.convert(block)
    x = sample(2, 8, 4, 3).double()
    two_steps(original, block, x, launches)
    assert block.bn3.num_batches_tracked == 2 and not torch.equal(block.bn3.running_var, torch.ones(8).double())


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_a_converted_inverted_residual(kind, launches):
    """Whose norm has the activation inside, in timm's case."""
    torch.manual_seed(0)
    if kind == "timm":
        module = peer("timm.models._efficientnet_blocks")
        original = module.InvertedResidual(8, 8, exp_ratio=2.0, act_layer=nn.SiLU, se_layer=module.SqueezeExcite).double()
    else:
        module = peer("torchvision.models.efficientnet")
        original = module.MBConv(module.MBConvConfig(2, 3, 1, 8, 8, 1), 0.0, nn.BatchNorm2d).double()
    block = copy.deepcopy(original)
    tritattn.convert(block)
    x = sample(2, 8, 4, 3).double()
    two_steps(original, block, x, launches)
    torch.testing.assert_close(dict(block.named_buffers()), dict(original.named_buffers()))
