"""Who imports whom, and what `import tritattn` brings along."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Layer -> the layers of this project that it may import, besides itself. What the tests import is not limited.
ARROWS: dict[str, set[str]] = {
    "_version": set(),
    "kernels": set(),
    "reference": set(),
    "tuning": set(),
    "peers": set(),
    "_spec": set(),
    "_replay": {"tuning"},
    "_library": {"_replay", "_spec"},
    "ops": {"_library", "_replay", "_spec", "kernels", "reference", "tuning"},
    "nn": {"ops", "peers", "reference"},
    "convert": {"nn", "ops", "peers", "reference"},
    "env": {"_library", "_version", "tuning"},
    "tritattn": {"_library", "_version", "convert", "nn", "ops", "reference"},
    "perf": {"_library", "_replay", "kernels", "nn", "ops", "peers", "reference", "tritattn", "tuning"},
}
# Private modules that are part of a layer of another name.
PART_OF = {"_match": "peers", "_fused": "convert", "_residual": "convert", "_verify": "convert"}
PART_OF |= {"_linear": "tuning", "_relay": "_library", "_sharding": "_library", "_tables": "tuning"}


def module_of(path: Path) -> tuple[str, ...]:
    """The dotted name of a file of the checkout, as a tuple; kernels/ is tritattn.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("tritattn", *parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def files() -> list[Path]:
    return sorted(path for folder in ("kernels", "tritattn", "perf") for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_of(path): path for path in files()}
PACKAGES = {name[:end] for name in MODULES for end in range(1, len(name))}


def layer_of(module: tuple[str, ...]) -> str:
    """`tritattn.ops.gating` -> ops, `tritattn` -> tritattn, `perf.sweep` -> perf."""
    if module[0] != "tritattn" or len(module) == 1:
        return module[0]
    name = module[1] if module[:2] in MODULES or module[:2] in PACKAGES else "tritattn"
    return PART_OF.get(name, name)


def imports(path: Path) -> Iterator[tuple[tuple[str, ...], ast.stmt]]:
    """Every module that a file imports, at its top or inside a function, with relative names resolved."""
    module = module_of(path)
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split(".")), node
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:  # `from . import a` imports the module a; `from .a import name` the module a
                name = (*base, alias.name)
                yield (name if name in MODULES or name in PACKAGES else base), node


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python(*arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints, started in the checkout."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", files(), ids=relative)
def test_arrows_between_layers(path):
    layer = layer_of(module_of(path))
    assert layer in ARROWS, f"{relative(path)} belongs to no layer"
    allowed = ARROWS[layer] | {layer}
    for name, node in imports(path):
        if name[0] in ("tritattn", "perf", "tests", "kernels"):
            where = f"{relative(path)}:{node.lineno} imports {'.'.join(name)}"
            assert name[0] != "kernels", f"{where}: its name is tritattn.kernels"
            assert layer_of(name) in allowed, f"{where}: {layer} may import {sorted(allowed)}"


def declared(*extras: str) -> set[str]:
    """Import names of the declared dependencies; all of this project's but one are their distribution's name."""
    lines = PYPROJECT["project"]["dependencies"] + [
        line for extra in extras for line in PYPROJECT["project"]["optional-dependencies"][extra]
    ]
    return {re.match(r"[\w-]+", line).group().replace("scikit-learn", "sklearn").replace("-", "_") for line in lines}


@pytest.mark.parametrize("path", files(), ids=relative)
def test_third_party_imports_are_declared(path):
    ours = {"tritattn", "perf"}
    allowed = {
        "kernels": {"triton"},
        "tritattn": {"torch", "triton"},
        "perf": declared("perf") | {"timm", "torchvision"},  # the peers that the sweep times, where they are installed
    }[path.relative_to(ROOT).parts[0]]
    for name, node in imports(path):
        if name[0] not in sys.stdlib_module_names and name[0] not in ours:
            assert name[0] in allowed, f"{relative(path)}:{node.lineno} imports {name[0]}, which is not declared"


def test_kernels_import_their_siblings_relatively():
    for path in (ROOT / "kernels").rglob("*.py"):
        for name, node in imports(path):
            if name[:2] == ("tritattn", "kernels"):
                assert getattr(node, "level", 0) == 1, f"{relative(path)}:{node.lineno}"


def test_packages_in_pyproject_are_the_folders():
    folders = {(ROOT / "tritattn")} | {path for path in (ROOT / "tritattn").rglob("*") if any(path.glob("*.py"))}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"tritattn.kernels"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == expected
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {"tritattn.kernels": "kernels"}
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    assert not [path for path in (ROOT / "kernels").iterdir() if path.is_dir() and path.name != "__pycache__"]


HEAVY = ("triton", "tritattn.kernels", "torch._dynamo", "torch._inductor", "torch.onnx", "pandas", "sympy")
# Every module of the package but the kernels, so that what is exported lazily is covered too.
IMPORT_ALL = f"""
import importlib, json, sys, torch
before = set(sys.modules)
import tritattn
for name in {sorted(".".join(name) for name in MODULES if name[0] == "tritattn" and name[1:2] != ("kernels",))}:
    importlib.import_module(name)
"""


def test_import_brings_nothing_heavy_and_touches_no_gpu():
    code = IMPORT_ALL + "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))"
    new, initialized = json.loads(python("-c", code))
    assert {"tritattn.ops", "tritattn.nn", "tritattn.convert"} <= set(new)
    assert not [name for name in new if name in HEAVY or name.startswith(tuple(f"{heavy}." for heavy in HEAVY))]
    assert not initialized


def test_public_names_resolve():
    import tritattn

    assert not [name for name in tritattn.__all__ if not hasattr(tritattn, name)]
    assert set(tritattn.__all__) <= set(dir(tritattn))


def test_works_where_triton_is_not_installed():
    """TRITON_INTERPRET=1 asks for the kernels on a CPU; without triton the reference runs, and the reason is given."""
    code = """
import sys
sys.modules["triton"] = None
""" + IMPORT_ALL + """
from tritattn import env, ops
x, w = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(1, 4, 1, 1)
y = ops.sse(x, w)
y.sum().backward()
right = torch.allclose(y, x * torch.sigmoid((x * w).sum(1, keepdim=True)), atol=1e-6)
print(json.dumps([right, x.grad is not None, *env.explain("cpu", torch.float32)]))
"""
    right, has_gradient, path, reason = json.loads(python("-c", code, TRITON_INTERPRET="1"))
    assert right and has_gradient
    assert path == "reference" and "triton" in reason


def test_env_prints_versions_and_paths():
    import torch

    from tritattn import __version__, env

    versions, _, paths, tiles = python("-m", "tritattn.env").split("\n\n")
    assert re.search(r"^cpu +the rule$", tiles, re.M)
    assert re.search(rf"^tritattn +{re.escape(__version__)}$", versions, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", versions, re.M)
    for dtype in env.DTYPES:
        path, reason = env.explain("cpu", dtype)
        assert re.search(rf"^cpu +{str(dtype).split('.')[1]} +{path} +{re.escape(reason)}$", paths, re.M)
