"""Tuning with a clock that is told what to say: which tiles are tried, that wrong ones are not timed, and that ops use what was found."""

import json
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

from perf import tune
from perf.cases import make_case
from perf.choices import recorded
from perf.schema import TUNE, read
from perf.shapes import Site
from perf.sweep import Bench
from perf.timing import CpuLane, Timing
from tritattn import _tables, tuning

CASE = make_case("ge", "fp32", "contiguous", 2, Site(1, 8, 4, 4, 2))
EXCITED = make_case("ese", "bf16", "contiguous", 16, Site(1, 16, 1, 1, 2))
PASS, PRODUCT = ("tile 4 contiguous c8 hw16 maps1 row0", 2), ("weights 4 float32 m16 j16", 16)


@pytest.fixture
def clock(monkeypatch):
    """Half a millisecond for the tiles named in the list, one for all others."""
    fast = []

    def measured(lanes, device, **options):
        assert all(isinstance(lane, CpuLane) for lane in lanes.values())
        return {key: Timing(*(0.5 if key in fast else 1.0,) * 3, "cpu", 3) for key in lanes}

    monkeypatch.setattr(tune.timing, "measure", measured)
    return fast


@pytest.mark.parametrize(("case", "entry", "mode"), [(CASE, PASS, "fwd_bwd"), (EXCITED, PRODUCT, "bwd")], ids=["pass", "product"])
def test_tune(clock, tmp_path, monkeypatch, case, entry, mode):
    path, out = tmp_path / "t.csv", tmp_path / "here.json"
    with recorded() as found:
        Bench(case, "cpu").call("tritattn", mode)(0)
    question, rule = next((question, config) for question, config in found.items() if question.entry == entry)
    tried = tune.candidates(rule, question)
    wanted, wrong, spilling = tried[1:4]
    clock += [wanted.key, wrong.key, spilling.key]
    current, answered, check = [""], tune.answered, Bench.error

    @contextmanager
    def noted(question, config):
        current[0] = config.key
        with answered(question, config):
            yield

    class Kernel:
        n_spills = property(lambda self: 2 * (current[0] == spilling.key))

    @contextmanager
    def compiled():
        yield [Kernel()]

    asked = tune.asked
    monkeypatch.setattr(tune, "asked", lambda bench: {one: answer for one, answer in asked(bench).items() if one == question})
    monkeypatch.setattr(tune, "answered", noted)
    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(Bench, "error", lambda bench, *args: (1.0, False) if current[0] == wrong.key else check(bench, *args))
    tune.tune([case], path, "cpu", Console(quiet=True), out=out)
    table = read(path, TUNE)
    rows = table[(table.key == entry[0]) & (table.batch == entry[1])].set_index("config")
    assert list(rows.index) == [config.key for config in tried] and set(rows["mode"]) == {mode}
    assert rows.ratio[wanted.key] == 0.5 and rows.ratio[rule.key] == 1 and set(rows.status) == {"ok", "wrong", "spills"}
    refused = rows.loc[[wrong.key, spilling.key]]
    assert list(refused.status) == ["wrong", "spills"] and refused.ms_p50.isna().all() and list(refused.spill_bytes) == [0, 8]
    assert table.config.iloc[-1] == tune.FINISHED and table.status.iloc[-1] == "ok"
    assert json.loads(out.read_text())["tiles"][entry[0]] == {str(entry[1]): tune.fields_of(wanted.key)}

    before = path.read_text()
    monkeypatch.setattr(tune, "Bench", None)  # nothing is measured again
    tune.tune([case], path, "cpu", Console(quiet=True), out=out)
    assert path.read_text() == before

    monkeypatch.setattr(Bench, "error", check)
    tables = (_tables.read(out, tuning.processors(torch.device("cpu")))[0],)
    monkeypatch.setattr(_tables, "tables", lambda device: tables)
    tuning.choose.cache_clear()
    try:
        with recorded() as found:
            bench = Bench(case, "cpu")
            assert bench.error("fwd_bwd", bench.call("tritattn", "fwd_bwd")(0))[1]
        assert found[question].source == "tuned" and found[question].key == wanted.key
    finally:
        tuning.choose.cache_clear()


def test_a_case_that_fails_is_a_row(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(tune, "asked", broken)
    tune.tune([CASE], tmp_path / "t.csv", "cpu", Console(quiet=True), out=tmp_path / "here.json")
    assert list(read(tmp_path / "t.csv", TUNE).status) == ["error: RuntimeError: no kernel"]
    assert json.loads((tmp_path / "here.json").read_text())["tiles"] == {}
