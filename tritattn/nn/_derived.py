"""Blocks that keep their object and its class's name but run another forward: a subclass made at run time, which copies and pickles."""

from __future__ import annotations

import copyreg
import inspect
import types
from functools import cache
from typing import Any, NoReturn

from torch import nn

from ._base import not_scriptable, own_code


class Derived:
    """Mixed into the class of a block that runs another forward; below it in the order stands the original class."""

    def __prepare_scriptable__(self) -> NoReturn:
        not_scriptable(self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: name the two that it is made of instead, and make it again.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *state = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            mixin = type(self).__mro__[1]
            return (_rebuild, (mixin, original_type(type(self)), *arguments[1:]), *state)
        return (function, arguments, *state)


@cache
def derived_type(mixin: Any, original: Any) -> Any:
    """The subclass of `original` that blocks of that class get; under its name."""
    own = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    own["forward"] = forward = own_code(mixin.forward)
    forward.__signature__ = inspect.signature(original.forward)  # torch.export knows arguments by their names
    return types.new_class(original.__name__, (mixin, original), exec_body=lambda body: body.update(own))


def original_type(kind: type) -> type:
    order = kind.__mro__
    return order[order.index(Derived) + 1]


def _rebuild(mixin: type, original: type, *arguments: Any) -> nn.Module:
    kind = derived_type(mixin, original)
    return kind.__new__(kind, *arguments)
