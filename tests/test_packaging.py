"""What is shipped, and that kernels/ is tritattn.kernels in every form of installation, beside a foreign `kernels`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import tritattn

ROOT = Path(__file__).resolve().parents[1]
LEAVE_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "gpu-results")
FOREIGN = "mark = 'the package of that name from PyPI'\n"


def execute(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(hook: str, source: Path, out: Path) -> Path:
    """Call one hook of the build backend, as pip and build do; the file it makes in `out`."""
    out.mkdir()
    execute(sys.executable, "-c", f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})", cwd=source)
    (made,) = out.iterdir()
    return made


def install(wheel: Path, site: Path) -> None:
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target")
    execute(sys.executable, "-m", "pip", "install", *options, site, wheel, cwd=site.parent)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tree, because building writes into its source."""
    tree = shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "tree", ignore=LEAVE_OUT)
    results = tree / "perf" / "results" / "local"
    results.mkdir(parents=True, exist_ok=True)
    (results / "sweep.csv").touch()
    return tree


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build("build_sdist", checkout, tmp_path_factory.mktemp("sdist") / "out")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist alone, so that the sdist is seen to hold everything."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--wheel-dir")
    execute(sys.executable, "-m", "pip", "wheel", *options, folder, sdist, cwd=folder)
    (made,) = folder.iterdir()
    return made


@pytest.fixture
def site(tmp_path):
    """A site-packages folder in which a distribution named `kernels` is installed."""
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(FOREIGN)
    info = folder / "kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\nkernels-1.0.dist-info/METADATA,,\n")
    return folder


def resolve(site: Path, cwd: Path) -> dict[str, str]:
    """Where a fresh interpreter finds this package, its kernels, and the foreign `kernels`.

    -S leaves out the .pth files of the running environment, in which tritattn may be installed; those of `site` count.
    """
    code = f"""
import importlib, json, site, sys
site.addsitedir({str(site)!r})
sys.path.append({sysconfig.get_path("purelib")!r})
import tritattn
names = {sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))}
found = {{name: importlib.import_module("tritattn.kernels." + name).__file__ for name in names}}
import kernels
assert kernels.mark == {FOREIGN.split("'")[1]!r}
found |= {{"tritattn": tritattn.__file__, "version": tritattn.__version__, "kernels": kernels.__file__}}
print(json.dumps(found))
"""
    return json.loads(execute(sys.executable, "-S", "-c", code, cwd=cwd))


@pytest.mark.skipif(find_spec("triton") is None, reason="importing the kernels needs triton")
@pytest.mark.parametrize("form", ["checkout", "editable", "wheel"])
def test_kernels_resolve_beside_a_foreign_package_of_that_name(form, checkout, site, tmp_path, request):
    package, kernels, cwd = checkout / "tritattn", checkout / "kernels", tmp_path
    if form == "checkout":
        cwd = checkout
    elif form == "editable":
        install(build("build_editable", checkout, tmp_path / "editable"), site)
    else:
        install(request.getfixturevalue("wheel"), site)
        package, kernels = site / "tritattn", site / "tritattn" / "kernels"
    found = resolve(site, cwd)
    assert found.pop("version") == tritattn.__version__
    assert Path(found.pop("kernels")) == site / "kernels" / "__init__.py"
    assert Path(found.pop("tritattn")) == package / "__init__.py"
    assert found
    assert all(Path(file).parent == kernels for file in found.values())
    assert (site / "kernels" / "__init__.py").read_text() == FOREIGN
    assert [path.name for path in (site / "kernels").iterdir() if path.name != "__pycache__"] == ["__init__.py"]


def shipped() -> set[str]:
    """The files of the checkout that a user needs, as they are named when installed."""
    names = {path.relative_to(ROOT) for path in (ROOT / "tritattn").rglob("*.py")}
    names |= {path.relative_to(ROOT) for path in (ROOT / "tritattn" / "tuned").glob("*.json")}
    names |= {Path("tritattn") / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("*.py")}
    return {path.as_posix() for path in names} | {"tritattn/py.typed"}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"tritattn-{tritattn.__version__}.dist-info"
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert {name for name in names if not name.startswith(f"{info}/")} == shipped()
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["Version"] == tritattn.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {"dev", "perf", "test"}
    assert [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need] == ["torch>=2.11"]


def test_sdist_holds_the_tests_and_the_harness(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "perf", "kernels"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")} <= names
    assert {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith("perf/results")]
