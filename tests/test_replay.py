"""What a repeated call tells the compiled kernels, on a GPU that is not there; what they compute with it is tested in tests/interp and tests/gpu."""

import pytest
import torch

from perf.standin import standin
from tritattn import _library, _replay, ops

C = 8
FIRST = 9  # of a launch's own arguments: three of the grid, the stream, the function, two of metadata, two hooks


@pytest.fixture(autouse=True)
def plans(monkeypatch):
    for family in _library._families.values():
        monkeypatch.setattr(family, "plans", {})
    return lambda: [plan for family in _library._families.values() for plan in family.plans.values()]


def weights():
    return [torch.ones(2, C), torch.ones(2), torch.ones(C, 2), None]


def launched(launches, call):
    launches.clear()
    call()
    return list(launches)


def test_pointers_of_a_repeated_call(plans):
    params = weights()
    maps = [torch.ones(2, C, 16, 16) for _ in range(3)]
    with standin() as launches, torch.no_grad():
        taken = [launched(launches, lambda x=x: ops.se(x, *params)) for x in maps]
        assert [len(each) for each in taken] == [1, 1, 1]
        (first,), _, (again,) = taken
        (plan,) = plans()
        assert isinstance(plan, _replay.Plan)
    assert first[:3] == again[:3] and len(first) == len(again)
    changed = 0
    for before, now in zip(first[FIRST:], again[FIRST:], strict=True):
        if isinstance(before, torch.Tensor):
            assert isinstance(now, int) and now % 16 == before.data_ptr() % 16
            if before is maps[0]:
                assert now == maps[2].data_ptr()
            elif any(before is p for p in params):
                assert now == before.data_ptr()
            else:
                changed += 1
        else:
            assert before == now
    assert changed > 3  # workspaces, and the result


def test_workspaces_do_not_overlap():
    x, params = torch.ones(2, C, 16, 16).requires_grad_(), [None if p is None else p.requires_grad_() for p in weights()]
    taken = []
    with standin() as launches:
        for _ in range(3):
            launches.clear()
            y = ops.se(x, *params)
            torch.autograd.grad(y, [x, *(p for p in params if p is not None)], torch.ones_like(y))
            taken.append(list(launches))
    usual, repeated = taken[0], taken[2]
    assert len(usual) == len(repeated) > 1
    for before, now in zip(usual, repeated, strict=True):
        spans = sorted(
            {(address, t.untyped_storage().nbytes()) for t, address in zip(before[FIRST:], now[FIRST:], strict=True) if isinstance(t, torch.Tensor)}
        )
        for (begin, size), (following, _) in zip(spans, spans[1:], strict=False):
            assert begin + size <= following


def test_launchers_run_for_who_watches_them(plans):
    with standin(), torch.no_grad():
        with _replay.off():
            for _ in range(3):
                ops.se(torch.ones(2, C, 16, 16), *weights())
        assert not plans()
