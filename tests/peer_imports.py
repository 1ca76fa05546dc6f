"""Importing the packages whose blocks are converted: `torchvision = peer("torchvision")`, which skips the test where it is absent.

torchvision registers fakes for its compiled operators when it is imported, and fails where the wheel does not bring those operators, as it
does beside a build of torch for the CPU. The networks need none of them, so for the time of the import such registrations do nothing.
"""

import functools
import importlib

import pytest
import torch


def _lenient(register):
    @functools.wraps(register)
    def register_fake(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda function: function
        return register(op, *args, **kwargs)

    return register_fake


def peer(name):
    """The module of that dotted name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "register_fake", _lenient(torch.library.register_fake))
        if name.partition(".")[0] in ("timm", "segmentation_models_pytorch"):  # both import torchvision
            pytest.importorskip("torchvision", exc_type=ImportError)
        pytest.importorskip(name.partition(".")[0], exc_type=ImportError)
        return importlib.import_module(name)
