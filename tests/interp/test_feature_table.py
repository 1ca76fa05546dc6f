"""The checks behind the README's table: what they call right is right, and a wrong kernel shows."""

import dataclasses

import pytest
import torch

from perf import features
from perf.cases import make_case
from perf.shapes import Site
from tritattn import _library

CASE = dataclasses.asdict(make_case("sse", "fp32", "contiguous", 1, Site(1, 8, 4, 8, 2)))


@pytest.fixture(autouse=True)
def poison():
    """Not here: the poison's own writes would be counted."""


@pytest.mark.parametrize("check", ["forward", "backward", "compile", "export"])
def test_right_and_wrong(check, monkeypatch):
    assert features._answer({"check": check, "case": CASE}) == "yes"
    family = _library._families["pixel_gate"]
    which = "backward" if check == "backward" else "launch"
    original = getattr(family, which)
    monkeypatch.setattr(family, which, lambda *args: [None if t is None else t * 1.01 for t in original(*args)])
    assert features._answer({"check": check, "case": CASE}).startswith("off by ")
    monkeypatch.setattr(family, which, lambda *args: 1 / 0)
    torch._dynamo.reset()
    assert "ZeroDivisionError" in features._answer({"check": check, "case": CASE})


def test_traffic():
    moved = features._answer({"check": "moved", "case": CASE})
    assert moved["fwd"]["launches"] == 1 and moved["bwd"]["map_read"] >= 2 * 8 * 32 * 4
