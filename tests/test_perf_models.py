"""The harness, real networks: their forms, what is checked before anything is timed, and what the rows say."""

import copy
import csv
import dataclasses
import functools
import os

import pytest
import torch
from peer_blocks.external import SEAttention
from peer_imports import peer
from rich.console import Console
from torch import nn

import tritattn
from perf import models, networks, runner, schema


class Tiny(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        super().__init__(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), SEAttention(16, 4), nn.ReLU(), nn.Dropout(0.5), *head)


CASE = models.Case("timm/tiny", "eager", "training", "fp32", "channels_last", 2, 8)


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), width=150)  # noqa: SIM115


def rows_of(path) -> dict[tuple[str, str], dict[str, str]]:
    with open(path, newline="") as file:
        return {(row["mode"], row["provider"]): row for row in csv.DictReader(file)}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(networks, "load", lambda name: Tiny())


def measure(path, *cases):
    models.models(cases, path, "cpu", quiet(), samples=2, sample_ms=0.1)


def test_every_form_is_checked_and_timed(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.csv"
    cases = [dataclasses.replace(CASE, mode=mode) for mode in models.MODES]
    measure(path, *cases)
    rows = rows_of(path)
    assert rows.keys() == {(mode, provider) for mode in models.MODES for provider in models.PROVIDERS}
    for (_, provider), row in rows.items():
        assert row["status"] == "ok" and row["blocks"] == "1" and row["timer"] == "cpu" and row["peak_mb"] == ""
        assert float(row["images_s"]) == pytest.approx(2e3 / float(row["ms_p50"]), rel=1e-4)
        checked = provider != "plain"
        assert all(bool(row[name]) == checked for name in ("max_err", "cost_us", "cost_pct"))
        assert not checked or float(row["max_err"]) < 1e-4
    plain, ours = (float(rows["training", name]["ms_p50"]) for name in ("plain", "tritattn"))
    assert float(rows["training", "tritattn"]["cost_us"]) == pytest.approx(500 * (ours - plain), rel=1e-3, abs=0.01)
    assert float(rows["training", "tritattn"]["cost_pct"]) == pytest.approx(100 * (ours / plain - 1), rel=1e-3, abs=0.01)
    before = path.read_text()
    monkeypatch.setattr(models, "Bench", None)  # nothing is measured again
    measure(path, *cases)
    assert path.read_text() == before


def test_compiled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    measure(tmp_path / "m.csv", dataclasses.replace(CASE, execution="compile", dtype="bf16"))
    table = schema.read(tmp_path / "m.csv", schema.MODELS)
    assert len(table) == 3 and set(table.status) == {"ok"} and set(table.execution) == {"compile"}


@pytest.mark.parametrize("mode, part", [("inference", 2), ("training", 2), ("training", 5)])
def test_a_network_that_computes_something_else_is_not_timed(tiny, tmp_path, monkeypatch, mode, part):
    """The last layer of its gate is off by a hundredth (part 2), or nothing but the gradient of what comes before the pooling (part 5)."""
    build = models.forms

    def wrong(*args):
        found = build(*args)
        ours = found.models["tritattn"]
        if part == 2:
            ours[2].fc[2].weight.data *= 1.01
        else:
            ours[part].register_forward_hook(lambda module, x, y: 1.01 * y - 0.01 * y.detach())
        return found

    monkeypatch.setattr(models, "forms", wrong)
    measure(tmp_path / "m.csv", dataclasses.replace(CASE, mode=mode))
    rows = rows_of(tmp_path / "m.csv")
    assert [rows[mode, name]["status"] for name in models.PROVIDERS] == ["ok", "ok", "wrong"]
    assert float(rows[mode, "tritattn"]["max_err"]) > 1e-4 and rows[mode, "tritattn"]["ms_p50"] == "" and rows[mode, "torch"]["cost_us"]


def test_failures_are_rows(tiny, tmp_path, monkeypatch):
    path, build = tmp_path / "m.csv", models.forms

    def raising(error):
        def raises(*args):
            raise error

        return raises

    def failing(*args):
        found = build(*args)
        found.models["plain"].forward = raising(RuntimeError("no kernel"))
        return found

    monkeypatch.setattr(models, "forms", failing)
    measure(path, CASE)
    rows = rows_of(path)
    assert rows["training", "plain"]["status"] == "error: RuntimeError: no kernel"
    assert rows["training", "tritattn"]["status"] == "ok" and rows["training", "tritattn"]["cost_pct"] == ""

    for n, error in ((3, torch.OutOfMemoryError("CUDA out of memory")), (4, networks.Unavailable("timm cannot be imported"))):
        monkeypatch.setattr(models, "forms", raising(error))
        measure(path, dataclasses.replace(CASE, n=n))
    monkeypatch.setattr(models, "forms", build)
    monkeypatch.setattr(models.Bench, "measure", raising(runner.DeviceFailed({"torch": {"status": "error: illegal access"}})))
    with pytest.raises(SystemExit) as ended:
        measure(path, dataclasses.replace(CASE, n=5), dataclasses.replace(CASE, n=6))
    assert ended.value.code == 1
    table = schema.read(path, schema.MODELS)
    assert list(table[table.n == 3].status) == ["oom"] * 3
    assert list(table[table.n == 4].status) == ["unavailable: timm cannot be imported"] * 3
    assert list(table[table.n > 4].provider) == ["torch"]


def test_attached_blocks_and_the_network_without_them():
    torchvision = peer("torchvision")
    found = networks.forms("torchvision/resnet18+se", "cpu", torch.float64, torch.contiguous_format)
    assert len(found.paths) == 8 and all(path.endswith(".attention") for path in found.paths)
    plain = torchvision.models.resnet18().double()
    plain.load_state_dict({key: t for key, t in found.models["torch"].state_dict().items() if ".attention." not in key})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for model in (plain, *found.models.values()):
        model.eval()
    torch.testing.assert_close(found.models["plain"](x), plain(x))
    y = found.models["tritattn"](x)
    assert not torch.allclose(y, plain(x))
    with tritattn.backend("reference"):
        torch.testing.assert_close(found.models["torch"](x), y)


def test_attention_in_place_of_a_convolution_has_no_network_without_it(tmp_path, monkeypatch):
    from peer_blocks.external import SKAttention

    class Replaced(Tiny):
        def __init__(self):
            super().__init__()
            self[2] = SKAttention(16)

    monkeypatch.setattr(networks, "load", lambda name: Replaced())
    measure(tmp_path / "m.csv", dataclasses.replace(CASE, mode="inference"))
    rows = rows_of(tmp_path / "m.csv")
    assert rows["inference", "plain"]["status"] == models.REPLACED and rows["inference", "tritattn"]["status"] == "ok"


def test_nothing_neutral_is_left():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.2))
    for p in model.parameters():
        nn.init.zeros_(p)
    again = copy.deepcopy(model)
    networks.settle(model)
    assert all(bool(p.all()) and p.unique().numel() > 1 for p in model.parameters()) and model[2].p == 0
    assert all(torch.equal(a, b) for a, b in zip(networks.settle(again).parameters(), model.parameters(), strict=True))


def test_cases_cover_every_axis_early():
    cases = models.all_cases()
    assert len(cases) == len(set(cases)) == len(networks.NETWORKS) * 2 * 2 * 2 * 3
    assert dataclasses.astuple(cases[0]) == (networks.NETWORKS[0], "eager", "inference", "bf16", "channels_last", 256, 224)
    for field in ("network", "execution", "mode", "dtype", "layout", "n"):
        assert len({getattr(case, field) for case in cases[:30]}) > 1
    for name in networks.NETWORKS:
        networks.parse(name)
    with pytest.raises(ValueError, match="no network 'keras/x'"):
        networks.parse("keras/x")
