"""The sweep on a GPU: captured in CUDA graphs, cold, counted, and right. And its relatives: real networks, and tuning."""

import csv
import dataclasses
import io
import json

import pytest
from rich.console import Console

from perf import models, networks, sweep, timing, tune
from perf.cases import make_case
from perf.providers import offers
from perf.shapes import Site

PROVIDERS = ("eager", "compile", "tritattn", "timm", "torchvision")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["se+residual+relu", "cbam"])
def test_a_sweep_of_one_case(cuda, tmp_path, name, layout):
    case = make_case(name, "bf16", layout, 32, Site(1, 256, 28, 28, 16), norm="batch")
    sweep.sweep(sweep.Plan([case], PROVIDERS, samples=5, sample_ms=1.0), tmp_path / "s.csv", "cuda", Console(file=io.StringIO()))
    with open(tmp_path / "s.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["provider"] for r in rows} == {p for p in PROVIDERS if offers(p, case)} and len({r["mode"] for r in rows}) == 4
    for row in rows:
        where = f"{row['provider']} {row['mode']}"
        assert row["status"] == "ok" and row["timer"] == "graph" and row["l2"] == "cold", where
        assert 0 < float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"]), where
        assert int(row["launches"]) >= 1 and float(row["peak_mb"]) > 0, where
        assert 0 < float(row["pct_copy"]) < 150, where
        assert bool(row["config"]) == (row["provider"] == "tritattn"), where


def test_a_call_that_cannot_be_captured_is_timed_by_events(cuda):
    import torch

    with timing.own_stream("cuda"):
        x = torch.ones(1 << 20, device=cuda)
        graph = timing.lane(lambda i: x * 2, 4, "cuda")
        events = timing.lane(lambda i: (x * 2).sum().item(), 4, "cuda")  # waits for the device
        found = timing.measure({"graph": graph, "events": events}, "cuda", samples=5, sample_ms=1.0)
    assert found["graph"].timer == "graph" and found["events"].timer == "events"
    assert found["graph"].ms_p50 < found["events"].ms_p50
    assert (x * 2).sum().item() == 2 * x.numel()  # the device is in order after the failed capture


def test_networks(cuda, tmp_path, monkeypatch):
    from peer_blocks.external import SEAttention
    from torch import nn

    def network(name):
        layers = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), SEAttention(64, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
        return nn.Sequential(*layers)

    monkeypatch.setattr(networks, "load", network)
    latency = models.Case("timm/small", "eager", "inference", "bf16", "channels_last", 1, 32)
    training = dataclasses.replace(latency, mode="training", n=16)
    cases = [latency, training, dataclasses.replace(training, execution="compile", dtype="fp32")]
    models.models(cases, tmp_path / "m.csv", "cuda", Console(file=io.StringIO()), samples=3, sample_ms=1.0)
    with open(tmp_path / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    for row in rows:
        where = f"{row['provider']} {row['execution']} {row['mode']}"
        assert row["status"] == "ok" and row["timer"] == ("latency" if row["n"] == "1" else "events"), where
        assert float(row["peak_mb"]) > 0 and int(row["launches"]) > 1 and bool(row["cost_us"]) == (row["provider"] != "plain"), where


def test_tuning(cuda, tmp_path):
    case = make_case("ge", "bf16", "contiguous", 32, Site(1, 64, 28, 28, 4))
    tune.tune([case], tmp_path / "t.csv", "cuda", Console(file=io.StringIO()), out=tmp_path / "here.json", samples=3, sample_ms=0.5)
    with open(tmp_path / "t.csv", newline="") as file:
        *rows, last = list(csv.DictReader(file))
    assert last["config"] == tune.FINISHED and last["status"] == "ok"
    assert "tile" in {row["key"].split()[0] for row in rows} and len(rows) > 10
    for row in rows:
        assert row["status"] in ("ok", "spills") or row["status"].startswith("error"), row["status"]
        assert row["status"] != "ok" or (row["timer"] == "graph" and 0.1 < float(row["ratio"]) < 100 and row["spill_bytes"])
    assert sum(row["ratio"] == "1" for row in rows) >= 2
    assert json.loads((tmp_path / "here.json").read_text())["schema"] == 1
