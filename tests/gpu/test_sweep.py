"""The sweep on a GPU: captured in CUDA graphs, cold, counted, and right."""

import csv
import io

import pytest
from rich.console import Console

from perf import sweep, timing
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
