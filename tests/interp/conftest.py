"""The kernels themselves, run by Triton's interpreter on the CPU: `TRITON_INTERPRET=1 pytest tests/interp`."""

import os
import sys

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton decides at its import whether it interprets, and the other tests want it to compile
    if "torch" in sys.modules:
        pytest.exit("tests/interp needs a process of its own: TRITON_INTERPRET=1 pytest tests/interp", returncode=4)
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from interpreter import faithful, recorded  # noqa: E402

from perf.interleave import interleaved  # noqa: E402


def pytest_configure(config):
    # lanes outside of a map, and inputs with Inf and NaN
    for module in ("triton", "numpy"):
        config.addinivalue_line("filterwarnings", rf"ignore::RuntimeWarning:{module}\..*")
    # no kernel may hand over to the reference
    config.addinivalue_line("filterwarnings", "error:tritattn")


torch.set_num_threads(1)
faithful()


@pytest.fixture
def launches():
    """The names of the kernels launched so far, in order."""
    with recorded() as names:
        yield names


@pytest.fixture(autouse=True)
def waiting():
    """Kernels whose programs wait for each other run too."""
    with interleaved():
        yield


UNWRITTEN = {torch.int32: 0x5A5A5A5A}


def _poisoned(allocate):
    def allocated(*args, **kwargs):
        t = allocate(*args, **kwargs)
        if type(t) is torch.Tensor and t.device.type == "cpu" and (t.is_floating_point() or t.dtype in UNWRITTEN):
            with torch.no_grad():
                t.fill_(UNWRITTEN.get(t.dtype, float("nan")))
        return t

    return allocated


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory holds NaN, so that what a kernel leaves unwritten cannot pass by luck."""
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
