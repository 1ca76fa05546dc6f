"""`convert` and `restore`: what they swap, what they keep, what they leave alone, and that nothing else notices."""

import copy
import dataclasses
import io
import pickle
import re

import peer_blocks.authors as authors
import peer_blocks.blog as blog
import peer_blocks.external as external
import peer_blocks.timm
import pytest
import torch
import torch.distributed as dist
from pairs.foundation import smp, timm
from peer_imports import peer
from peer_pairs import BLOCKS, assert_same, build, sample, samples, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

import tritattn
from tritattn import _verify
from tritattn import nn as tn
from tritattn.peers import NoFit


@pytest.mark.parametrize("name", BLOCKS)
def test_same_numbers_from_the_fused_pass(name, monkeypatch):
    original = build(name)
    block = copy.deepcopy(original)
    (row,) = tritattn.convert(block)
    assert row.status == "converted" and row.path == "" and row.cls == type(original).__name__
    for training in (True, False):
        for ties in (False, True):
            maps = samples(block, name, ties)
            original.train(training)
            block.train(training)
            assert_same(step(block, *maps), step(original, *maps))
    monkeypatch.setattr(type(original), "forward", None)  # a call of the original would raise
    block(*samples(block, name))


@pytest.mark.parametrize("name", ["blog-BasicBlock", "authors-CBAM", "timm-SEModule", "external-SEAttention"])
def test_nothing_else_changes(name):
    block = build(name).eval()
    for p in block.parameters():
        p.grad = torch.ones_like(p)
    block.some_flag = "kept"
    handle = block.register_forward_hook(lambda m, args, y: y + 1)
    tensors = [*block.parameters(), *block.buffers()]
    before = copy.deepcopy([t.detach() for t in tensors])
    keys, kind, attributes = list(block.state_dict()), type(block), set(vars(block))
    modules, random_state = list(block.modules()), torch.get_rng_state()
    x = sample(block)
    expected = block(x)

    tritattn.convert(block)
    assert isinstance(block, kind) and type(block).__name__ == kind.__name__
    assert all(a is b for a, b in zip((*block.parameters(), *block.buffers()), tensors, strict=True))
    assert all(a is b for a, b in zip(block.modules(), modules, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in block.parameters())
    assert list(block.state_dict()) == keys and not block.training and block.some_flag == "kept"
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(block(x), expected)  # the hook runs, once
    handle.remove()
    torch.testing.assert_close(block(x), expected - 1)

    (row,) = tritattn.restore(block)
    assert row.status == "restored" and type(block) is kind and set(vars(block)) == attributes
    assert torch.equal(block(x) + 1, expected)


@pytest.mark.parametrize("name", ["blog-BasicBlock", "authors-CBAM", "timm-SEModule"])
def test_copies_and_pickles(name):
    block = build(name).eval()
    tritattn.convert(block)
    saved = io.BytesIO()
    torch.save(block, saved)
    saved.seek(0)
    twins = [copy.deepcopy(block), copy.copy(block), torch.load(saved, weights_only=False)]
    twins += [pickle.loads(pickle.dumps(block, protocol)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    x = sample(block)
    for twin in twins:
        assert type(twin) is type(block)
        assert_same(step(twin, x), step(copy.deepcopy(block), x))
        assert [row.status for row in tritattn.restore(twin)] == ["restored"]
    assert tritattn.convert(block)[0].status == "already"


def test_a_network():
    torch.manual_seed(0)
    network = blog.Network().double()
    original = copy.deepcopy(network)
    report = tritattn.convert(network)
    assert [(row.path, row.cls, row.status) for row in report] == [
        ("layer1", "BasicBlock", "converted"),
        ("layer2", "BasicBlock", "converted"),
        ("scse", "csSE", "converted"),
        ("ca", "ChannelAttention", "converted"),
        ("sa", "SpatialAttention", "converted"),
    ]
    assert report.converted == list(report) and not report.left
    header, *lines = str(report).splitlines()
    assert header.split() == ["path", "class", "status", "detail"] and len(lines) == 5 and repr(report) == str(report)
    assert lines[2].split() == ["scse", "csSE", "converted", "ConcurrentSE", "(0809zheng.github.io)"]
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(step(network, x), step(original, x))
    assert str(tritattn.convert(nn.Linear(2, 2))) == "no attention block found"
    with pytest.raises(TypeError, match="^model: got str"):
        tritattn.convert("network")
    with pytest.raises(TypeError, match="^model: got str"):
        tritattn.restore("network")


def test_a_shared_block_is_one_block():
    block = blog.csSE(8)
    model = nn.Sequential(block, nn.ReLU(), block)
    assert [row.path for row in tritattn.convert(model)] == ["0"]
    assert [row.path for row in tritattn.restore(model)] == ["0"]


def test_our_own_modules_are_not_touched():
    model = nn.Sequential(tn.CBAM(16), tn.Attention(external.SEAttention(16)))
    assert [row.path for row in tritattn.convert(model)] == ["1.layer"]


def test_the_second_pooled_context_of_iaff(name="authors-iAFF"):
    """The authors' PyTorch code has one and never calls it, so that training in parallel complains; ours uses it, unless it stands for theirs."""
    theirs = build(name)
    maps = samples(theirs, name)
    theirs(*maps).square().sum().backward()
    assert {key.split(".")[0] for key, p in theirs.named_parameters() if p.grad is None} == {"global_att2"}
    for reuse in (True, False):
        ours = tn.IAFF(16, reuse_pooled=reuse).double()
        ours.load_state_dict(theirs.state_dict())
        ours(*maps).square().sum().backward()
        assert {key.split(".")[0] for key, p in ours.named_parameters() if p.grad is None} == ({"pooled2"} if reuse else set())


def test_pooled_contexts_need_more_than_one_image():
    """In training, as the authors' do."""
    x = torch.randn(1, 16, 4, 4)
    for block in (build("authors-AFF").float(), tn.AFF(16)):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            block(x, x)
        assert block.eval()(x, x).isfinite().all()


# ---- what is left, and why ---------------------------------------------------------------------------------------------------------------


class Scaled(external.SEAttention):
    """Same name, same parameters, other results."""

    def forward(self, x):
        return 2 * super().forward(x)


class EvenTies(blog.ChannelAttention):
    """As the original, but for the gradient of a maximum that occurs twice."""

    def forward(self, x):
        pools = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        return self.sigmoid(sum(map(self.sharedMLP, pools)))


class DriftingEvaluation(authors.CBAM):
    """As the original while it trains."""

    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x) * 1.0001


Scaled.__name__, EvenTies.__name__, DriftingEvaluation.__name__ = "SEAttention", "ChannelAttention", "CBAM"


def changed(block, path, value):
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, value)
    return block


def hooked(block, path):
    block.get_submodule(path).register_forward_hook(lambda *_: None)
    return block


def overridden(block):
    block.forward = lambda x: x
    return block


class Unknown(nn.Module):
    def forward(self, x):
        return x


LEFT = {
    "other numbers": (lambda: Scaled(16, 4), r"not the same in training mode: the output differs by 5\.0e-01"),
    "other gradient of ties": (lambda: EvenTies(16), "not the same in training mode: gradient of the input differs"),
    "other in evaluation": (lambda: DriftingEvaluation(32), "not the same in evaluation mode: the output differs"),
    "hook inside": (lambda: hooked(external.SEAttention(16, 4), "fc.2"), "fc.2 carries hooks"),
    "hook on an activation": (lambda: hooked(blog.BasicBlock(8, 8), "relu"), "relu carries hooks"),
    "unknown type": (lambda: changed(external.SEAttention(16, 4), "avg_pool", Unknown()), "avg_pool is of an unknown type, Unknown"),
    "unknown activation": (lambda: changed(external.SEAttention(16, 4), "fc.1", nn.Mish()), "fc.1 is of an unknown type, Mish"),
    "unknown slope": (lambda: changed(external.SEAttention(16, 4), "fc.1", nn.LeakyReLU(0.2)), "LeakyReLU.*which is not fused"),
    "gates differ": (lambda: changed(smp(16), "sSE.1", nn.Hardsigmoid()), "its gates differ: hard_sigmoid, sigmoid"),
    "replaced layer": (
        lambda: changed(external.SEAttention(16, 4), "fc.0", nn.Bilinear(2, 2, 2)),
        "fc.0 is a Bilinear, not a plain layer",
    ),
    "another layer": (
        lambda: changed(external.SEAttention(16, 4), "avg_pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(16))),
        "avg_pool.1, a BatchNorm2d",
    ),
    "shape": (lambda: changed(blog.csSE(16), "sSE.Conv1x1", nn.Conv2d(8, 1, 1, bias=False)), r"shape \(1, 8\), expected \(1, 16\)"),
    "a bias": (lambda: changed(blog.csSE(16), "sSE.Conv1x1", nn.Conv2d(16, 1, 1)), r"sSE\.Conv1x1\.bias has shape"),
    "own forward": (lambda: overridden(external.SEAttention(16, 4)), "it has a forward of its own"),
    "meta": (lambda: external.SEAttention(16, 4).to("meta"), "has no data"),
    "another norm in SE": (lambda: timm("SEModule")(16, norm_layer=nn.InstanceNorm2d), "bn is a InstanceNorm2d"),
    "a stack of maps": (
        lambda: peer("timm.layers.selective_kernel").SelectiveKernelAttn(16),
        r"timm SelectiveKernelAttn: it takes its maps stacked",
    ),
    "scripted": (lambda: torch.jit.script(smp(16)), "scripted"),
    "compiled": (lambda: torch.compile(external.SEAttention(16, 4)), "compiled"),
    "spectral_norm": (
        lambda: changed(
            block := authors.CBAM(32), "ChannelGate.mlp.1", nn.utils.parametrizations.spectral_norm(block.ChannelGate.mlp[1])
        ),
        "has a parametrization with a state",
    ),
    "unlike any of that name": (lambda: changed(authors.CBAM(32), "ChannelGate.mlp", Unknown()), "it has no layer ChannelGate.mlp.1"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", LEFT)
def test_left_alone_with_a_reason(name):
    build, reason = LEFT[name]
    block = build()
    kind, attributes = type(block), dict(vars(block))
    row = tritattn.convert(block)[0]
    assert (row.path, row.status) == ("", "left")
    assert re.search(reason, row.detail), row.detail
    assert type(block) is kind and vars(block).keys() == attributes.keys()


def test_common_names_are_not_reported():
    class BasicBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 3, 3)

    assert not tritattn.convert(BasicBlock())


def test_parts_of_a_block_that_is_left():
    block = blog.BasicBlock(8, 8)
    block.drop = nn.Dropout()
    rows = tritattn.convert(block)
    assert [(row.path, row.status) for row in rows] == [("", "left"), ("ca", "converted"), ("sa", "converted")]
    assert "drop is of an unknown type, Dropout" in rows[0].detail


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_blocks_are_left(one_process):
    blocks = [
        distribute_module(external.SEAttention(16, 4), one_process),
        fully_shard(external.SEAttention(16, 4), mesh=one_process),
        fully_shard(nn.Sequential(external.SEAttention(16, 4)), mesh=one_process),
    ]
    for block in blocks:
        (row,) = tritattn.convert(block)
        assert row.status == "left" and "is sharded" in row.detail


def test_converted_blocks_can_be_sharded(one_process):
    model = blog.Network()
    original = copy.deepcopy(model)
    tritattn.convert(model)
    for module in (model.layer1, model.scse, model):
        fully_shard(module, mesh=one_process)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), original(x))
    model(x).sum().backward()
    original(x).sum().backward()
    for found, expected in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-4)
    assert {row.path for row in tritattn.restore(model).left} == {"layer1", "scse"}


# ---- the model around it -----------------------------------------------------------------------------------------------------------------


def contexts():
    yield "no_grad", torch.no_grad
    yield "inference_mode", torch.inference_mode
    yield "autocast", lambda: torch.autocast("cpu", torch.bfloat16)
    yield "deterministic", Deterministic


class Deterministic:
    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_):
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "context"), contexts(), ids=lambda value: value if isinstance(value, str) else "")
def test_modes_around_the_call_do_not_matter(name, context):
    block = blog.BasicBlock(8, 8)
    with context():
        assert tritattn.convert(block).converted


def test_hooks_of_the_block_do_not_run():
    block, calls = blog.csSE(8), []
    block.register_forward_hook(lambda *_: calls.append("forward"))
    block.register_forward_pre_hook(lambda *_: calls.append("pre"))
    block.register_full_backward_hook(lambda *_: calls.append("backward"))
    assert tritattn.convert(block).converted and not calls
    block(torch.randn(1, 8, 4, 4, requires_grad=True)).sum().backward()
    assert calls == ["pre", "forward", "backward"]


def test_frozen_and_zero_blocks_are_verified_as_well():
    """Values that hide a difference are drawn anew on the copy."""
    block = external.CBAMBlock(32, kernel_size=3).requires_grad_(False)
    wrong = copy.deepcopy(block)
    for b in (block, wrong):
        for p in b.parameters():
            p.zero_()
    wrong.sa.forward = lambda x: torch.sigmoid(wrong.sa.conv(torch.stack((x.mean(1), x.max(1)[0]), 1)))  # inputs swapped
    assert tritattn.convert(block).converted
    assert not block.ca.se[0].weight.any()
    assert tritattn.convert(wrong)[0].status == "left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verification_in_low_precision(dtype):
    """What a GPU's blocks go through besides fp64: as close to fp64 as the original is."""
    block = external.SEAttention(64, 4).to(dtype)
    x = torch.randn(2, 64, 8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    tritattn.convert(block)
    plan = block._tritattn
    tritattn.restore(block)
    _verify._compare_values(block, plan, [x])
    with pytest.raises(NoFit, match=f"not the same in {dtype}"):
        _verify._compare_values(block, dataclasses.replace(plan, settings=plan.settings | {"gate": "relu"}), [x])


@pytest.mark.parametrize("options", [{}, {"use_mlp": False, "extra_params": True, "extent": 2}], ids=["mlp", "parameters"])
def test_gather_excite_where_timms_cannot_be_built(options):
    with pytest.raises(TypeError):
        peer("timm.layers").GatherExcite(8, **options)
    block = tn.GatherExcite(8, **options).double()
    theirs = peer_blocks.timm.GatherExcite(8, **options).double()
    block.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), theirs(x))


def test_gather_excite_of_the_whole_map():
    """timm's convolution of the map's own size is padded and leaves many positions, each of another part of the map; ours gathers to one."""
    theirs = peer_blocks.timm.GatherExcite(8, (5, 7), True, use_mlp=False).eval()
    x = torch.randn(2, 8, 5, 7)
    assert theirs.gather(x).shape == (2, 8, 5, 7)
    ours, same = (tn.GatherExcite(8, (5, 7), True, use_mlp=False, padded=padded).eval() for padded in (False, True))
    for block in (ours, same):
        block.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(same(x), theirs(x))
    torch.testing.assert_close(ours(x), x * torch.sigmoid(ours.gather.norm1((x * ours.gather.conv1.weight[:, 0]).sum((2, 3), keepdim=True))))
    with pytest.raises(ValueError, match=r"^gather: got \[2, 8, 2, 1\] from it, expected \[2, 8, 1, 1\]"):
        ours(torch.randn(2, 8, 6, 7))


@pytest.mark.parametrize("name", ["authors-sa_layer", "external-ShuffleAttention"])
def test_shuffle_attention_keeps_channels_last(name):
    """Where the originals make the map contiguous, or cannot view it."""
    block = build(name)
    x = sample(block).contiguous(memory_format=torch.channels_last)
    if name == "authors-sa_layer":
        assert block(x).is_contiguous()
    else:
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            block(x)
    expected = block(x.contiguous())
    tritattn.convert(block)
    assert block(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)
