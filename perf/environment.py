"""What every row says about where it was measured."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("kernels", "perf", "tritattn")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checkout's commit; where files differ from it, or outside a repository, with "+" and a hash of the sources."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head and not _output("git", "status", "--porcelain", "--", *SOURCES):
        return head
    digest = hashlib.sha1()
    for path in sorted(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{head or 'unknown'}+{digest.hexdigest()[:8]}"


def processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} ({os.cpu_count()} cores)"


def version_of(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except Exception:
        return ""


@lru_cache(maxsize=2)
def environment(device: str) -> dict[str, Any]:
    """The columns of schema.ENVIRONMENT but the timestamp, for rows measured on `device` ("cuda" or "cpu")."""
    import tritattn

    on_gpu = device == "cuda"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu and torch.version.cuda else ""
    return {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": (torch.version.cuda or torch.version.hip or "") if on_gpu else "",
        "driver": driver.partition("\n")[0],
        "tritattn": tritattn.__version__,
        "commit": commit(),
    }
