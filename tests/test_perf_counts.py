"""The harness, what needs no clock: traffic, generated code, the report and the command line."""

import csv
import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from perf import choices, cli, codegen, report, schema, summary, traffic
from perf.cases import Inputs, make_case
from perf.counting import Counter, MapOrder, count_launches, distinct_numel, map_order
from perf.peers import peer
from perf.providers import build
from perf.shapes import STAGES, Site
from tritattn import tuning

ROOT = Path(__file__).resolve().parents[1]
HERE = {"device": "a", "os": "", "python": "", "torch": "1", "triton": "1", "cuda": "", "driver": "", "tritattn": "0", "commit": "c"}


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"), width=150)  # noqa: SIM115


# -- traffic ----------------------------------------------------------------------------------------------------------------------------------


def test_operators_count_what_they_read_and_write():
    x, w = torch.zeros(2, 8, 5, 5), torch.zeros(2, 8, 1, 1)
    with Counter(MapOrder(x.numel())) as counter:
        y = x * w.expand_as(x)
        y.view(2, 8, 25)[0]  # views move nothing
        y.add_(x)
        torch.empty_like(x).copy_(y)
        x.mean((2, 3))
    moved = counter.moved
    assert moved.names == ["mul", "add_", "copy_", "mean"] and moved.launches == 4
    assert moved.in_u(4 * x.numel()) == {"read_u": 5.0, "write_u": 3.0, "total_u": 8.0, "other_u": 32 / 400}
    assert distinct_numel(w.expand_as(x)) == 16 and distinct_numel(x[:, :1].expand_as(x)) == 50


def test_parameters_and_statistics_are_not_of_map_order():
    of_map = map_order(make_case("se", "bf16", "contiguous", 2, STAGES[3]))
    n, c, hw, rd = 2, 2048, 49, 128
    assert of_map(n * c * hw) and of_map(n * c * hw // 8)
    assert not of_map(rd * c) and not of_map(2 * n * c) and not of_map(n * rd)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("se", 3, 10), ("se+residual+relu", 8, 13), ("sse", 3, 11), ("scse", 9, 24), ("cbam", 8, 31)],
)
def test_eager_traffic(name, forward, backward):
    """Of the plain torch code, by hand: a mean reads, a product reads and writes, and so on."""
    case = make_case(name, "bf16", "contiguous", 2, STAGES[1])
    found = {mode: moved.in_u(2 * math.prod(case.shape)) for mode, moved in traffic.eager(case).items()}
    assert found["fwd"]["total_u"] == forward and found["bwd"]["total_u"] == backward
    assert found["fwd"]["other_u"] < 0.3


def test_tiles_of_another_batch():
    device = torch.device("cpu")
    asked = ("channel", 2, 256, 3136, 2, False, device)
    large = tuning.choose("channel", 256, *asked[2:])
    assert tuning.choose(*asked) != large
    with choices.for_batch(256), choices.recorded() as found:
        assert tuning.choose(*asked) == large
    assert choices.describe(found) == (f"channel={large.key}", large.source)


def ask_one(module: str, question: dict, **variables: str) -> dict:
    return next(traffic.ask(module, [question], **variables))


def in_u(case, answer: dict) -> dict[str, float]:
    return {row["mode"]: row["total_u"] for row in traffic.rows(case, "tritattn", answer)}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_kernels_are_counted_in_the_interpreter(layout):
    case = make_case("sse+residual+relu", "fp32", layout, 2, Site(1, 32, 8, 8, 4))
    answer = ask_one("perf.interpret", {"case": dataclasses.asdict(case), "batch": 256}, TRITON_INTERPRET="1")
    rows = {row["mode"]: row for row in traffic.rows(case, "tritattn", answer)}
    assert rows["fwd"]["read_u"] == 2 and rows["fwd"]["write_u"] == 1 and rows["fwd"]["launches"] == 1
    assert rows["fwd"]["dram_u"] == pytest.approx(3, abs=0.02)
    assert rows["bwd"]["total_u"] == 5
    assert rows["fwd"]["bar_u"] == 3 and rows["bwd"]["bar_u"] == 5 and rows["fwd"]["status"] == "ok"
    # a pixel's logit is a number for each of 64 pixels of two images, the weights are 32 numbers for each program
    assert 0 < rows["fwd"]["other_u"] < 0.5


def test_generated_code_is_counted_without_a_gpu():
    case = make_case("se+residual+relu", "bf16", "contiguous", 256, STAGES[2])
    answer = ask_one("perf.inductor", {"case": dataclasses.asdict(case)}, TRITON_INTERPRET="0")
    if "unavailable" in answer:
        pytest.skip(f"this torch's internals differ: {answer['unavailable']}")
    # forward: x for the mean; x, residual, y and the ReLU's mask of one byte an element. Backward: g, mask, x, dresidual; dresidual, dx
    assert in_u(case, answer) == {"fwd": 4.5, "bwd": 5.5}
    assert "convolution" in answer["fwd"]["names"] and answer["fwd"]["launches"] >= 5


def test_a_dead_worker_leaves_rows_that_say_so():
    case = make_case("se", "bf16", "contiguous", 2, STAGES[3])
    answers = list(traffic.ask("perf.no_such_worker", [{}, {}]))
    assert len(answers) == 2 and all("status 1: " in a["unavailable"] and "No module named" in a["unavailable"] for a in answers)
    rows = traffic.rows(case, "compile", answers[0])
    assert [r["mode"] for r in rows] == ["fwd", "bwd"] and rows[0]["status"].startswith("unavailable: perf.no_such_worker")
    assert "total_u" not in rows[0]


def test_traffic_rows_and_resume(tmp_path, monkeypatch):
    asked = []

    def ask(module, questions, **variables):
        for question in questions:
            asked.append((module, question["case"]["n"]))
            yield {mode: {"launches": 1, "map_read": 2.0, "map_write": 1.0, "other": 0.5, "names": []} for mode in ("fwd", "bwd")}

    monkeypatch.setattr(traffic, "ask", ask)
    options = {"op_names": ("se", "sse"), "sites": (Site(1, 16, 8, 8, 4),), "layouts": ("contiguous",)}
    traffic.traffic(tmp_path / "t.csv", quiet(), **options)
    table = schema.read(tmp_path / "t.csv", schema.TRAFFIC)
    assert sorted(asked) == [("perf.inductor", 256)] * 2 + [("perf.interpret", 2)] * 2
    assert table.groupby("provider").n.unique().map(list).to_dict() == {"compile": [256], "eager": [2], "tritattn": [2]}
    assert len(table) == 12 and set(table.status) == {"ok"} and table.total_u.notna().all()
    assert table[table.provider == "eager"].dram_u.notna().all()
    asked.clear()
    traffic.traffic(tmp_path / "t.csv", quiet(), **options)
    assert not asked
    traffic.traffic(tmp_path / "u.csv", quiet(), budget=0.0, **options)
    assert not asked and set(schema.read(tmp_path / "u.csv", schema.TRAFFIC).provider) == {"eager"}


def test_launches_on_a_cpu_are_operators():
    case = make_case("sse", "fp32", "contiguous", 1, Site(1, 8, 4, 4, 2))
    inputs = Inputs(case, "cpu")
    call = build("eager", case, inputs.weights, "cpu")
    run = lambda i: call.run(inputs.x[i], None)  # noqa: E731
    assert count_launches(run, "cpu", "eager") == 3  # convolution, sigmoid, product
    assert count_launches(run, "cpu", "compile") is None


# -- generated code -----------------------------------------------------------------------------------------------------------------------------

NVIDIA = """
define ptx_kernel void @k(ptr addrspace(1) %0, ptr addrspace(1) %1, i32 %2) {
  %4 = getelementptr bfloat, ptr addrspace(1) %0, i64 %3, !dbg !1
  %5 = tail call { i32, i32, i32, i32 } asm sideeffect "@$9 ld.global.v4.b32 { $0, $1, $2, $3 }, [ $8 + 0 ];", "=r,l"(i32 0, ptr addrspace(1) %4)
  %6 = getelementptr float, ptr addrspace(1) %1, i64 %3
  %7 = tail call i32 asm sideeffect "@$3 ld.global.L1::evict_last.b16 { $0 }, [ $2 + 0 ];", "=r,l,b"(i32 0, ptr addrspace(1) %6, i1 %9)
  %8 = phi ptr addrspace(1) [ %4, %5 ], [ %8, %7 ]
  tail call void asm sideeffect "@$5 st.global.v2.b64 [ $4 + 0 ], { $0, $1 };", "r,l,b"(i64 %2, ptr addrspace(1) %8, i1 %9)
}
"""
AMD = """
define amdgpu_kernel void @k(ptr addrspace(1) inreg readonly captures(none) %0, ptr addrspace(1) inreg %1) {
  %3 = tail call ptr addrspace(8) @llvm.amdgcn.make.buffer.rsrc.p8.p1(ptr addrspace(1) %0, i16 0, i64 9, i32 1)
  %4 = tail call <2 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v2i32(ptr addrspace(8) %3, i32 %9, i32 0, i32 0)
  %5 = getelementptr inbounds half, ptr addrspace(1) %1, i64 %9
  %6 = load <8 x half>, ptr addrspace(1) %5, align 16
  store i16 %8, ptr addrspace(1) %5, align 2
}
declare <4 x i32> @llvm.amdgcn.raw.ptr.buffer.load.v4i32(ptr addrspace(8) readonly, i32, i32, i32 immarg)
"""


def test_widths_follow_addresses_to_their_argument():
    assert codegen.widths(NVIDIA, ["x_ptr", "z_ptr", "C"], frozenset(["x_ptr"])) == {"map_load_bits": 128, "map_store_bits": 128}
    assert codegen.widths(NVIDIA, ["x_ptr", "z_ptr", "C"], frozenset(["x_ptr", "z_ptr"]))["map_load_bits"] == 16
    assert codegen.widths(AMD, ["x_ptr", "y_ptr"], frozenset(["x_ptr"])) == {"map_load_bits": 64, "map_store_bits": None}
    assert codegen.widths(AMD, ["x_ptr", "y_ptr"], frozenset(["y_ptr"])) == {"map_load_bits": 128, "map_store_bits": 16}


def test_launches_are_recorded_without_a_device():
    case = make_case("cbam+residual+relu", "bf16", "channels_last", 256, STAGES[1])
    found = codegen.launches(case)
    by_name = {launch.name: launch for launch in found}
    gate = by_name["gate_fwd_kernel"]
    assert gate.maps == {"x_ptr", "residual_ptr", "y_ptr"} and gate.layout == "channels_last" and "ACTIVATION=relu" in gate.config
    assert len(found) >= 4
    again = {launch.config for launch in codegen.launches(case)}
    assert {launch.config for launch in found} == again  # a configuration's name is the same in every run
    squeeze = codegen.launches(make_case("cbam", "bf16", "channels_last", 1, STAGES[2]))[0]
    assert squeeze.bound["part_ptr"].numel() * 8 > squeeze.bound["x_ptr"].numel() and squeeze.maps == {"x_ptr"}


@pytest.mark.parametrize(("hw", "bits"), [(28, 128), (7, 16)], ids=["aligned", "odd"])
def test_a_kernel_compiles_offline(hw, bits):
    case = make_case("cbam", "bf16", "contiguous", 256, Site(1, 64, hw, hw, 4))
    gate = next(launch for launch in codegen.launches(case) if launch.name == "gate_fwd_kernel")
    rows = {target: codegen.row(gate, target) for target in ("sm_90", "gfx942")}
    for row in rows.values():
        assert row["status"] == "ok" and row["spill_bytes"] == 0 and 8 < row["registers"] <= 255
        assert row["map_load_bits"] == row["map_store_bits"] == bits


def test_what_cannot_compile_is_a_row():
    gate = codegen.launches(make_case("se", "bf16", "contiguous", 256, STAGES[1]))[-1]
    broken = dataclasses.replace(gate, kwargs={**gate.kwargs, "BLOCK_P": 96})  # not a power of two
    row = codegen.row(broken, "sm_90")
    assert row["status"].startswith("error: ") and row["kernel"] == gate.name and "registers" not in row


def test_quick_codegen_reaches_every_shipped_kernel():
    found = codegen.collect(quick=True, dtypes=("bf16",))
    assert {launch.name for launch in found} == codegen.shipped()
    assert len({(launch.name, launch.layout) for launch in found}) == len(found) and {launch.dtype for launch in found} == {"bf16"}


# -- report and command line --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    """Small files of every kind, with a failure in each."""
    sweep_row = {"mode": "fwd_bwd", "dtype": "bf16", "layout": "contiguous", "n": 2, "params": "{}"}
    timed = {"status": "ok", "timer": "graph", "l2": "cold", "ms_p20": 1, "ms_p80": 1}
    traffic_row = {"mode": "fwd", "layout": "contiguous", "dtype": "bf16", "n": 2, "c": 8, "h": 4, "w": 4, "bar_u": 3, "floor_u": 2}
    code_row = {"kernel": "gate_fwd_kernel", "config": "A=1", "layout": "contiguous", "dtype": "bf16", "registers": 40, "spill_bytes": 0}
    paths = {kind: tmp_path / f"{kind}.csv" for kind in report.KINDS}
    with schema.Writer(paths["sweep"], schema.SWEEP, HERE) as writer:
        for c in (64, 256):
            shape = {"op": "se", "c": c, "h": 7, "w": 7}
            for provider, ms in (("tritattn", 1.0), ("eager", 4.0), ("compile", 2.0)):
                writer.write({**sweep_row, **shape, **timed, "provider": provider, "ms_p50": ms, "pct_copy": 80 / ms})
        writer.write({**sweep_row, "op": "cbam", "c": 8, "h": 7, "w": 7, "provider": "tritattn", "status": "wrong"})
    with schema.Writer(paths["models"], schema.MODELS, HERE) as writer:
        network = {"network": "timm/x", "execution": "eager", "mode": "training", "dtype": "bf16", "layout": "contiguous", "n": 2, "size": 64}
        for provider, columns in (("plain", {"images_s": 700}), ("torch", {"cost_pct": 12.5, "cost_us": 3}), ("tritattn", {"status": "oom"})):
            writer.write({**network, "provider": provider, "status": "ok", **columns})
    with schema.Writer(paths["traffic"], schema.TRAFFIC, HERE) as writer:
        writer.write({**traffic_row, "op": "se", "provider": "tritattn", "total_u": 3, "dram_u": 2.25, "launches": 2, "status": "ok"})
        writer.write({**traffic_row, "op": "se", "provider": "compile", "status": "unavailable: <another torch>"})
    with schema.Writer(paths["codegen"], schema.CODEGEN, HERE) as writer:
        writer.write({**code_row, "target": "sm_90", "map_load_bits": 128, "status": "ok"})
        writer.write({**code_row, "target": "sm_80", "status": "error: no"})
    with schema.Writer(paths["digits"], schema.DIGITS, HERE) as writer:
        writer.write({"block": "se", "seed": 0, "epochs": 2, "accuracy": 0.9, "parameters": 10, "seconds": 1, "status": "ok"})
        writer.write({"block": "cbam", "seed": 0, "epochs": 2, "status": "error: untrained"})
    return paths


def test_the_report_is_one_page_that_needs_nothing_else(results, tmp_path):
    page = report.report(tmp_path / "r.html", results).read_text()
    link = '<a href="digits.csv">'  # to the rows beside it, which it shows without them
    assert page.count("<svg") >= 4 and link in page and "error: untrained" in page
    page = page.replace(link, "")
    assert "gate_fwd_kernel" in page and "wrong" in page and "unavailable: &lt;another torch&gt;" in page
    assert "over compile" in page and ">2<" in page  # the speed-up
    assert ">12.5<" in page and ">2.25<" in page  # a network's attention, and predicted traffic
    assert "device" in page and ">a<" in page
    assert not re.search(r"<(script|link|iframe|img|object|image)\b", page)
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(?!#)[\w/.]""", page), "refers to something outside"
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_report_of_one_file(results, tmp_path):
    page = report.report(tmp_path / "r.html", {"traffic": results["traffic"]}).read_text()
    assert page.count("<svg") == 1 and "Generated code" not in page


SHOWN = (("sweep", summary.print_summary), ("models", summary.print_models), ("traffic", summary.print_traffic), ("codegen", summary.print_codegen))


def test_summaries_name_what_failed(results):
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for kind, show in SHOWN:
        with results[kind].open(newline="") as file:
            show(list(csv.DictReader(file)), console)
    text = console.export_text()
    assert re.search(r"se +fwd_bwd +4\.00 +2\.00 +80", text) and "rows: 6 ok, 1 wrong" in text and "cbam tritattn fwd_bwd bf16" in text
    assert re.search(r"timm/x .* eager +700 +\+12\.5, 3 +-, -", text) and "timm/x tritattn eager training bf16 contiguous 2: oom" in text
    assert re.search(r"se +contiguous +2/- +3/- +3/-, +2/- .*2.25/-", text) and "1 rows of compile: unavailable" in text
    assert re.search(r"gate_fwd_kernel +bf16 +1 +40 +0", text) and "1 rows (gate_fwd_kernel): error: no" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "--csv", "x", "--ops", "se,nothing"], "no op 'nothing'"),
        (["sweep", "--csv", "x", "--dtypes", "bf17"], "'bf17' is not one of bf16, fp32, fp16, fp64"),
        (["sweep", "--csv", "x", "--sets", "vgg"], "'vgg' is not one of"),
        (["sweep", "--csv", "x", "--device", "tpu"], "device is cuda or cpu"),
        (["sweep", "--csv", "x", "--batches", "2,x"], "'2,x' is not a comma list of batch sizes"),
        (["models", "--csv", "x", "--batches", "0"], "'0' is not a comma list of batch sizes"),
        (["models", "--csv", "x", "--networks", "timm/seresnet50,resnet"], "no network 'resnet'"),
        (["report", "--out", "x"], "at least one of"),
    ],
)
def test_bad_arguments(arguments, words, monkeypatch):
    found = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    assert found.exit_code == 2 and words in re.sub(r"[│\s]+", " ", found.output)


def test_it_says_that_it_needs_a_checkout(tmp_path):
    shutil.copytree(ROOT / "perf", tmp_path / "perf", ignore=shutil.ignore_patterns("results", "__pycache__"))
    done = subprocess.run([sys.executable, "-m", "perf", "sweep"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a checkout" in done.stderr


def test_importing_peers_leaves_torch_as_it_was():
    register = torch.library.register_fake
    assert peer("no_such_package") is None
    peer("torchvision")
    assert torch.library.register_fake is register
