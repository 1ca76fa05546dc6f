"""Blocks around converted attention: its passes take the sum and the activation after it, and the norm and the activation before it."""

import copy
import pickle
from itertools import pairwise

import peer_blocks
import pytest
import torch
from peer_blocks import residual
from peer_imports import peer
from peer_pairs import assert_same, step
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import tritattn
from tritattn.peers import RESIDUALS

C = 32


def shortcut(stride=1):
    return nn.Sequential(nn.Conv2d(C, C, 1, stride, bias=False), nn.BatchNorm2d(C))


def timm(module, name, *args, **options):
    return getattr(peer(f"timm.models.{module}"), name)(*args, **options)


def byobnet(name, last=True, **options):
    return timm("byobnet", name, C, C, layers=peer("timm.models.byobnet").LayerFn(attn=peer("timm.layers").SEModule), attn_last=last, **options)


def senet(package, name):
    options = {"base_width": 64} if name == "SEResNeXtBottleneck" else {}
    return getattr(peer(package), name)(C, C if name == "SEResNetBlock" else C // 4, 1, 4, **options)


def monai(name):
    module = peer("monai.networks.blocks.squeeze_and_excitation")
    if name == "SEBlock":
        return module.SEBlock(2, C, 8, 8, C)
    return getattr(module, name)(2, C, C // 4, 1, 4, downsample=shortcut())


def pasted(kind, name, place, attention, stride=1):
    return residual.named(kind, name, place)(C, C, attention(C), stride, shortcut(stride) if stride > 1 else None)


def se(c):
    return peer_blocks.external.SEAttention(c, 4)


def attention(name):
    return lambda: {"attn_layer": peer("timm.layers").get_attn(name)}


def inverted(name, out=C, act=nn.SiLU, **options):
    module = peer("timm.models._efficientnet_blocks")
    return getattr(module, name)(C, out, act_layer=act, se_layer=module.SqueezeExcite, **options)


def torchvision(name):
    """What its blocks call first: a Sequential, with attention in it."""
    cna = peer("torchvision.ops.misc").Conv2dNormActivation
    if name == "mobilenetv3":
        module = peer("torchvision.models.mobilenetv3")
        config = module.InvertedResidualConfig(C, 3, 2 * C, C, True, "HS", 2, 1, 1.0)
        return module.InvertedResidual(config, nn.BatchNorm2d).block
    if name == "efficientnet":
        module = peer("torchvision.models.efficientnet")
        return module.MBConv(module.MBConvConfig(2, 3, 1, C, C, 1), 0.2, nn.BatchNorm2d).block
    if name == "regnet":
        return peer("torchvision.models.regnet").BottleneckTransform(C, C, 1, nn.BatchNorm2d, nn.ReLU, 8, 1.0, 0.25)
    return nn.Sequential(cna(C, C), peer("torchvision.ops.misc").SqueezeExcitation(C, 8), nn.Conv2d(C, 8, 1))


Basic, Bottleneck = residual.Basic, residual.Bottleneck
# a block's name -> (how it is made, its entry's source, the name of its attention)
BLOCKS = {
    "timm-BasicBlock": (lambda: timm("resnet", "BasicBlock", C, C, **attention("cbam")()), "timm", "se"),
    "timm-BasicBlock-downsample": (lambda: timm("resnet", "BasicBlock", C, C, 2, shortcut(2), **attention("eca")()), "timm", "se"),
    "timm-Bottleneck-silu": (lambda: timm("resnet", "Bottleneck", C, C // 4, act_layer=nn.SiLU, **attention("se")()), "timm", "se"),
    "timm-SelectiveKernelBasic": (lambda: timm("sknet", "SelectiveKernelBasic", C, C, **attention("se")()), "timm (SKNet)", "se"),
    "timm-SelectiveKernelBottleneck": (lambda: timm("sknet", "SelectiveKernelBottleneck", C, C // 4, **attention("se")()), "timm (SKNet)", "se"),
    "timm-TResNet": (lambda: timm("tresnet", "BasicBlock", C, C), "timm (TResNet)", "se"),
    "timm-byobnet-BasicBlock": (lambda: byobnet("BasicBlock"), "timm (ByobNet)", "attn_last"),
    "timm-byobnet-BasicBlock-shortcut": (lambda: byobnet("BasicBlock", stride=2), "timm (ByobNet)", "attn_last"),
    "timm-byobnet-BottleneckBlock": (lambda: byobnet("BottleneckBlock", extra_conv=True), "timm (ByobNet)", "attn_last"),
    "timm-byobnet-DarkBlock": (lambda: byobnet("DarkBlock"), "timm (ByobNet)", "attn_last"),
    "timm-byobnet-EdgeBlock": (lambda: byobnet("EdgeBlock"), "timm (ByobNet)", "attn_last"),
    "timm-SEResNetBlock": (lambda: senet("timm.models.senet", "SEResNetBlock"), "timm (SENet)", "se_module"),
    "monai-SEBlock": (lambda: monai("SEBlock"), "MONAI", "se_layer"),
    "monai-SEResNetBottleneck": (lambda: monai("SEResNetBottleneck"), "MONAI", "se_layer"),
    "authors-cbam-basic": (lambda: pasted(Basic, "BasicBlock", "cbam", peer_blocks.authors.CBAM), "Jongchan/attention-module", "cbam"),
    "authors-cbam-bottleneck": (lambda: pasted(Bottleneck, "Bottleneck", "cbam", peer_blocks.authors.CBAM, 2), "Jongchan/attention-module", "cbam"),
    "authors-triplet": (
        lambda: pasted(Basic, "BasicBlock", "triplet_attention", peer_blocks.triplet.TripletAttention),
        "landskape-ai/triplet-attention",
        "triplet_attention",
    ),
    "authors-sa": (lambda: pasted(Bottleneck, "SABottleneck", "sa", lambda c: peer_blocks.sanet.sa_layer(c, 4)), "wofmanaf/SA-Net", "sa"),
    "moskomule-SEBasicBlock": (lambda: pasted(Basic, "SEBasicBlock", "se", se), "moskomule/senet.pytorch", "se"),
    "moskomule-SEBottleneck": (lambda: pasted(Bottleneck, "SEBottleneck", "se", se, 2), "moskomule/senet.pytorch", "se"),
    "authors-ECABasicBlock": (lambda: pasted(Basic, "ECABasicBlock", "eca", lambda c: peer_blocks.external.ECAAttention()), "BangguWu/ECANet", "eca"),
}
# those with attention in the middle
MIDDLE = {
    "timm-InvertedResidual": (lambda: inverted("InvertedResidual", exp_ratio=2.0), "timm (EfficientNet)", "se"),
    "timm-InvertedResidual-s2d": (lambda: inverted("InvertedResidual", 16, nn.Hardswish, s2d=1), "timm (EfficientNet)", "se"),
    "timm-DepthwiseSeparableConv": (
        lambda: inverted("DepthwiseSeparableConv", act=nn.ReLU, pw_act=True, drop_path_rate=0.5),
        "timm (EfficientNet)",
        "se",
    ),
    "timm-EdgeResidual": (lambda: inverted("EdgeResidual", act=nn.ReLU6), "timm (EfficientNet)", "se"),
    "timm-UniversalInvertedResidual": (
        lambda: inverted("UniversalInvertedResidual", act=nn.GELU, dw_kernel_size_end=3),
        "timm (EfficientNet)",
        "se",
    ),
    "timm-RegNet": (lambda: timm("regnet", "Bottleneck", C, C, group_size=8), "timm (RegNet)", "se"),
    "timm-RegNet-none": (lambda: timm("regnet", "Bottleneck", C, 16, group_size=8, downsample="", linear_out=True), "timm (RegNet)", "se"),
    "timm-byobnet": (lambda: byobnet("BottleneckBlock", False, bottle_ratio=0.5, extra_conv=True), "timm (ByobNet)", "attn"),
    "timm-byobnet-shortcut": (lambda: byobnet("DarkBlock", False, stride=2, drop_path_rate=0.5), "timm (ByobNet)", "attn"),
    "timm-MaxxViT": (
        lambda: timm("maxxvit", "MbConvBlock", C, C, 2, cfg=peer("timm.models.maxxvit").MaxxVitConvCfg(act_layer="silu")),
        "timm (MaxxViT)",
        "se",
    ),
    "timm-ReXNet": (lambda: timm("rexnet", "LinearBottleneck", C, 40, 1, exp_ratio=2.0, se_ratio=0.25), "timm (ReXNet)", "se"),
    "torchvision-mobilenetv3": (lambda: torchvision("mobilenetv3"), "torch.nn", "2"),
    "torchvision-efficientnet": (lambda: torchvision("efficientnet"), "torch.nn", "2"),
    "torchvision-regnet": (lambda: torchvision("regnet"), "torch.nn", "se"),
    "torchvision-last": (lambda: torchvision(""), "torch.nn", "1"),
}
BLOCKS |= MIDDLE
# the activation in front of attention
FRONT = dict.fromkeys(MIDDLE, "relu") | dict.fromkeys(("timm-InvertedResidual", "timm-MaxxViT", "torchvision-efficientnet"), "silu")
FRONT |= dict.fromkeys(("timm-InvertedResidual-s2d", "torchvision-mobilenetv3"), "hardswish")
FRONT |= {"timm-EdgeResidual": "relu6", "timm-UniversalInvertedResidual": "gelu", "timm-ReXNet": None}
SENET = ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")
for _name in SENET:
    for _package in ("timm.models.senet", "segmentation_models_pytorch.encoders.senet"):
        _key = f"{_package.split('.')[0]}-{_name}"
        BLOCKS[_key] = (lambda p=_package, n=_name: senet(p, n), "timm and segmentation_models_pytorch (SENet)", "se_module")


def made(name):
    torch.manual_seed(0)
    block = BLOCKS[name][0]().double()
    with torch.no_grad():
        for key, t in block.state_dict().items():
            if t.is_floating_point():
                t.copy_(torch.rand_like(t) + 0.2 if "running" in key else torch.randn_like(t) / max(1, t[:1].numel()) ** 0.5)
    return block


def some_map(channels=C):
    return torch.randn(2, channels, 8, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def converted(block, attention):
    """A converted copy, of which the block around attention is what was asked for."""
    copied = copy.deepcopy(block)
    report = tritattn.convert(copied)
    assert not report.left, report
    rows = {row.path: row for row in report}
    assert rows.keys() >= {"", attention} and " with " in rows[""].detail, report
    return copied, rows[""]


ACTIVATIONS = ("silu", "hardswish", "relu", "hardtanh", "gelu")


class Operators(TorchDispatchMode):
    """Names of the operators that run; of those that take a map."""

    def __init__(self):
        super().__init__()
        self.names, self.on_maps = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op._schema.name.split("::")[1])
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 4 and args[0].shape[-1] > 1:
            self.on_maps.append(self.names[-1])
        return op(*args, **kwargs or {})


def calls(block, x, attention):
    """How often a block calls its attention as a module."""
    seen = []
    module = block.get_submodule(attention)
    original = type(module).forward

    def forward(self, *args):
        seen.append(self)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", forward)
        block(x)
    return len(seen)


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_block(name):
    _, source, attention = BLOCKS[name]
    original = made(name)
    block, row = converted(original, attention)
    assert row.detail.endswith(f"({source})")
    assert isinstance(block, type(original)) and block.state_dict().keys() == original.state_dict().keys()
    x = some_map()
    for training in (True, False):
        original.train(training)
        block.train(training)
        assert calls(block, x, attention) == 0 and calls(original, x, attention) == 1
        original.load_state_dict(block.state_dict())  # the calls counted above moved running statistics once each
        found, expected = (torch.manual_seed(3) and step(each, x) for each in (block, original))
        assert_same(found, expected)
    tritattn.restore(block)
    assert type(block) is type(original) and type(block.get_submodule(attention)) is type(original.get_submodule(attention))


def test_every_entry_is_tried():
    assert {source for _, source, _ in BLOCKS.values()} | {"torchvision"} == {entry.source for entry in RESIDUALS} | {"torch.nn"}


def test_sum_and_activation_are_no_passes_of_their_own():
    """On a device with kernels: one op from the last BatchNorm to the end."""
    block, _ = converted(made("timm-Bottleneck-silu").eval(), "se")
    with pytest.MonkeyPatch.context() as patch, Operators() as operators, torch.no_grad():
        patch.setattr("tritattn._library._device_problem", lambda device: None)
        block.to("meta")(some_map().to("meta"))
    assert operators.names[-1] == "channel_gate", operators.names
    assert not {"add", "add_", "relu", "relu_"} & set(operators.names)


@pytest.mark.parametrize("name", MIDDLE)
def test_norm_and_activation_in_front_are_no_passes_of_their_own(name):
    """On a device with kernels: attention's op takes what the convolution returns, in evaluation and in training."""
    attention = BLOCKS[name][2]
    original = made(name)
    block, row = converted(original, attention)
    front = "BatchNorm" if FRONT[name] is None else f"BatchNorm and {FRONT[name]}"
    assert row.detail.startswith(f"SqueezeExcite with {front} in front (")
    for training in (False, True):
        norms, activations = [], []
        for each in (original, block):
            with pytest.MonkeyPatch.context() as patch, Operators() as operators, torch.no_grad():
                patch.setattr("tritattn._library._device_problem", lambda device: None)
                each.train(training).to("meta")(some_map().to("meta"))
            norms.append(sum("batch_norm" in operator for operator in operators.on_maps))
            activations.append(sum(operator.rstrip("_") in ACTIVATIONS for operator in operators.on_maps))
        before = next(before for before, op in pairwise(operators.on_maps) if op.startswith(("channel_", "norm_gate")))
        called = training and name == "timm-ReXNet"  # whose attention has a BatchNorm inside, which trains too
        assert before == ("native_batch_norm" if called else "convolution")
        assert norms[0] - norms[1] == (0 if called else 1)
        assert activations[0] - activations[1] == (FRONT[name] is not None)


@pytest.mark.parametrize(
    "name, taken",
    [
        ("moskomule-SEBottleneck", 1),
        ("authors-ECABasicBlock", 1),
        ("authors-sa", 0),
        ("timm-SEResNetBlock", 1),
        ("timm-byobnet-DarkBlock", 1),
        ("monai-SEResNetBottleneck", 1),
        *((name, 1) for name in MIDDLE),
    ],
)
def test_the_norm_in_front_is_part_of_attention_in_evaluation(name, taken, monkeypatch):
    """Of a channel gate that follows it at once, as long as nobody wants its parameters' gradients; then, and in training, it is called."""
    calls = []
    for kind in (nn.modules.batchnorm._BatchNorm, peer("timm.layers").BatchNormAct2d):
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x, forward=forward: calls.append(self) or forward(self, x))
    original = made(name)
    block, _ = converted(original, BLOCKS[name][2])

    def called(module, training, grad=True):
        """How often norms outside of attention are called, and what comes of it."""
        calls.clear()
        torch.manual_seed(3)
        twin, x = copy.deepcopy(module).train(training), some_map().requires_grad_(grad)
        inside = {id(p) for p in twin.get_submodule(BLOCKS[name][2]).parameters()}
        with torch.set_grad_enabled(grad):
            y = twin(x)
        return sum(id(norm.weight) not in inside for norm in calls), y, torch.autograd.grad(y.sum(), x)[0] if grad else None

    for training, grad in ((True, True), (False, True), (True, False), (False, False)):
        (usual, *expected), (found, *results) = called(original, training, grad), called(block, training, grad)
        assert usual - found == (0 if training or grad else taken)
        torch.testing.assert_close(results, expected)
    (usual, *expected), (found, *results) = called(original, False), called(block.requires_grad_(False), False)
    assert usual - found == taken
    torch.testing.assert_close(results, expected)


def test_stochastic_depth_that_is_active_stands_between():
    path = peer("timm.layers").DropPath(0.5)
    torch.manual_seed(0)
    original = timm("resnet", "BasicBlock", C, C, drop_path=path, **attention("se")()).double()
    block, _ = converted(original, "se")
    x = some_map()
    assert calls(block.train(), x, "se") == 1 and calls(block.eval(), x, "se") == 0
    for training in (True, False):
        original.train(training)
        block.train(training)
        original.load_state_dict(block.state_dict())
        torch.manual_seed(3)
        expected = step(original, x)
        torch.manual_seed(3)
        assert_same(step(block, x), expected)


CHANGES = {
    "hook on the attention": lambda block: block.se.register_forward_hook(lambda m, args, y: 2 * y),
    "hook on the activation": lambda block: block.act3.register_forward_hook(lambda m, args, y: 2 * y),
    "hook inside the attention": lambda block: block.se.fc1.register_forward_hook(lambda m, args, y: 2 * y),
    "another activation": lambda block: setattr(block, "act3", nn.Tanh()),
    "another attention": lambda block: setattr(block, "se", nn.Hardtanh(-0.3, 0.3)),
    "no attention": lambda block: setattr(block, "se", None),
    "stochastic depth": lambda block: setattr(block, "drop_path", nn.Dropout(1.0)),
    "another step": lambda block: setattr(block, "conv2", nn.Conv2d(8, 8, 1, dtype=torch.float64)),
    "hook on a step": lambda block: block.bn3.register_forward_hook(lambda m, args, y: 2 * y),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_the_swap_take_effect(change):
    original = made("timm-Bottleneck-silu").train()
    block, _ = converted(original, "se")
    x = some_map()
    before = block(x)
    for each in (original, block):
        torch.manual_seed(4)
        CHANGES[change](each)
    original.load_state_dict(block.state_dict())
    found = step(block, x)
    assert_same(found, step(original, x))
    assert not torch.allclose(found["y"], before)


def twice(m, args, y):
    return 2 * y


# what is changed on a block with attention in the middle
CHANGES_IN_FRONT = {
    "hook on the norm": ("timm-InvertedResidual", lambda block: block.bn2.register_forward_hook(twice)),
    "hook on the norm's activation": ("timm-InvertedResidual", lambda block: block.bn2.act.register_forward_hook(twice)),
    "hook before attention": ("timm-InvertedResidual", lambda block: block.se.register_forward_pre_hook(lambda m, args: 2 * args[0])),
    "hook inside attention": ("timm-InvertedResidual", lambda block: block.se.conv_reduce.register_forward_hook(twice)),
    "hook on another step": ("timm-InvertedResidual", lambda block: block.conv_pwl.register_forward_hook(twice)),
    "another activation": ("timm-InvertedResidual", lambda block: setattr(block.bn2, "act", nn.Tanh())),
    "drop": ("timm-InvertedResidual", lambda block: setattr(block.bn2, "drop", nn.Softsign())),
    "a filter": ("timm-InvertedResidual", lambda block: setattr(block, "aa", nn.AvgPool2d(3, 1, 1))),
    "another norm": ("timm-InvertedResidual", lambda block: setattr(block, "bn2", nn.GroupNorm(2, 2 * C, dtype=torch.float64))),
    "parametrization": ("timm-InvertedResidual", lambda block: parametrize.register_parametrization(block.bn2, "weight", nn.Tanh())),
    "a step": ("timm-InvertedResidual", lambda block: setattr(block, "bn_s2d", nn.Identity()) or setattr(block, "conv_s2d", nn.Tanh())),
    "no shortcut": ("timm-InvertedResidual", lambda block: setattr(block, "has_skip", False)),
    "another attention": ("timm-RegNet", lambda block: setattr(block, "se", nn.Hardtanh(-0.3, 0.3))),
    "hook on the container": ("timm-RegNet", lambda block: block.conv2.register_forward_hook(twice)),
    "one more in the container": ("timm-RegNet", lambda block: setattr(block.conv2, "aa", nn.Tanh())),
    "one more layer": ("torchvision-mobilenetv3", lambda block: block.append(nn.Tanh())),
    "one layer less": ("torchvision-mobilenetv3", lambda block: block.pop(3)),
    "hook on a Sequential inside": ("torchvision-mobilenetv3", lambda block: block[1].register_forward_hook(twice)),
    "one more in a Sequential inside": ("torchvision-mobilenetv3", lambda block: block[1].append(nn.Tanh())),
    "another layer there": ("torchvision-mobilenetv3", lambda block: block[1].__setitem__(2, nn.Tanh())),
    "hook on a plain norm": ("torchvision-mobilenetv3", lambda block: block[1][1].register_forward_hook(twice)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES_IN_FRONT)
def test_changes_around_attention_in_the_middle_take_effect(change, training):
    name, apply = CHANGES_IN_FRONT[change]
    original = made(name).train(training)
    block, _ = converted(original, BLOCKS[name][2])
    before = block(some_map())
    for each in (original, block):
        apply(each)
        each.train(training)
    original.load_state_dict(block.state_dict())
    found = step(block, some_map())
    assert_same(found, step(original, some_map()))
    assert found["y"].shape != before.shape or not torch.allclose(found["y"], before)


def test_a_compiled_norm_adds_its_activation_once(monkeypatch):
    original = made("timm-InvertedResidual")
    block, _ = converted(original, "se")
    block.bn2.compile(backend="eager")
    assert_same(step(block, some_map()), step(original, some_map()))


def test_slices_of_a_converted_sequential():
    """They have its type, and run what they hold."""
    original = made("torchvision-mobilenetv3").eval()
    block, _ = converted(original, "2")
    assert_same(step(block[:3], some_map()), step(original[:3], some_map()))
    taken = block[:3]
    assert [row.status for row in tritattn.convert(taken)] == ["converted", "already"]
    assert_same(step(taken, some_map()), step(original[:3], some_map()))
    assert [row.status for row in tritattn.restore(block[1:])] == ["restored", "restored"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["timm-InvertedResidual", "torchvision-regnet"])
@pytest.mark.parametrize("training", [True, False])
def test_as_close_to_fp64_as_the_original(name, dtype, training):
    original = made(name).to(dtype).train(training)
    block, _ = converted(original, BLOCKS[name][2])
    x = some_map().to(dtype)
    expected = step(copy.deepcopy(original).double(), x.double())
    theirs, ours = step(original, x), step(block, x)
    assert ours.keys() == expected.keys()
    largest = max(float(t.abs().max()) for key, t in expected.items() if key.startswith("d "))
    for key, t in expected.items():
        error, usual = (float((found[key].double() - t).abs().max()) for found in (ours, theirs))
        assert error <= 2 * usual + 8 * torch.finfo(dtype).eps * (largest if key.startswith("d ") else float(t.abs().max())), key
    assert ours["y"].dtype == dtype


def test_what_cannot_be_part_of_attention_is_left_with_a_reason():
    reasons = {
        "bn2 is BatchNormAct2d": lambda block: setattr(block.bn2, "act", nn.Mish()),
        "aa is BlurPool2d": lambda block: setattr(block, "aa", peer("timm.layers").BlurPool2d(2 * C)),
        "it has a layer that timm (EfficientNet) InvertedResidual has not: late, a Tanh": lambda block: block.add_module("late", nn.Tanh()),
    }
    for reason, change in reasons.items():
        block = made("timm-InvertedResidual")
        change(block)
        rows = {row.path: row for row in tritattn.convert(block)}
        assert rows["se"].status == "converted" and rows[""].status == "left" and reason in rows[""].detail, rows
    plain = nn.Sequential(nn.Conv2d(C, C, 1), peer("torchvision.ops.misc").SqueezeExcitation(C, 8), nn.ReLU())
    mixed = nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(), peer("torchvision.ops.misc").SqueezeExcitation(C, 8), nn.Flatten())
    for sequential in (plain, mixed):
        assert [row.cls for row in tritattn.convert(sequential)] == ["SqueezeExcitation"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(C), nn.GroupNorm(2, C)], ids=["BatchNorm", "GroupNorm"])
def test_a_norm_tells_how_many_channels_a_sequential_takes(norm):
    original = nn.Sequential(norm, nn.ReLU(), peer("torchvision.ops.misc").SqueezeExcitation(C, 8)).double()
    block = copy.deepcopy(original)
    assert [row.cls for row in tritattn.convert(block).converted] == ["Sequential", "SqueezeExcitation"]
    x = some_map()
    assert_close(step(block, x), step(original, x))


def test_left_with_a_reason_while_its_attention_is_converted():
    reasons = {
        "act3 is of an unknown type": lambda block: setattr(block, "act3", nn.Mish()),
        "act3 carries hooks": lambda block: block.act3.register_forward_hook(lambda m, args, y: y),
        "it has a layer that timm Bottleneck has not: late, a Hardtanh": lambda block: block.add_module("late", nn.Hardtanh()),
    }
    for reason, change in reasons.items():
        block = made("timm-Bottleneck-silu")
        change(block)
        rows = {row.path: row for row in tritattn.convert(block)}
        assert rows["se"].status == "converted" and rows[""].status == "left", rows
        assert reason in rows[""].detail or (reason.startswith("act3 is") and "act3 is Mish()" in rows[""].detail), rows[""]


@pytest.mark.parametrize("name", ["timm-BasicBlock", "timm-InvertedResidual", "torchvision-mobilenetv3"])
def test_copies_compiles_exports_and_runs_under_autocast(name):
    torch.compiler.reset()
    original = made(name).float()
    block, _ = converted(original, BLOCKS[name][2])
    x = some_map().float()
    for each in (copy.deepcopy, pickled, compiled):
        assert_close(step(each(copy.deepcopy(block)), x), step(copy.deepcopy(original), x))
    expected = original.eval()(x)
    with torch.no_grad():  # where the norm is part of attention
        torch.testing.assert_close(torch.export.export(block.eval(), (x,)).module()(x), expected)
        torch.testing.assert_close(compiled(block)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x), original(x), atol=0.1, rtol=0.05)


def pickled(block):
    return pickle.loads(pickle.dumps(block))


def compiled(block):
    block.compile(fullgraph=True, backend="aot_eager")
    return block


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values())
    for key, t in expected.items():
        torch.testing.assert_close(found[key], t, rtol=0, atol=1e-5 * largest)
