"""The attention blocks of convolutional networks as fused Triton kernels."""

from pathlib import Path

from ._version import __version__

# In a checkout that is not installed, tritattn.kernels is the folder kernels/ beside this package.
_package = Path(__file__).resolve().parent
if not (_package / "kernels").is_dir() and (_package.parent / "pyproject.toml").is_file():
    __path__.append(str(_package.parent))
del _package, Path

from . import nn, ops, reference  # noqa: E402
from ._library import backend, explain  # noqa: E402
from .convert import convert, restore  # noqa: E402

__all__ = ["__version__", "backend", "convert", "explain", "nn", "ops", "reference", "restore"]
