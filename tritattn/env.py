"""`python -m tritattn.env`: versions, devices, the path that a call would take on each device for each dtype, and where its tiles come from."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable, Iterator

import torch

from . import _tables
from ._library import explain
from ._version import __version__

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except Exception as error:  # a broken installation is what this command is asked about
        return f"not usable ({type(error).__name__}: {error})"


def _versions() -> Iterator[tuple[str, str]]:
    yield "tritattn", __version__
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    yield "torch", torch.__version__
    yield "triton", _triton_version()
    yield "CUDA", torch.version.cuda or "not in this build of torch"
    yield "ROCm", torch.version.hip or "not in this build of torch"


def _devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), platform.processor() or platform.machine()
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(kind.type, index)
        if kind.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            yield device, f"{facts.name}, {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB"
        else:
            yield device, kind.type


def _paths(devices: Iterable[torch.device]) -> Iterator[tuple[str, ...]]:
    yield "device", "dtype", "path", "why"
    for device in devices:
        for dtype in DTYPES:
            yield str(device), str(dtype).removeprefix("torch."), *explain(device, dtype)


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def report() -> str:
    """The text that `python -m tritattn.env` prints."""
    devices = list(_devices())
    tiles = [("device", "tiles"), *((str(device), _tables.describe(device)) for device, _ in devices)]
    parts = (_versions(), ((str(device), name) for device, name in devices), _paths(device for device, _ in devices), tiles)
    return "\n\n".join(_table(part) for part in parts)


if __name__ == "__main__":
    print(report())
