"""The harness, the sweep: what it writes, in what order it measures, what it takes for right, and what `compare` refuses."""

import csv
import dataclasses
import io
import math
import os
import re
import time

import pytest
import torch
from peer_imports import peer
from rich.console import Console
from typer.testing import CliRunner

import tritattn
from perf import cli, compare, environment, schema, sweep, timing
from perf.cases import Answer, Inputs, all_cases, eca_kernel, make_case, relative_error
from perf.ops import BLOCKS, OPS, op
from perf.providers import PROVIDERS, offers
from perf.shapes import SETS, Site

SMALL = Site(1, 16, 6, 5, 4)
HERE = {"device": "a", "os": "", "python": "", "torch": "1", "triton": "1", "cuda": "", "driver": "", "tritattn": "0", "commit": "c"}


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), width=150)  # noqa: SIM115


def small_plan(*names: str, providers=("eager", "tritattn"), **options) -> sweep.Plan:
    cases = [make_case(name, "fp32", "contiguous", 2, SMALL) for name in names]
    return sweep.Plan(cases, providers, samples=2, sample_ms=0.01, **options)


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# -- the files --------------------------------------------------------------------------------------------------------------------------------


def sweep_row(**changes) -> dict:
    row = {"op": "se", "provider": "tritattn", "mode": "fwd", "dtype": "bf16", "layout": "contiguous", "n": 2, "c": 8, "h": 4, "w": 4, "params": "{}"}
    times = {"status": "ok", "timer": "graph", "l2": "cold", "ms_p50": 1.0, "ms_p20": 0.99, "ms_p80": 1.01, "bytes_min": 10, "pct_copy": 50.0}
    return {**row, **times, **changes}


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    with schema.Writer(tmp_path / "a.csv", schema.SWEEP, HERE) as writer:
        writer.write(sweep_row(max_err=math.inf))
        (row,) = rows_of(tmp_path / "a.csv")
    assert tuple(row) == schema.SWEEP
    assert row["ms_p50"] == "1" and row["max_err"] == "inf" and row["config"] == "" and row["device"] == "a" and row["timestamp"]
    with pytest.raises(ValueError, match="no such column: speed"):
        writer.write(sweep_row(speed=1))


def test_resume_keeps_whole_rows_and_repeats_those_of_another_commit(tmp_path):
    path = tmp_path / "a.csv"
    with schema.Writer(path, schema.SWEEP, {**HERE, "commit": "old"}) as writer:
        writer.write(sweep_row())
    with schema.Writer(path, schema.SWEEP, HERE, resume=True) as writer:
        assert not writer.has(sweep_row())
        writer.write(sweep_row(ms_p50=2.0))
        writer.write(sweep_row(op="cbam"))
    path.write_text(path.read_text() + "sse,tritattn,fw")  # what an interruption may leave
    with schema.Writer(path, schema.SWEEP, HERE, resume=True) as writer:
        assert writer.has(sweep_row()) and writer.has(sweep_row(op="cbam")) and not writer.has(sweep_row(mode="bwd"))
    assert [row["op"] for row in rows_of(path)] == ["se", "se", "cbam"]
    table = schema.read(path, schema.SWEEP)
    assert table.set_index("op").ms_p50.to_dict() == {"se": 2.0, "cbam": 1.0}  # the later of the two
    with pytest.raises(ValueError, match="columns are not"):
        schema.Writer(path, schema.CODEGEN, HERE, resume=True)
    with pytest.raises(ValueError, match="right kind of CSV"):
        schema.read(path, schema.CODEGEN)


def test_commit_changes_with_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    for folder in environment.SOURCES:
        (tmp_path / folder).mkdir()
    (tmp_path / "perf" / "a.py").write_text("x = 1")
    first = environment.commit()
    (tmp_path / "perf" / "a.py").write_text("x = 2")
    assert first.startswith("unknown+") and environment.commit() not in (first, "unknown")


# -- cases ------------------------------------------------------------------------------------------------------------------------------------


def test_cases_cover_every_axis_before_they_repeat_one():
    cases = all_cases(OPS, SETS, ("bf16", "fp32"), ("contiguous", "channels_last"))
    assert len(cases) == len(set(cases))
    first = cases[0]
    assert (first.op_name, first.dtype, first.layout, first.shape) == (OPS[0], "bf16", "contiguous", (256, 256, 56, 56))
    early = cases[:60]
    assert {c.layout for c in early} == {"contiguous", "channels_last"} and {c.dtype for c in early} == {"bf16", "fp32"}
    assert len({c.op_name for c in early}) > 5 and len({c.shape for c in early}) > 5
    assert {c.op_name for c in cases} == set(OPS)
    # a squeeze in MobileNetV3 has a hard sigmoid and nothing added after it
    mobile = [c for c in cases if c.shape[1:] == (72, 28, 28)]
    assert {c.op_name for c in mobile} == {"se"} and all(c.options == {"rd": 24, "hidden": "relu", "gate": "hard_sigmoid"} for c in mobile)


def test_options_of_a_case_follow_from_its_site():
    assert [eca_kernel(c) for c in (64, 256, 512, 1024, 2048)] == [3, 5, 5, 5, 7]  # (log2 c + 1) / 2 is 3.5, 4.5, 5, 5.5, 6
    assert make_case("eca", "fp32", "contiguous", 1, SMALL).options["k"] == 3
    assert make_case("se", "fp32", "contiguous", 1, SMALL, hidden="silu", unknown=1).options == {"rd": 4, "hidden": "silu", "gate": "sigmoid"}
    for bad in ("nothing", "se+relu+residual", "se+tanh", "se+residual+relu+relu"):
        with pytest.raises(ValueError, match="no op"):
            op(bad)


def test_bars_and_floors():
    bars = {name: op(name).bar_u for name in ("se", "se+relu", "se+residual", "se+residual+relu", "sse", "sse+residual+relu", "scse_max")}
    assert bars == {
        "se": (3, 4),
        "se+relu": (3, 5),
        "se+residual": (4, 4),
        "se+residual+relu": (4, 6),
        "sse": (2, 3),
        "sse+residual+relu": (3, 5),
        "scse_max": (3, 5),
    }
    assert op("cbam").bar_u == (4, 5) and op("cbam+residual+relu").bar_u == (5, 7) and op("scse+residual+relu").bar_u == (4, 6)
    assert op("se").floor_u == (2, 3) and op("se+residual+relu").floor_u == (3, 5)
    case = make_case("se", "bf16", "contiguous", 2, SMALL)
    assert case.bytes_min("fwd") == 2 * (2 * 2 * 16 * 30 + 2 * 16 * 4 + 4 + 16)


@pytest.mark.parametrize("site", [SMALL, Site(1, 40, 4, 3, 2)], ids=["more pixels", "more channels"])
def test_inputs_leave_no_decision_to_rounding(site):
    inputs = Inputs(make_case("cbam+residual+relu", "bf16", "channels_last", 2, site), "cpu")
    x = inputs.x[0].detach().flatten(2)
    assert x.is_contiguous() is False and inputs.x[0].is_contiguous(memory_format=torch.channels_last)
    for dim in (1, 2):
        highest = x.amax(dim, keepdim=True)
        assert ((x == highest).sum(dim) == 1).all()
    r = inputs.residual[0].detach().flatten(2)
    assert (r.abs() >= 1.5).all() and (r[x > 1] > 0).all() and (r < 0).any()


# -- correctness gates the timings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPS)
def test_every_provider_of_every_op_agrees_with_fp64(name, layout):
    for norm in ("none", "batch") if "norm" in BLOCKS[op(name).block_name].defaults else ("none",):
        case = make_case(name, "fp32", layout, 2, SMALL, norm=norm)
        bench = sweep.Bench(case, "cpu")
        found = [p for p in PROVIDERS if p != "compile" and offers(p, case)]
        assert {"eager", "tritattn"} <= set(found)
        for mode in sweep.MODES:
            for provider in found:
                error, right = bench.error(mode, bench.call(provider, mode)(0))
                assert right, f"{provider} {mode}: {error}"


def test_peers_are_offered_where_they_have_the_block():
    peer("timm")
    known = {name: {norm: offers("timm", make_case(name, "fp32", "contiguous", 1, SMALL, norm=norm)) for norm in ("none", "batch")} for name in OPS}
    assert known["se"]["none"] and known["eca"]["none"] and known["ese"]["none"] and not known["scse"]["none"]
    assert known["cbam"] == {"none": False, "batch": True}


def test_a_wrong_result_has_a_status_and_no_time(tmp_path, monkeypatch):
    fused = BLOCKS["se"].fused
    wrong = dataclasses.replace(BLOCKS["se"], fused=lambda *args, **kwargs: fused(*args, **kwargs) * 1.001)
    monkeypatch.setitem(BLOCKS, "se", wrong)
    sweep.sweep(small_plan("se"), tmp_path / "s.csv", "cpu", quiet())
    rows = rows_of(tmp_path / "s.csv")
    assert {(r["provider"], r["mode"], r["status"]) for r in rows} == {
        (p, m, "ok" if p == "eager" else "wrong") for p in ("eager", "tritattn") for m in sweep.MODES
    }
    for row in rows:
        timed = row["provider"] == "eager"
        assert all(bool(row[name]) == timed for name in ("ms_p50", "ms_p20", "ms_p80", "gbps", "pct_copy", "copy_u"))
        assert (float(row["max_err"]) > 1e-4) != timed and row["bytes_min"]


def test_the_gate_sees_nan_and_wrong_shapes():
    expected = torch.tensor([1.0, -2.0], dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, -2.5]), expected) == 0.25
    assert relative_error(torch.tensor([1.0, math.nan]), expected) == math.inf
    assert relative_error(torch.tensor([1.0]), expected) == math.inf
    answer = Answer(Inputs(make_case("sse", "bf16", "contiguous", 1, SMALL), "cpu"))
    assert answer.scale(2) == max(g.abs().max().item() for g in answer.grads[1:])  # a bias of one number
    assert answer.scale(0) == answer.grads[0].abs().max().item()
    assert 0.01 < answer.tolerance() < 0.05 < answer.tolerance(0) < 0.1


def test_failures_are_rows(tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")

    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(BLOCKS, "se", dataclasses.replace(BLOCKS["se"], fused=out_of_memory))
    monkeypatch.setitem(BLOCKS, "eca", dataclasses.replace(BLOCKS["eca"], fused=broken))
    monkeypatch.setitem(BLOCKS, "cse", dataclasses.replace(BLOCKS["cse"], eager=broken))  # no answer, so nothing to compare with
    sweep.sweep(small_plan("se", "eca", "cse"), tmp_path / "s.csv", "cpu", quiet())
    found = {(r["op"], r["provider"]): r["status"] for r in rows_of(tmp_path / "s.csv")}
    failed = "error: RuntimeError: first line"
    assert found == {
        ("se", "eager"): "ok",
        ("se", "tritattn"): "oom",
        ("eca", "eager"): "ok",
        ("eca", "tritattn"): failed,
        ("cse", "eager"): failed,
        ("cse", "tritattn"): failed,
    }


def test_a_failed_device_ends_the_sweep_after_its_row(tmp_path, monkeypatch):
    def failing(bench, mode, providers, *args):
        raise sweep.DeviceFailed({"tritattn": {"status": "error: illegal access"}})

    monkeypatch.setattr(sweep.Bench, "measure", failing)
    with pytest.raises(SystemExit) as ended:
        sweep.sweep(small_plan("se", "eca"), tmp_path / "s.csv", "cpu", quiet())
    assert ended.value.code == 1
    assert [(r["op"], r["provider"], r["status"]) for r in rows_of(tmp_path / "s.csv")] == [("se", "tritattn", "error: illegal access")]


# -- order, budget, resume --------------------------------------------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    path, measure = tmp_path / "s.csv", sweep.Bench.measure
    seen = []

    def interrupted(bench, mode, providers, *args):
        seen.append((bench.case.op_name, mode, tuple(providers)))
        if seen[-1][:2] == ("se", "bwd"):
            raise KeyboardInterrupt
        return measure(bench, mode, providers, *args)

    monkeypatch.setattr(sweep.Bench, "measure", interrupted)
    with pytest.raises(SystemExit) as ended:
        sweep.sweep(small_plan("se", "eca"), path, "cpu", quiet())
    assert ended.value.code == 130 and len(rows_of(path)) == 4
    before = rows_of(path)
    monkeypatch.setattr(sweep.Bench, "measure", lambda bench, mode, *args: seen.append((bench.case.op_name, mode)) or measure(bench, mode, *args))
    seen.clear()
    sweep.sweep(small_plan("se", "eca"), path, "cpu", quiet())
    assert seen == [("se", "bwd"), ("se", "fwd"), *(("eca", mode) for mode in sweep.MODES)]
    assert rows_of(path)[:4] == before and len(rows_of(path)) == 16
    seen.clear()
    sweep.sweep(small_plan("se", "eca"), path, "cpu", quiet())
    assert not seen


def test_a_budget_ends_the_sweep_between_cases(tmp_path, monkeypatch):
    clock = [0.0]

    def measured(bench, mode, providers, *args):
        clock[0] += 10.0
        return {provider: {"status": "ok"} for provider in providers}

    monkeypatch.setattr(sweep.Bench, "measure", measured)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    plan = small_plan("se", "eca", "ese", "cse", "sse", "scse", "cbam", budget=215.0, modes=("fwd", "bwd"))  # 20 s a case
    plan = dataclasses.replace(plan, cases=[dataclasses.replace(c, n=n) for n in (1, 2) for c in plan.cases])
    sweep.sweep(plan, tmp_path / "s.csv", "cpu", quiet())
    # ten cases take 200 s, and an eleventh, known to take 20, would not fit any more
    assert len(rows_of(tmp_path / "s.csv")) == 10 * 4


def test_quick_runs_compile_only_where_they_can_afford_it():
    plan = small_plan("se", "eca", providers=("eager", "compile", "tritattn"), compile_cases=1)
    assert {p for p, _ in plan.rows(0)} == {"eager", "compile", "tritattn"} and {p for p, _ in plan.rows(1)} == {"eager", "tritattn"}


# -- timing -----------------------------------------------------------------------------------------------------------------------------------


def test_lanes_take_turns_in_a_rotating_order():
    order = []
    lanes = {name: timing.CpuLane(lambda i, name=name: order.append((name, i)), 2) for name in "abc"}
    found = timing.measure(lanes, "cpu", samples=3, sample_ms=0.0)
    runs = [order[i][0] for i in range(0, len(order), 2)]  # two sets a run
    assert [i for _, i in order] == [0, 1] * (len(order) // 2)
    assert runs == list("abcabc") + list("abc") + list("bca") + list("cab")
    assert {t.timer for t in found.values()} == {"cpu"} and {t.samples for t in found.values()} == {3}


def test_a_time_is_that_of_one_call():
    found = timing.measure({"nap": timing.CpuLane(lambda i: time.sleep(0.002), 3)}, "cpu", samples=3, sample_ms=12)
    assert 2.0 <= found["nap"].ms_p20 <= found["nap"].ms_p50 <= found["nap"].ms_p80 < 20
    lane = timing.CpuLane(lambda i: None, 1)
    lane.times = [5.0, 1.0, 2.0, 4.0, 3.0, 6.0]
    assert timing.summary(lane) == timing.Timing(3.5, 2.0, 5.0, "cpu", 6)


def test_sets_of_buffers_outgrow_the_cache(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert timing.sets_for("cuda", 400 << 20) == (1, "cold")
    assert timing.sets_for("cuda", 20 << 20) == (8, "cold")  # 160 MB >= 3 x 50
    assert timing.sets_for("cuda", 1 << 10) == (256, "warm")
    assert timing.sets_for("cpu", 1) == (1, "warm")


@pytest.fixture
def gpu_without_one(monkeypatch):
    """Stand-ins for the parts of torch.cuda that timing uses; the log of what they were asked."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 6.0

    for name, stand_in in {"synchronize": lambda: log.append("synchronize"), "Event": Event}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return log


def test_gpu_samples_are_queued_without_waiting(gpu_without_one, monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    lanes = {"a": timing.EventLane(lambda i: gpu_without_one.append(f"a{i}"), 2), "b": timing.EventLane(lambda i: gpu_without_one.append(f"b{i}"), 1)}
    found = timing.measure(lanes, "cuda", samples=1, sample_ms=12)
    # 6 ms a sample: after the warm-up, 12 ms are two runs of either; the run ahead keeps the host in front of the device
    expected = ["a0", "a1", "record", *["a0", "a1"] * 2, "record", "record", *["b0"] * 2, "record", "synchronize"]
    assert gpu_without_one[-len(expected) :] == expected
    assert found["a"].ms_p50 == 6.0 / (2 * 2) and found["b"].ms_p50 == 6.0 / 2


def test_a_latency_is_waited_for(gpu_without_one, monkeypatch):
    monkeypatch.setattr(timing, "WARM_SECONDS", 0.0)
    lane = timing.LatencyLane(lambda i: gpu_without_one.append("call"), 1)
    assert timing.measure({"a": lane}, "cuda", samples=1, sample_ms=12)["a"].timer == "latency"
    expected = ["record", *["call", "synchronize"] * 2, "record", "synchronize"]
    assert gpu_without_one[-len(expected) :] == expected


def test_what_cannot_be_captured_is_launched_call_by_call(gpu_without_one, monkeypatch):
    def capture(self, call, sets):
        raise failure

    monkeypatch.setattr(timing.GraphLane, "__init__", capture)
    failure = RuntimeError("operation not permitted when stream is capturing")
    calls = []
    lane = timing.lane(calls.append, 5, "cuda")
    assert isinstance(lane, timing.EventLane) and lane.timer == "events" and calls == [0, 1, 2]  # warmed up before the attempt
    failure = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        timing.lane(calls.append, 5, "cuda")


# -- comparing --------------------------------------------------------------------------------------------------------------------------------


def write_sweep(path, *rows, **place):
    with schema.Writer(path, schema.SWEEP, {**HERE, **place}) as writer:
        for row in rows:
            writer.write(row)
    return path


@pytest.mark.parametrize(
    ("after", "code", "words"),
    [
        (sweep_row(), 0, "0 slower"),
        (sweep_row(ms_p50=1.04), 0, "0 slower"),  # below 5 %
        (sweep_row(ms_p50=1.2), 1, "slower: se tritattn fwd"),
        (sweep_row(ms_p50=1.2, ms_p20=1.0, ms_p80=1.4), 0, "0 slower"),  # within the noise
        (sweep_row(ms_p50=0.5), 0, "0.500"),
        (sweep_row(status="wrong", ms_p50=None), 1, "was ok: se tritattn fwd"),
        (sweep_row(op="sse"), 0, "only in A: 1, only in B: 1"),
        (sweep_row(timer="events"), 2, "different timer"),
        (sweep_row(l2="warm"), 2, "different l2"),
        (sweep_row(device="b"), 2, "different devices: a, b"),
    ],
    ids=["same", "less than 5 %", "slower", "noise", "faster", "broken", "unmatched", "timer", "cache", "device"],
)
def test_compare(tmp_path, monkeypatch, after, code, words):
    a = write_sweep(tmp_path / "a.csv", sweep_row())
    b = write_sweep(tmp_path / "b.csv", after)
    monkeypatch.setattr(cli, "console", Console(width=200))
    found = CliRunner().invoke(cli.app, ["compare", str(a), str(b)])
    assert found.exit_code == code and words in found.output


def test_compare_gives_a_geometric_mean_for_each_op(tmp_path):
    a = write_sweep(tmp_path / "a.csv", *(sweep_row(n=n) for n in (1, 2)), sweep_row(op="sse"))
    b = write_sweep(tmp_path / "b.csv", sweep_row(n=1, ms_p50=0.5), sweep_row(n=2, ms_p50=2.0), sweep_row(op="sse", ms_p50=1.5))
    found = compare.compare(a, b)
    assert compare.geomean(found.rows[found.rows.op == "se"].ratio) == pytest.approx(1.0)
    assert len(found.regressions) == 2 and found.exit_code == 1


def test_the_table_of_features_goes_between_its_markers(tmp_path):
    from perf import features
    from perf.schema import FEATURES, frame

    found = dict.fromkeys(FEATURES, "yes") | {name: "2" for name in FEATURES if "_fwd" in name or "_bwd" in name}
    rows = [found | {"op": "se", "module": "SqueezeExcite"}, found | {"op": "sse", "fp16": "off by 1e-1", "compile_launches_bwd": ""}]
    lines = features.markdown(frame(rows, FEATURES)).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "✓" in lines[2] and "off by 1e-1" in lines[3] and "2 / ?" in lines[3]
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- features -->\nold\n<!-- /features -->\nafter\n")
    features.insert(readme, "features", "new")
    features.insert(readme, "features", "new")
    assert readme.read_text() == "before\n<!-- features -->\nnew\n<!-- /features -->\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no <!-- features -->"):
        features.insert(readme, "features", "new")


def test_every_block_is_in_the_table():
    from perf import features

    timms = {"ceca", "ecam", "ela", "gca", "lcbam", "scoord"}  # other defaults of blocks that are there
    assert set(features.names()) == set(tritattn.nn.available()) - timms
    assert features.checkpoints("se") and "timm" in features.checkpoints("cbam")


def test_the_example_learns(tmp_path):
    pytest.importorskip("sklearn")

    from rich.console import Console

    from perf import digits
    from perf.schema import DIGITS, read

    threads = torch.get_num_threads()
    path, console = tmp_path / "digits.csv", Console(file=io.StringIO(), width=150)
    try:
        digits.digits(path, console, epochs=2, seeds=1, blocks=("none", "se", "unknown"))
    finally:
        torch.set_num_threads(threads)
    table = read(path, DIGITS).set_index("block")
    assert (table.accuracy[["none", "se"]] > 0.8).all() and table.parameters["se"] > table.parameters["none"]
    assert table.status["unknown"].startswith("error: ValueError: name: got 'unknown'")
    assert "unknown" in console.file.getvalue() and path.with_suffix(".svg").read_text().startswith("<svg")


def test_steps_for_a_gpu_keep_to_their_budget(tmp_path, monkeypatch, capfd):
    from perf import gpu

    loops = "import sys, time\nprint('begun', sys.argv[1:], flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('wrote'); sys.exit(3)"
    steps = {
        "tests": gpu.Step("tests.xml", ("-c", loops, "{file}"), 2, 0),
        "sweep": gpu.Step("sweep.csv", ("-c", "import sys; print(sys.argv[1:])", "{file}", "{share}", "{out}")),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    assert gpu.gpu(tmp_path / "found", ("tests", "sweep"), 9, Console(width=200)) == 1
    said = capfd.readouterr().out
    assert f"begun ['{tmp_path}/found/tests.xml']" in said and "wrote" in said
    share = int(re.search(r"sweep\.csv', '(\d+)'", said)[1])
    assert 1 <= share <= 3  # what the first step left
    rows = [line.split() for line in said.splitlines()]
    assert ["tests", "3", str(tmp_path / "found" / "tests.xml")] in rows and ["sweep", "0", str(tmp_path / "found" / "sweep.csv")] in rows
    assert gpu.gpu(tmp_path / "found", ("sweep",), 9, Console(width=200)) == 0


def test_the_real_steps_are_commands_of_this_harness():
    from typer.main import get_command

    from perf import gpu
    from perf.cli import app

    commands = get_command(app).commands
    for name, step in gpu.STEPS.items():
        if name != "tests":
            known = {option for parameter in commands[name].params for option in parameter.opts}
            assert step.command[:3] == ("-m", "perf", name) and {part for part in step.command if part.startswith("--")} <= known


def test_targets_stand_beside_what_is_predicted_and_measured():
    from perf import targets

    site, rows, timed = targets.LARGE[0], [], []
    place = {"op": "se+residual+relu", "layout": "contiguous", "dtype": "bf16", "c": str(site.c), "h": str(site.h), "w": str(site.w), "status": "ok"}
    for mode, u in (("fwd", {"eager": 8, "compile": 6, "tritattn": 4}), ("bwd", {"eager": 13, "compile": 8, "tritattn": 6})):
        for provider, total in u.items():
            ours = {"dram_u": str(total - 1), "floor_u": "3"} if provider == "tritattn" else {"floor_u": "3"}
            rows.append({**HERE, **place, "mode": mode, "provider": provider, "n": "2", "total_u": str(total), "launches": "1", **ours})
    for provider, ms in (("eager", "3"), ("tritattn", "1")):
        for timer in ("graph", "cpu"):
            spread = {"ms_p20": ms, "ms_p80": ms, "pct_copy": "90", "timer": timer, "params": timer}
            timed.append({**HERE, **place, "mode": "fwd", "provider": provider, "n": "256", "ms_p50": ms if timer == "graph" else "7", **spread})
    calls = [
        {**HERE, **place, "mode": mode, "provider": provider, "n": "1", "us": us, "params": "{}"}
        for mode, provider, us in (("inference", "eager", "60"), ("inference", "tritattn", "20"), ("fwd_bwd", "tritattn", "90"))
    ]
    code = [f"code {i}" for i in range(len(targets.TARGETS))]
    tables = schema.frame(rows, schema.TRAFFIC), schema.frame(timed, schema.SWEEP), None, code, schema.frame(calls, schema.HOST)
    found = targets.lines(*tables)
    forward, both = (next(cells for cells in found if cells[0] == f"SE + residual + ReLU {what}") for what in ("forward", "forward + backward"))
    assert forward[1:4] == ["≥ 2.4", "2.67", "3.00 (lowest 3.00)"] and forward[4:7] == ["≥ 1.3", "2.00", "-"]
    assert forward[7:] == ["≥ 85 %", "100", "90 (lowest 90)", "1, 1, 1", "code 3"]
    assert both[1:4] == ["≥ 2.3", "2.62", "-"] and both[10] == "2, 2, 2"
    assert found[-2][9] == "1 of 1 rows"
    small, training = found[-4:-2]
    assert small[1:7] == ["≥ 2", "", "3.00 (lowest 3.00)", "≥ 1", "", "-"] and training[3] == "-"
    assert {len(cells) for cells in found} == {len(targets.TITLES)}


def test_host_without_a_gpu_times_ours_on_a_stand_in(tmp_path):
    from perf import host

    console, path = Console(file=io.StringIO(), width=150), tmp_path / "host.csv"
    cases = [make_case("se", "fp32", "contiguous", 1, SMALL)]
    host.host(path, "cpu", console, cases=cases, samples=2)
    table = schema.read(path, schema.HOST)
    assert list(table["mode"]) == list(host.MODES) and (table.provider == "tritattn").all() and (table.status == "ok").all(), table.status.tolist()
    assert (table.timer == "stand-in").all() and table.us.isna().all()
    assert (table.host_us > 0).all() and (table.host_us_p20 <= table.host_us_p80).all()
    assert "host_us" in console.file.getvalue() and "2 ok" in console.file.getvalue()


def test_host_reports_what_fails(tmp_path, monkeypatch):
    from perf import host

    def build(*args):
        raise ValueError("no such thing")

    monkeypatch.setattr(host, "build", build)
    host.host(tmp_path / "host.csv", "cpu", quiet(), cases=[make_case("se", "fp32", "contiguous", 1, SMALL)], samples=2)
    assert set(schema.read(tmp_path / "host.csv", schema.HOST).status) == {"error: ValueError: no such thing"}
