"""The implementations that are compared: each turns a case's parameters into a function of (x, residual)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Weights
from .cases import DTYPES, Case, flat_parameters
from .peers import peer

PROVIDERS = ("eager", "compile", "tritattn", "timm", "torchvision")
Run = Callable[[Any, Tensor | None], Tensor]  # x, or a tuple of maps


@dataclass
class Call:
    """run(x, residual) -> y, and the parameters it reads, in the order of the answer's gradients."""

    run: Run
    parameters: list[Tensor]
    modules: list[nn.Module]

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)


def offers(provider: str, case: Case) -> bool:
    """Whether the provider has the case's block, and is installed if it is another package."""
    if provider in ("eager", "compile", "tritattn"):
        return True
    block = case.op.block.peers.get(provider)
    return block is not None and block.only.items() <= case.options.items() and peer(provider) is not None


def build(provider: str, case: Case, weights: Weights, device: str) -> Call:
    block, options, tail = case.op.block, case.options, case.op.tail
    modules = [value for value in weights.values() if isinstance(value, nn.Module)]
    if provider in ("timm", "torchvision"):
        return _peer_call(provider, case, weights, device)

    def eager(x: Any, residual: Tensor | None, weights: Weights) -> Tensor:
        return tail(block.eager(x, weights, options), residual)

    function: Callable[..., Tensor]
    if provider == "eager":
        function = eager
    elif provider == "compile":
        function = _compiled(eager, case.layout)
    elif provider == "tritattn":
        activation = case.op.activation

        def function(x: Any, residual: Tensor | None, weights: Weights) -> Tensor:
            return block.fused(x, weights, options, residual=residual, activation=activation)
    else:
        raise ValueError(f"no provider {provider!r}; there are: {', '.join(PROVIDERS)}")
    return Call(lambda x, residual: function(x, residual, weights), flat_parameters(weights), modules)


def compile_options(layout: str) -> dict[str, Any]:
    """Inductor's options at which the layout stays as given, which is the neighbours' choice in a network.

    By default it would turn a contiguous map to channels last and back for the sake of a block's 1x1 convolutions; without its layout pass it would
    copy a channels-last map before one.
    """
    return {"layout_optimization": layout == "channels_last"}


def _compiled(function: Callable[..., Tensor], layout: str) -> Callable[..., Tensor]:
    """torch.compile, from scratch: what an earlier shape left behind would make this one dynamic, or refuse it."""
    import torch._functorch.config

    torch._dynamo.reset()
    # the backward is timed alone, which runs it more than once over what the forward saved
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False, options=compile_options(layout))


def _peer_call(provider: str, case: Case, weights: Weights, device: str) -> Call:
    module: Any = case.op.block.peers[provider].make(peer(provider), case.c, case.options)
    parameters = flat_parameters(weights)
    module = module.to(device=device, dtype=DTYPES[case.dtype])
    own = list(module.parameters())
    with torch.no_grad():
        for target, source in zip(own, parameters, strict=True):
            target.copy_(source.reshape(target.shape))
    tail = case.op.tail
    return Call(lambda x, residual: tail(module(x), residual), own, [module])
