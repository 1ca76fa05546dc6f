"""Residual blocks around converted attention: its gating pass takes their sum and activation."""

import copy
import pickle

import peer_blocks
import pytest
import torch
from peer_blocks import residual
from peer_imports import peer
from peer_pairs import assert_same, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tritattn
from tritattn.peers import RESIDUALS

C = 32


def shortcut(stride=1):
    return nn.Sequential(nn.Conv2d(C, C, 1, stride, bias=False), nn.BatchNorm2d(C))


def timm(module, name, *args, **options):
    return getattr(peer(f"timm.models.{module}"), name)(*args, **options)


def byobnet(name, **options):
    return timm("byobnet", name, C, C, layers=peer("timm.models.byobnet").LayerFn(attn=peer("timm.layers").SEModule), attn_last=True, **options)


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
    """A converted copy, of which the residual block is what was asked for."""
    copied = copy.deepcopy(block)
    report = tritattn.convert(copied)
    assert not report.left, report
    rows = {row.path: row for row in report}
    assert rows.keys() >= {"", attention} and " with sum and " in rows[""].detail, report
    return copied, rows[""]


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op._schema.name.split("::")[1])
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
        assert_same(step(block, x), step(original, x))
    tritattn.restore(block)
    assert type(block) is type(original) and type(block.get_submodule(attention)) is type(original.get_submodule(attention))


def test_every_entry_is_tried():
    assert {source for _, source, _ in BLOCKS.values()} | {"torchvision"} == {entry.source for entry in RESIDUALS}


def test_sum_and_activation_are_no_passes_of_their_own():
    """On a device with kernels: one op from the last BatchNorm to the end."""
    block, _ = converted(made("timm-Bottleneck-silu").eval(), "se")
    with pytest.MonkeyPatch.context() as patch, Operators() as operators, torch.no_grad():
        patch.setattr("tritattn._library._device_problem", lambda device: None)
        block.to("meta")(some_map().to("meta"))
    assert operators.names[-1] == "channel_gate", operators.names
    assert not {"add", "add_", "relu", "relu_"} & set(operators.names)


@pytest.mark.parametrize("name, taken", [("moskomule-SEBottleneck", 1), ("authors-ECABasicBlock", 1), ("authors-sa", 0), ("timm-SEResNetBlock", 0)])
def test_the_last_norm_is_part_of_attention_in_evaluation(name, taken, monkeypatch):
    """Of a channel gate that follows it at once, as long as nobody wants its parameters' gradients; then, and in training, it is called."""
    calls = []
    norm = nn.modules.batchnorm._BatchNorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: calls.append(self) or forward(self, x))
    original = made(name)
    block, _ = converted(original, BLOCKS[name][2])

    def called(module, training, grad=True):
        calls.clear()
        with torch.set_grad_enabled(grad):
            y = copy.deepcopy(module).train(training)(some_map())
        return len(calls), y

    for training, grad in ((True, True), (False, True), (True, False), (False, False)):
        (usual, expected), (found, y) = called(original, training, grad), called(block, training, grad)
        assert usual - found == (0 if training or grad else taken)
        torch.testing.assert_close(y, expected)
    frozen, x = block.eval().requires_grad_(False), some_map().requires_grad_()
    calls.clear()
    (dx,) = torch.autograd.grad(frozen(x).sum(), x)
    assert usual - len(calls) == taken
    torch.testing.assert_close(dx, torch.autograd.grad(original.eval()(x).sum(), x)[0])


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


def test_copies_compiles_and_runs_under_autocast():
    original = made("authors-cbam-bottleneck").float().eval()
    block, _ = converted(original, "cbam")
    x = some_map().float()
    expected = original(x)
    for copied in (copy.deepcopy(block), torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.testing.assert_close(copied(x), expected)
    timms, _ = converted(made("timm-BasicBlock"), "se")
    again = pickle.loads(pickle.dumps(timms))
    assert_same(step(again, some_map()), step(timms, some_map()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x), original(x), atol=0.1, rtol=0.05)
