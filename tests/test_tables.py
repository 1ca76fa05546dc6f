"""Tables of tuned tiles: what they are named, when they count, what is refused, and what tuning writes into one."""

import json
import multiprocessing
import os
import socket
import time
import types
import warnings

import pandas as pd
import pytest
import torch
from rich.console import Console

from tritattn import _linear, _tables, tuning

KEY = "tile 2 channels_last c256 hw3136 maps1 row0"
TILES = {"block_c": 64, "block_p": 64, "num_warps": 4}
GPU = torch.device("cuda", 0)
QUESTION = ("tile", 256, 256, 3136, 2, True, GPU)
PRODUCT_KEY = "linear 4 bfloat16 j128 k2048"
PRODUCT_TILE = {"block_m": 16, "block_j": 32, "block_k": 64, "splits": 4, "num_warps": 2, "units": 1}
PRODUCT = (256, 128, 2048, 4, 132, GPU, "linear", torch.bfloat16)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A GPU that is none, the user's folder of tables, and beside it the package's."""
    properties = types.SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_tables, "triton_version", lambda: "3.6")
    monkeypatch.setattr(_tables, "BUNDLED", tmp_path / "bundled")
    monkeypatch.setenv(_tables.VARIABLE, str(tmp_path))
    for cache in (_tables.tables, tuning.choose, tuning.processors):
        cache.cache_clear()
    yield tmp_path
    for cache in (_tables.tables, tuning.choose, tuning.processors):
        cache.cache_clear()


def write(folder, tiles, /, **header):
    folder.mkdir(exist_ok=True)
    found = {"schema": _tables.SCHEMA, "processors": 132, "triton": "3.6", "tiles": tiles, **header}
    (folder / "h200.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_names_of_devices(name, expected):
    assert _tables.slug(name) == expected


def test_the_order_of_sources(folder):
    rule = tuning.choose(*QUESTION)
    assert rule.source == "rule"
    write(folder / "bundled", {KEY: {"256": TILES}})
    assert tuning.choose(*QUESTION) == rule  # a process reads the tables once, and its answers stay
    _tables.tables.cache_clear()
    tuning.choose.cache_clear()
    bundled = tuning.choose(*QUESTION)
    assert (bundled.block_c, bundled.block_p, bundled.num_warps, bundled.splits, bundled.source) == (64, 64, 4, rule.splits, "tuned")
    write(folder, {KEY: {"256": TILES | {"block_p": 32}}})
    _tables.tables.cache_clear()
    tuning.choose.cache_clear()
    assert tuning.choose(*QUESTION).block_p == 32
    with tuning.forced(block_p=16):
        assert tuning.choose(*QUESTION).source == "forced" and tuning.choose(*QUESTION).block_c == rule.block_c
    assert tuning.choose("tile", 256, 512, 3136, 2, True, GPU).source == "rule"
    assert tuning.choose("tile", 256, 256, 3136, 2, True, torch.device("cpu")).source == "rule"


def test_the_order_of_sources_of_a_products_tile(folder):
    rule = _linear.choose(*PRODUCT)
    assert rule.source == "rule"
    write(folder / "bundled", {PRODUCT_KEY: {"256": PRODUCT_TILE}, "weights 4 float32 m128 j2048": {"256": PRODUCT_TILE}})
    _tables.tables.cache_clear()
    bundled = _linear.Tile(16, 32, 64, 4, True, 2, "tuned")
    assert _linear.choose(*PRODUCT) == bundled and bundled.units is True and _linear.choose(*PRODUCT).args["num_warps"] == 2
    assert _linear.choose(128, 2048, 512, 4, 132, GPU, "weights") == bundled
    write(folder, {PRODUCT_KEY: {"512": PRODUCT_TILE | {"block_m": 32}}})
    _tables.tables.cache_clear()
    # a batch within a factor of two, of this product alone: of those sizes, types and kind, on that device, and not a part of another launch
    assert [_linear.choose(m, *PRODUCT[1:]).block_m for m in (256, 1024)] == [32, 32] and _linear.choose(128, *PRODUCT[1:]) == bundled
    for i, other in {0: 1025, 1: 256, 2: 1024, 3: 8, 5: torch.device("cpu"), 6: "weights", 7: torch.float32}.items():
        assert _linear.choose(*PRODUCT[:i], other, *PRODUCT[i + 1 :]).source == "rule"
    assert _linear.choose(*PRODUCT[:5]).source == "rule"
    forced = _linear.Tile(16, 16, 16)
    with tuning.forced(tile=forced):
        assert _linear.choose(*PRODUCT) is forced and _linear.choose(*PRODUCT[:5]) is forced and tuning.is_forced()
    assert _linear.choose(*PRODUCT).block_m == 32 and not tuning.is_forced()


def test_groups_of_waiting_programs_are_the_rules(folder):
    question = ("pixel", 256, 1024, 196, 2, False)
    write(folder, {_tables.key(question[0], *question[2:]): {"256": TILES}})
    assert tuning.choose(*question, GPU).group and tuning.choose(*question, GPU).source == "rule"


@pytest.mark.parametrize("n, expected", [(256, 256), (512, 256), (513, None), (128, 128), (181, 128), (182, 256), (64, 128), (63, None), (0, None)])
def test_the_nearest_batch_within_a_factor_of_two(n, expected):
    batches = {128: {"splits": 128}, 256: {"splits": 256}}
    assert (_tables.nearest(batches, n) or {}).get("splits") == expected


@pytest.mark.parametrize(
    "header, words",
    [
        ({"schema": 1}, f"schema 1, not {_tables.SCHEMA}"),
        ({"triton": "3.5"}, "triton 3.5, not 3.6"),
        ({"processors": 114}, "processors 114, not 132"),
        ({"tiles": []}, "cannot be read"),
    ],
)
def test_a_table_of_something_else_does_not_count(folder, header, words):
    write(folder, {KEY: {"256": TILES}}, **header)
    with pytest.warns(RuntimeWarning, match=f"h200.json: .*{words}"):
        assert tuning.choose(*QUESTION).source == "rule"
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert tuning.choose(*QUESTION[:3], 784, *QUESTION[4:]).source == "rule"


def test_where_tiles_come_from(folder):
    write(folder, {KEY: {"256": TILES, "32": TILES}})
    write(folder / "bundled", {KEY: {"256": TILES}}, triton="3.5")
    found = _tables.describe(GPU)
    assert found == f"2 entries of {folder}/h200.json, then 0 entries of {folder}/bundled/h200.json (is for triton 3.5, not 3.6), then the rule"
    assert _tables.describe(torch.device("cpu")) == "the rule"


@pytest.mark.parametrize(
    "key, n, tiles",
    [
        ("tile", "256", TILES),
        (KEY, "many", TILES),
        (KEY, "256", [64]),
        (KEY, "256", TILES | {"group": 1}),
        (KEY, "256", TILES | {"block_c": 48}),
        (KEY, "256", TILES | {"block_c": "64"}),
        (KEY, "256", TILES | {"block_c": 2048}),
        (KEY, "256", TILES | {"num_warps": 64}),
        (KEY, "256", TILES | {"splits": 0}),
        (KEY, "256", TILES | {"lag": -1}),
        (KEY, "256", TILES | {"maxnreg": 300}),
        (PRODUCT_KEY.replace("j128", "m128"), "256", PRODUCT_TILE),
        (PRODUCT_KEY.replace("bfloat16", "int8"), "256", PRODUCT_TILE),
        (PRODUCT_KEY, "256", TILES),
        (PRODUCT_KEY, "256", {name: value for name, value in PRODUCT_TILE.items() if name != "units"}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"block_j": 24}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"block_k": 1024}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"num_warps": 64}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"splits": 0}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"units": 2}),
        (PRODUCT_KEY, "256", PRODUCT_TILE | {"block_m": 8}),
        (PRODUCT_KEY.replace("4 bfloat16", "8 float64"), "256", PRODUCT_TILE),
    ],
)
def test_an_entry_that_cannot_be_used_is_left_out(folder, key, n, tiles):
    good = KEY.replace("3136", "784")
    write(folder, {good: {"256": TILES}, key: {n: tiles}})
    with pytest.warns(RuntimeWarning, match="tiles come from elsewhere"):
        assert tuning.choose(*QUESTION).source == "rule"
    assert tuning.choose(*QUESTION[:3], 784, *QUESTION[4:]).source == "tuned"
    assert _linear.choose(*PRODUCT).source == "rule"


def test_bundled_tables():
    for path in _tables.BUNDLED.glob("*.json"):
        header = json.loads(path.read_text())
        assert path.stem == _tables.slug(header["device"]) and header["schema"] == _tables.SCHEMA
        entries = [(key, n, tiles) for key, batches in header["tiles"].items() for n, tiles in batches.items()]
        assert entries and all(_tables.problem(*entry) is None for entry in entries)


# -- what tuning writes -------------------------------------------------------------------------------------------------------------------------


def rows(ratio, *, config, op="se", noise=0.01, key=KEY, status="ok", n=256, c=256, dtype="bf16", layout="channels_last", batch=None):
    measured = {"key": key, "batch": batch or n, "config": config, "status": status, "ratio": ratio, "noise": noise}
    return {"op": op, "mode": "fwd", "dtype": dtype, "layout": layout, "n": n, "c": c, "h": 56, "w": 56, "params": "{}", **measured}


RULE = rows(1.0, config="c128p32s1w8")


@pytest.mark.parametrize(
    "found, expected",
    [
        ([rows(0.9, config="c64p64s1w8"), rows(0.8, config="c32p64s1w4l2r96")], "c32p64s1w4l2r96"),
        ([rows(0.98, config="c64p64s1w8")], None),  # not worth it
        ([rows(0.9, config="c64p64s1w8", noise=0.2)], None),  # noise
        ([rows(0.5, config="c64p64s1w8", status="wrong")], None),
        ([rows(0.5, config="c64p64s1w8"), rows(1.3, config="c64p64s1w8", op="cbam"), rows(1.0, config="c128p32s1w8", op="cbam")], None),
        ([rows(0.9, config="c64p64s1w8"), rows(1.005, config="c64p64s1w8", op="cbam"), rows(1.0, config="c128p32s1w8", op="cbam")], "c64p64s1w8"),
        ([rows(0.9, config="c64p64s1w8"), rows(1.0, config="c128p32s1w8", op="cbam")], None),  # not tried in both
        # one pass at several sites of an op, and in several dtypes of one size
        ([rows(0.9, config="c64p64s1w8"), rows(0.8, config="c64p64s1w8", c=512), rows(1.0, config="c128p32s1w8", c=512)], "c64p64s1w8"),
        ([rows(0.9, config="c64p64s1w8"), rows(0.8, config="c64p64s1w8", dtype="fp16")], "c64p64s1w8"),
        # one product in both layouts, and of two batches whose rows are as many
        ([rows(0.9, config="m16j16k32s2w1u"), rows(0.8, config="m16j16k32s2w1u", layout="contiguous")], "m16j16k32s2w1u"),
        ([rows(0.9, config="m16j16k32s2w4"), rows(1.1, config="m16j16k32s2w4", n=128, batch=256)], None),
    ],
)
def test_winners(found, expected):
    pytest.importorskip("triton")
    from perf import tune

    entries = tune.winners(pd.DataFrame([RULE, *found, rows(0.1, config="finished", key="")]))
    assert entries == ({KEY: {"256": tune.fields_of(expected)}} if expected else {})


def test_a_table_is_brought_up_to_date(folder):
    from perf import tune

    other = KEY.replace("tile", "channel")
    write(folder, {KEY: {"256": TILES, "32": TILES}, other: {"256": TILES}})
    path = folder / "h200.json"
    assert tune.write_table(path, pd.DataFrame([RULE, rows(1.0, config="c64p64s1w8")]), "NVIDIA H200", 132) == 2
    found = json.loads(path.read_text())
    assert found["tiles"] == {other: {"256": TILES}, KEY: {"32": TILES}} and found["device"] == "NVIDIA H200" and found["triton"] == "3.6"
    table = pd.DataFrame([RULE, rows(0.8, config="c64p64s1w8"), {**RULE, "n": 1, "batch": 1}, rows(0.7, config="c2p2s1w1", n=1)])
    assert tune.write_table(path, table, "NVIDIA H200", 132) == 4
    assert list(_tables.read(path, 132)[0][KEY]) == [1, 32, 256] and _tables.read(path, 132)[1] == []
    assert not list(folder.glob("*.tmp"))


def test_candidates_are_around_the_rule():
    pytest.importorskip("triton")
    from perf import tune
    from perf.choices import Question

    question = Question("ticket", 256, 256, 3136, 2, False)
    assert question.entry == ("ticket 2 contiguous c256 hw3136 maps1 row0", 256)
    rule = tuning.choose(*question[:6], torch.device("cpu"))
    found = tune.candidates(rule, question)
    assert found[0] is rule and len({config.key for config in found}) == len(found) > 10
    assert {0, rule.lag // 2, rule.lag, 2 * rule.lag} == {config.lag for config in found} and 0 in {config.maxnreg for config in found}
    for config in found:
        assert config.block_c <= 256 and tune.fields_of(config.key).items() <= vars(config).items()
        assert _tables.problem(question.entry[0], "256", tune.fields_of(config.key)) is None
    single = Question("tile", 256, 256, 1, 2, False)  # position, which has no half
    assert all(config.block_p == 1 for config in tune.candidates(tuning.choose(*single[:6], torch.device("cpu")), single))
    pixels = Question("pixel", 256, 1024, 196, 2, False)
    assert len(tune.candidates(tuning.choose(*pixels[:6], torch.device("meta")), pixels)) == 1


def test_candidates_of_a_pass_that_the_rule_does_not_ticket():
    pytest.importorskip("triton")
    from perf import tune
    from perf.choices import Question

    question = Question("ticket", 256, 1024, 196, 2, True)
    rule = tuning.choose(*question[:6], torch.device("cpu"))
    found = tune.candidates(rule, question)
    assert rule.lag == 0 and {config.lag for config in found} == {0, 9, 18, 36}  # 32 programs squeeze an image, 528 run at once
    assert any(config.lag and config.block_c > rule.block_c for config in found)



@pytest.mark.parametrize("sizes", [(256, 128, 2048), (2048, 2048, 64), (1, 128, 2048), (20, 16, 64)], ids=str)
@pytest.mark.parametrize(("role", "right"), [("linear", torch.bfloat16), ("both_weights", torch.float32), ("weights", torch.float64)])
def test_candidates_of_a_product(sizes, role, right):
    pytest.importorskip("triton")
    from perf import tune
    from perf.choices import Product

    itemsize = max(4, right.itemsize)
    question = Product(*sizes, itemsize, 132, role, right)
    rule = _linear.choose(*question[:5], torch.device("cpu"), *question[5:])
    found = tune.candidates(rule, question)
    key, batch = question.entry
    assert found[0] is rule and len({tile.key for tile in found}) == len(found) > 2
    assert {tile.units for tile in found} == ({True, False} if itemsize == 4 and min(sizes) >= 16 else {False})
    for tile in found:
        assert tune.fields_of(tile.key).items() <= vars(tile).items() and _tables.problem(key, str(batch), tune.fields_of(tile.key)) is None
    assert any(tile.num_warps < 4 for tile in found) == (True in {tile.units for tile in found})


def measured_by(rank, world, port, folder, cases, stops_at):
    """One process of torchrun's, for whom measuring a case is to note the rank."""
    from perf import tune

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

    def measure(case, device, samples, sample_ms, missing):
        if case.n == stops_at:
            raise KeyboardInterrupt
        for config, ratio in (("c64p64s1w8", 1.0), ("c32p64s1w8", 0.5)):
            yield {**case.row(), "mode": "fwd", "key": KEY, "batch": case.n, "config": config, "status": "ok", "ratio": ratio, "noise": 0.0}
        yield {**missing[0], "status": f"measured by {rank}"}

    tune._measure = measure
    tune.tune(cases, folder / "t.csv", "cpu", Console(quiet=True), out=folder / "here.json")


def start(world, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("fork").Process(target=measured_by, args=(rank, world, port, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.skipif(not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this build of torch has no gloo")
def test_several_processes_tune(tmp_path):
    """Each takes a share of the cases. One is interrupted and the others ended, as torchrun does; more of them go on with what is left."""
    pytest.importorskip("triton")
    from perf.cases import make_case
    from perf.schema import TUNE, read
    from perf.shapes import Site

    cases = [make_case("se", "bf16", "contiguous", n, Site(1, 8, 4, 4, 2)) for n in (1, 4, 16, 64, 256)]
    path, part = tmp_path / "t.csv", tmp_path / "t.1.csv"
    first, second = start(2, tmp_path, cases, 64)
    second.join(30)
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().count("measured by 0") == 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.terminate()
    first.join(30)
    assert second.exitcode == 130 and not (tmp_path / "here.json").exists()
    assert [set(read(file, TUNE).n) for file in (path, part)] == [{1, 16, 256}, {4}]

    path.write_text(path.read_text() + "se,fw")  # a row that the end cut short
    rest = [*cases, make_case("se", "bf16", "contiguous", 1024, Site(1, 8, 4, 4, 2))]
    processes = start(3, tmp_path, rest, None)
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here.json", "t.csv"]
    table = read(path, TUNE)
    finished = table[table.key == ""].set_index("n").status
    assert dict(finished.str[-1].astype(int)) == {1: 0, 4: 1, 16: 0, 64: 0, 256: 0, 1024: 1} and len(table) == 3 * len(rest)
    found = json.loads((tmp_path / "here.json").read_text())["tiles"]
    assert found == {KEY: {str(case.n): {"block_c": 32, "block_p": 64, "splits": 1, "num_warps": 8, "lag": 0, "maxnreg": 0} for case in rest}}
