"""python -m perf sweep | models | tune | traffic | codegen | features | digits | compare | report | all"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "kernels").is_dir() or not (ROOT / "pyproject.toml").is_file():
    sys.exit("python -m perf needs a checkout of tritattn: clone the repository and run it in its root")
sys.path.insert(0, str(ROOT))

from perf.cli import app  # noqa: E402

app(prog_name="python -m perf")
