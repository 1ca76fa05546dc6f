"""An entry: what is known of one block of another package.

An entry maps the layers of a `tritattn.nn` module to those of the other block and says with which options the module computes the same. A
block is recognised by its class name together with the names and shapes of its parameters, so that a copy pasted from a paper's
repository counts; many packages use the same name for different blocks, and none of it is trusted: `convert` runs both before it swaps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# Activation modules by class name; several packages have their own of the same name.
HIDDEN = {
    "GELU": "gelu",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
    "Hardswish": "hardswish",
    "h_swish": "hardswish",
    "Identity": "none",
    "LeakyReLU": "leaky_relu",
    "MemoryEfficientSwish": "silu",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
}
GATES = {
    "HardSigmoid": "hard_sigmoid",
    "HardSigmoidMe": "hard_sigmoid",
    "Hardsigmoid": "hard_sigmoid",
    "Identity": "none",
    "ReLU": "relu",
    "Sigmoid": "sigmoid",
}


class NoFit(Exception):
    """Why a block is not the one of an entry although its class has that name."""


@dataclass(frozen=True)
class Peer:
    """One block of one package, and the `tritattn.nn` module that computes the same."""

    source: str
    classes: tuple[str, ...]  # names under which it is found
    module: str  # class in tritattn.nn
    layers: Mapping[str, str]  # path of a layer or bare parameter in the module -> its path in the block
    options: Mapping[str, Any] = field(default_factory=dict)  # constructor options that all such blocks have in common
    read: Callable[[Any], dict[str, Any]] = lambda block: {}  # those that depend on the block; raises NoFit
    hidden: str | None = None  # path of the activation in the bottleneck
    gates: tuple[str, ...] = ()  # paths of the gate's activation, all of one type
    spatial_gate: str | None = None
    inner: tuple[str, ...] = ()  # class names of modules inside that only call those named here
    inputs: int = 1  # maps that the block takes
    before: Callable[..., tuple[Any, Tensor | None]] | None = None  # (block, *maps) -> (what the module takes, residual)
    called: tuple[str, ...] = ()  # paths of the modules that are called, by `before` or as layers, and may hold anything
    square: bool = False  # whether it takes only square maps right; it keeps its own forward for others
    common_name: bool = False  # the class name says little: a block without these layers is somebody else's

    def __str__(self) -> str:
        return f"{self.source} {self.classes[0]}"


# Sources of more than one family's blocks.
BLOG = "0809zheng.github.io"
EA = "External-Attention-pytorch"
