"""timm and torchvision, where they are installed."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch


@lru_cache(maxsize=4)
def peer(name: str) -> ModuleType | None:
    """The package, or None where it is missing or does not work with this torch.

    torchvision's Python files describe operators of its compiled part, which a CPU-only torch cannot load: `register_fake` raises for them
    and takes the whole import down. None of them is needed here, so those calls are passed over.
    """
    register_fake = torch.library.register_fake

    def forgiving(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register_fake(op, *args, **kwargs)

    torch.library.register_fake = forgiving  # type: ignore[assignment]
    try:
        return importlib.import_module(name)
    except Exception:
        return None
    finally:
        torch.library.register_fake = register_fake
