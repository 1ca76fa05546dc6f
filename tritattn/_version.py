"""The version, written here alone: the build and `tritattn.__version__` read it."""

__version__ = "0.1.0"
