"""Tables of tuned tiles: what they are named, when they count, what is refused, and what tuning writes into one."""

import json
import re
import types
import warnings

import pandas as pd
import pytest
import torch

from tritattn import _tables, tuning

KEY = "tile 2 channels_last c256 hw3136 maps1 row0"
TILES = {"block_c": 64, "block_p": 64, "num_warps": 4}
GPU = torch.device("cuda", 0)
QUESTION = ("tile", 256, 256, 3136, 2, True, GPU)


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
        ({"schema": 0}, "schema 0, not 1"),
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
    ],
)
def test_an_entry_that_cannot_be_used_is_left_out(folder, key, n, tiles):
    good = KEY.replace("3136", "784")
    write(folder, {good: {"256": TILES}, key: {n: tiles}})
    with pytest.warns(RuntimeWarning, match="tiles come from elsewhere"):
        assert tuning.choose(*QUESTION).source == "rule"
    assert tuning.choose(*QUESTION[:3], 784, *QUESTION[4:]).source == "tuned"


def test_bundled_tables():
    for path in _tables.BUNDLED.glob("*.json"):
        header = json.loads(path.read_text())
        assert path.stem == _tables.slug(header["device"]) and header["schema"] == _tables.SCHEMA
        entries = [(key, n, tiles) for key, batches in header["tiles"].items() for n, tiles in batches.items()]
        assert entries and all(_tables.problem(*entry) is None for entry in entries)


# -- what tuning writes -------------------------------------------------------------------------------------------------------------------------


def rows(ratio, *, config, op="se", noise=0.01, key=KEY, status="ok", n=256, c=256, dtype="bf16"):
    measured = {"key": key, "config": config, "status": status, "ratio": ratio, "noise": noise}
    return {"op": op, "mode": "fwd", "dtype": dtype, "n": n, "c": c, "h": 56, "w": 56, "params": "{}", **measured}


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
    table = pd.DataFrame([RULE, rows(0.8, config="c64p64s1w8"), {**RULE, "n": 1}, rows(0.7, config="c2p2s1w1", n=1)])
    assert tune.write_table(path, table, "NVIDIA H200", 132) == 4
    assert list(_tables.read(path, 132)[0][KEY]) == [1, 32, 256] and _tables.read(path, 132)[1] == []
    assert not list(folder.glob("*.tmp"))


def test_candidates_are_around_the_rule():
    pytest.importorskip("triton")
    from perf import tune
    from perf.choices import Question

    question = Question("ticket", 256, 256, 3136, 2, False)
    rule = tuning.choose(*question[:6], torch.device("cpu"))
    found = tune.candidates(rule, question)
    assert found[0] is rule and len({config.key for config in found}) == len(found) > 10
    assert {0, rule.lag // 2, rule.lag, 2 * rule.lag} == {config.lag for config in found} and 0 in {config.maxnreg for config in found}
    for config in found:
        assert config.block_c <= 256 and tune.fields_of(config.key).items() <= vars(config).items()
        assert re.fullmatch(_tables._KEY, tune.table_key(question))
    pixels = Question("pixel", 256, 1024, 196, 2, False)
    assert len(tune.candidates(tuning.choose(*pixels[:6], torch.device("meta")), pixels)) == 1
