"""The blocks by name, and networks made from plain ones by putting blocks into them."""

import copy
import pickle

import peer_blocks.authors
import pytest
import torch
from peer_imports import peer
from torch import nn

import tritattn
from tritattn import nn as tn

REPLACES = ("sk", "splat")  # blocks that take the place of a convolution
FUSES = ("aff", "iaff")  # blocks that take the place of the sum
BLOCKS = [name for name in tn.available() if name not in (*REPLACES, *FUSES)]  # blocks that gate the map that they get


def redraw(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(-1, 1, generator=generator).div_(max(1, p[:1].numel()) ** 0.5).add_(p.dim() == 1)
        for name, b in model.named_buffers():
            b.fill_(name.endswith("running_var"))
    return model


def plain(source, network="resnet18"):
    with torch.device("meta"):  # nobody needs torch's own initial values
        model = peer("torchvision").models.get_model(network) if source == "torchvision" else peer("timm").create_model(network)
    return redraw(model.to_empty(device="cpu"))


def residual_blocks(model):
    return [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]


@pytest.mark.parametrize("name", tn.available())
def test_every_name_makes_a_block(name):
    block = tn.create(name, 64, device="meta", dtype=torch.float16)
    assert isinstance(block, nn.Module) and all(p.is_meta and p.dtype == torch.float16 for p in block.parameters())


def test_create():
    assert tn.create("se", 64, rd_channels=5).fc1.weight.shape == (5, 64, 1, 1)
    with pytest.raises(ValueError, match="name: got 'senet', expected one of .*cbam"):
        tn.create("senet", 64)


@pytest.mark.parametrize("name", ["ceca", "ecam", "ela", "gca", "lcbam", "scoord", "strip"])
def test_timms_names_are_timms_blocks(name):
    theirs = peer("timm.layers").create_attn(name, 32)
    ours = tn.create(name, 32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 32, 5, 6)
    torch.testing.assert_close(ours(x), theirs(x))


class Mine(nn.Module):
    def __init__(self, channels, scale=2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), scale))

    def forward(self, x):
        return x * self.weight


def test_a_block_of_your_own(monkeypatch):
    from tritattn.nn import _registry

    monkeypatch.setattr(_registry, "_FACTORIES", dict(_registry._FACTORIES))
    tn.register("mine", Mine)
    tn.register("mine", Mine)
    assert "mine" in tn.available() and isinstance(tn.create("mine", 8, scale=3.0), Mine)
    assert isinstance(tn.create(Mine, 8), Mine)
    with pytest.raises(ValueError, match="name: got 'se', which is"):
        tn.register("se", Mine)
    with pytest.raises(TypeError, match="factory: got int"):
        tn.register("yours", 3)
    model = tn.attach(plain("timm"), "mine", scale=3.0).eval()
    assert all(isinstance(block.se, Mine) for block in residual_blocks(model))
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(ValueError, match=r"name: got .*Mine.*torchvision's blocks have no place"):
        tn.attach(plain("torchvision"), Mine)
    staged = tn.attach(plain("torchvision"), Mine, where="stages")
    assert [type(stage[-1]) for stage in (staged.layer1, staged.layer4)] == [Mine, Mine]


def written_out(block, x):
    """A residual block with attention, as its authors write it."""
    relu = torch.relu
    attention = block.se if hasattr(block, "se") else block.attention
    out = block.bn2(block.conv2(relu(block.bn1(block.conv1(x)))))
    if hasattr(block, "conv3"):
        out = block.bn3(block.conv3(relu(out)))
    identity = x if block.downsample is None else block.downsample(x)
    attention.activation = "none"
    out = attention(out, identity) if isinstance(attention, (tn.AFF, tn.IAFF)) else attention(out) + identity
    attention.activation = "relu"
    return relu(out)


@pytest.mark.parametrize("name", [*BLOCKS, *FUSES])
@pytest.mark.parametrize("source", ["torchvision", "timm"])
def test_a_residual_block(source, name):
    """Outputs and gradients of the sequence of operations, in training."""
    block = redraw(tn.attach(plain(source), name, where="blocks").layer2[0].double())
    other = copy.deepcopy(block)
    x = torch.randn(2, 64, 6, 8, dtype=torch.float64)
    results = []
    for module, call in ((block, block), (other, lambda x: written_out(other, x))):
        y = call(x.requires_grad_())
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("source, network", [("torchvision", "resnet18"), ("torchvision", "resnet50"), ("timm", "resnet26")])
def test_network(source, network):
    model = plain(source, network)
    keys = model.state_dict().keys()
    assert tn.attach(model, "cbam") is model
    place = "se" if source == "timm" else "attention"
    added = model.state_dict().keys() - keys
    assert keys <= model.state_dict().keys() and added and all(f".{place}." in key for key in added)
    missing, unexpected = model.load_state_dict(plain(source, network).state_dict(), strict=False)
    counters = {key for key in added if key.endswith("num_batches_tracked")}  # torch starts these where a state dict has none
    assert set(missing) == added - counters and not unexpected
    assert isinstance(residual_blocks(model)[0], type(residual_blocks(plain(source, network))[0]))
    # the authors': 16 channels to a hidden one, and a spatial gate that starts at a half
    for block in residual_blocks(model):
        attention = getattr(block, place)
        assert attention.channel.fc1.weight.shape[0] == attention.channel.fc1.weight.shape[1] // 16
        assert not attention.spatial.bn.weight.any()
    model = redraw(model).eval()
    x = torch.randn(1, 3, 32, 32)
    y = model(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again.layer1[0]) is type(model.layer1[0])
        assert torch.equal(again(x), y)


@pytest.mark.parametrize("name, stages", [("bam", (1, 1, 1, 0)), ("gsop", (1, 1, 1, 1))])
def test_after_stages(name, stages):
    """Where the authors of BAM and of GSoP put them: keys of the plain network stay."""
    model = plain("torchvision")
    keys = model.state_dict().keys()
    tn.attach(model, name)
    added = [len(layer) - 2 for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert tuple(added) == stages and keys <= model.state_dict().keys()
    assert redraw(model).eval()(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_the_authors_network():
    """The same as replacing the last norm by norm and the authors' own block."""
    ours = redraw(tn.attach(plain("torchvision"), "cbam")).eval()
    theirs = plain("torchvision")
    for block, source in zip(residual_blocks(theirs), residual_blocks(ours), strict=True):
        cbam = peer_blocks.authors.CBAM(source.bn2.num_features)
        tritattn.nn.CBAM(source.bn2.num_features).load_state_dict(cbam.state_dict())  # the keys are theirs
        state = source.attention.state_dict()
        renamed = {"channel.fc1": "ChannelGate.mlp.1", "channel.fc2": "ChannelGate.mlp.3", "spatial": "SpatialGate.spatial"}
        own = {new + key.removeprefix(old): t for key, t in state.items() for old, new in renamed.items() if key.startswith(old)}
        cbam.load_state_dict({key: t.flatten(1) if ".mlp." in key and t.dim() > 1 else t for key, t in own.items()})
        block.load_state_dict({key: t for key, t in source.state_dict().items() if "attention" not in key})
        block.bn2 = nn.Sequential(block.bn2, cbam)
    outside = {key: t for key, t in ours.state_dict().items() if not key.startswith("layer")}
    theirs.load_state_dict(outside, strict=False)
    theirs.eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_stochastic_depth_keeps_timms_order():
    model = tn.attach(peer("timm").create_model("resnet18", drop_path_rate=0.2), "se")
    blocks = residual_blocks(model)
    fused = [block.se.activation == "relu" for block in blocks]
    assert fused == [isinstance(block.drop_path, (nn.Identity, type(None))) for block in blocks] and not all(fused)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("name", FUSES)
def test_a_fusion_that_cannot_take_the_place_of_the_sum_is_refused(name):
    """It takes two maps, and nobody hands it the second after a stage, or where stochastic depth stands before the sum."""
    stochastic = peer("timm").create_model("resnet18", drop_path_rate=0.2)
    for model, where in ((plain("torchvision"), "stages"), (stochastic, "blocks")):
        keys = model.state_dict().keys()
        with pytest.raises(ValueError, match=f"^name: got '{name}', expected a block that takes one map"):
            tn.attach(model, name, where=where)
        assert model.state_dict().keys() == keys


def test_what_is_refused():
    attended = [tn.attach(plain(source), "se") for source in ("timm", "torchvision")]
    for model in (nn.Linear(2, 2), peer("timm").create_model("mobilenetv3_small_050"), *attended):
        state = {name: type(m) for name, m in model.named_modules()}
        with pytest.raises(ValueError, match="^model: got "):
            tn.attach(model, "cbam")
        assert {name: type(m) for name, m in model.named_modules()} == state
    wrong = {"where": "stem", "residual": True, "activation": "silu", "rd_ratio": 2}
    for argument, value in wrong.items():
        model = plain("torchvision")
        with pytest.raises(ValueError, match=f"^{argument}: got "):
            tn.attach(model, "se", **{argument: value})
        assert not any("attention" in name for name, _ in model.named_modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
def test_compile_and_convert():
    torch.compiler.reset()
    model = redraw(tn.attach(plain("torchvision"), "eca")).eval()
    stage, z = model.layer1, torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(torch.compile(stage, backend="aot_eager", fullgraph=True)(z), stage(z))
    assert not tritattn.convert(model).converted
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile"):
        torch.jit.script(model)
