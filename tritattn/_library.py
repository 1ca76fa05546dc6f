"""The one place that registers an op with torch and routes a call to it.

A family of kernels is one `Family`: its inputs and outputs by name, a fake, a launcher, a backward launcher and a plain torch reference. From these
come two registered ops, `tritattn::<name>` and `tritattn::<name>_backward`, and one callable that sends each call down the path it can take:

- torch.compile and torch.export on a device with kernels: the registered op, opaque, so that the compiler's cache never holds stale launch code;
- torch.compile elsewhere, ONNX, jit.trace, functorch transforms, forward AD: the inlined reference, which those tools can see through;
- plain eager tensors: one `autograd.Function` around the launcher, past the dispatcher (8 us against 44);
- everything else (FakeTensor, DTensor, dispatch modes, subclasses): the registered op.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _replay
from ._spec import Spec, decode, encode

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_lib = torch.library.Library("tritattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, type(None)})
# The dispatcher's state outside of any op. Inside one, and inside __torch_dispatch__, it skips the keys that derivatives are made of.
_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
_forced: str | None = None
_broken: dict[tuple[str, torch.dtype], str] = {}
_families: dict[str, Family] = {}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op of the package onto one path inside the block.

    "reference" runs plain torch; "triton" runs the kernels and raises where they cannot run, instead of falling back.
    The setting holds for the whole process, because autograd runs backward passes in threads of its own.
    """
    global _forced
    if name not in ("reference", "triton"):
        raise ValueError(f"backend: got {name!r}, expected 'reference' or 'triton'")
    saved, _forced = _forced, name
    try:
        yield
    finally:
        _forced = saved


@lru_cache(maxsize=1)
def _triton_problem() -> str | None:
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    return None


@lru_cache(maxsize=64)
def _find_device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        return _triton_problem() if INTERPRET else "the kernels run on GPUs; CPU tensors take the reference"
    if device.type != "cuda":
        return f"there are no kernels for device type {device.type!r}"
    # without a GPU only fake tensors are on one, and who traces with them wants to see the op
    if torch.version.hip is None and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    return _triton_problem()


def _device_problem(device: torch.device) -> str | None:
    return _find_device_problem(device)


# What torch.compiler.assume_constant_result sets, which would import dynamo: a compiler asks once, instead of tracing through the cache.
_device_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """The path that a plain eager call on (device, dtype) takes, "triton" or "reference", and why."""
    if _forced is not None:
        return _forced, "forced by tritattn.backend"
    device = torch.device(device)
    problem = _device_problem(device)
    if problem is None and device.type == "cuda" and not torch.cuda.is_available():
        problem = "torch sees no GPU"
    if problem is not None:
        return "reference", problem
    if dtype not in KERNEL_DTYPES:
        return "reference", f"there are no kernels for {dtype}"
    broken = sorted({name for name, broken_dtype in _broken if broken_dtype == dtype})
    if broken:
        return "triton", f"except {', '.join(broken)}: a kernel failed to compile"
    return "triton", "interpreted on the CPU" if INTERPRET and device.type == "cpu" else "kernels for this device"


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _without_autocast(device_type: str) -> Any:
    """A compiler knows the public way alone, which costs an eager call 6 us."""
    if not torch.compiler.is_compiling():
        return torch._C._DisableAutocast()
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _transformed() -> bool:
    """Whether the call runs under a tool that must see through the op: functorch, forward AD, tracing, ONNX export, which traces or compiles."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or torch.jit.is_tracing()


def _launch_errors() -> tuple[type[BaseException], ...]:
    """What a kernel raises that this compiler or device cannot build; errors of the launch itself are not among them."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


class Family:
    """A fused op with its backward op, registered and routed.

    inputs: names of the tensor arguments in order, "?" after an optional one. outputs: names of the results. The first `differentiable` results
    carry gradients and are what a call returns; `saved` names the results that the backward launcher gets.
    fake(*inputs, spec) -> outputs: empty tensors of the shapes, dtypes and strides that launch returns.
    launch(*inputs, spec) -> outputs; backward(grads, inputs, saved, spec, needs) -> one gradient or None per input.
    reference(*inputs, spec) -> the differentiable results, in plain torch.
    spec: the class of the options, see _spec.
    batched: names of the inputs that have a batch dimension (the others are parameters), for sharded tensors.

    An input named "residual" is added before spec.activation: without an activation its gradient is the one that flows in, so that no launcher is
    asked for it, and it is not saved.
    """

    slots = 0  # how many of the differentiable results, the last ones, carry gradients but no values; see _relay
    maps = 1  # how many of the inputs, the first ones, are feature maps

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[str],
        outputs: Sequence[str],
        differentiable: int,
        saved: Sequence[str],
        batched: Sequence[str],
        fake: Callable[..., tuple[Tensor, ...]],
        launch: Callable[..., tuple[Tensor, ...]],
        backward: Callable[..., Sequence[Tensor | None]],
        reference: Callable[..., tuple[Tensor, ...]],
        spec: type = Spec,
    ):
        self.name = name
        self.spec = spec
        self.inputs = [i.rstrip("?") for i in inputs]
        self.outputs = list(outputs)
        self.differentiable = differentiable
        self.saved = [self.outputs.index(s) for s in saved]
        self.batched = frozenset(batched)
        self.residual = self.inputs.index("residual") if "residual" in self.inputs else None
        self.fake, self.launch, self.backward, self.reference = fake, launch, backward, reference
        self.plans: dict[Any, Any] = {}
        _families[name] = self

        declared = ", ".join(f"Tensor{'?' if i.endswith('?') else ''} {i.rstrip('?')}" for i in inputs)
        grads = ", ".join(f"Tensor? g_{o}" for o in outputs[:differentiable])
        kept = "".join(f", Tensor saved_{s}" for s in saved)
        results = ", ".join(["Tensor"] * len(outputs))
        _lib.define(f"{name}({declared}, str spec) -> ({results})", tags=_TAGS)
        results = ", ".join(["Tensor"] * len(inputs))
        _lib.define(f"{name}_backward({grads}, {declared}{kept}, str spec, bool[] needs) -> ({results})", tags=_TAGS)
        _lib.impl(name, self._op_impl, "CompositeExplicitAutograd")
        _lib.impl(f"{name}_backward", self._op_backward_impl, "CompositeExplicitAutograd")
        forward_name, backward_name = f"tritattn::{name}", f"tritattn::{name}_backward"
        torch.library.register_fake(forward_name, self._op_fake, lib=_lib)
        torch.library.register_fake(backward_name, self._fake_backward, lib=_lib)
        torch.library.register_autograd(forward_name, self._op_autograd, setup_context=self._op_setup, lib=_lib)
        torch.library.register_autograd(backward_name, self._op_double, setup_context=self._op_double_setup, lib=_lib)
        self.op: Any = getattr(torch.ops.tritattn, name).default
        self.op_backward: Any = getattr(torch.ops.tritattn, f"{name}_backward").default
        self.function = _function(self)

    # -- routing ---------------------------------------------------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor | None, spec: Any) -> Any:
        x = inputs[0]
        assert x is not None
        if torch._C._is_any_autocast_enabled():
            # the arithmetic is what each op says it is: plain torch inside one, in the reference above all, stays in its dtype
            with _without_autocast(x.device.type):
                return self._route(x, inputs, spec)
        return self._route(x, inputs, spec)

    def _route(self, x: Tensor, inputs: tuple[Tensor | None, ...], spec: Spec) -> Any:
        if torch.compiler.is_compiling():
            if self.reaches_kernels(x):
                _met_dtensors()
                return self._results(_tuple(self.op(*inputs, encode(spec))))
            return self._results(self.reference(*inputs, spec))
        if _transformed():
            return self._results(self.reference(*inputs, spec))
        if not torch._C._len_torch_dispatch_stack() and all(type(t) in _PLAIN for t in inputs):
            if not self._usable(x):
                return self._results(self.reference(*inputs, spec))
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
                return self.function.apply(spec, *inputs)
            return self._results(self.run(inputs, spec, self.differentiable))
        sharded = _meet_dtensors()
        if not self._usable(x) and not (sharded and isinstance(x, sharded)):
            return self._results(self.reference(*inputs, spec))
        return self._results(_tuple(self.op(*inputs, encode(spec))))

    def reaches_kernels(self, x: Tensor) -> bool:
        """Whether a call on x is for the kernels, or a tool needs to see plain torch, or nothing else can run."""
        if torch.compiler.is_compiling():
            return self._usable(x) and not torch.onnx.is_in_onnx_export()
        return not _transformed() and self._usable(x)

    def _results(self, outputs: Sequence[Tensor]) -> Any:
        return outputs[0] if self.differentiable == 1 else tuple(outputs[: self.differentiable])

    def _usable(self, x: Tensor) -> bool:
        """Whether the kernels take this call. Says so once when a GPU's tensor has to take the reference."""
        if _forced == "reference":
            return False
        problem = _device_problem(x.device)
        if problem is None and x.dtype not in KERNEL_DTYPES:
            problem = f"there are no kernels for {x.dtype}"
        if problem is None and (self.name, x.dtype) in _broken:
            problem = _broken[self.name, x.dtype]
        if problem is None:
            return True
        if _forced == "triton":
            raise RuntimeError(f"tritattn.backend('triton'): {self.name} cannot run on {x.device}: {problem}")
        if x.device.type not in ("cpu", "meta") and not torch.compiler.is_compiling():
            self._warn(problem)
        return False

    def _warn(self, problem: str) -> None:
        _warn_once(f"tritattn.{self.name} runs its plain torch reference: {problem}")

    # -- running on real tensors -----------------------------------------------------------------------------------------------------------

    def run(self, inputs: Sequence[Tensor | None], spec: Spec, wanted: int | None = None) -> Sequence[Tensor]:
        """The kernels, on concrete tensors; all outputs, or the first that are wanted."""
        x = inputs[0]
        assert x is not None
        if self._usable(x) and x.numel():
            try:
                with _device_guard(x):
                    return self._repeat(inputs, spec, wanted)
            except _launch_errors() as error:
                self._mark_broken(x, error)
        # The reference's backward recomputes what it needs, so what would be saved for the kernels stays zero.
        with torch.no_grad():
            results = self.reference(*inputs, spec)
        shapes = self.fake(*inputs, spec)
        settled = [s.copy_(r) for r, s in zip(results, shapes, strict=False)]
        return (*settled, *(s.zero_() for s in shapes[len(results) :]))

    def run_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], saved: Sequence[Tensor], spec: Spec, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        x = inputs[0]
        assert x is not None
        if self._usable(x) and x.numel():
            try:
                with _device_guard(x):
                    return self._repeat_backward(grads, inputs, saved, spec, needs)
            except _launch_errors() as error:
                self._mark_broken(x, error)
        with torch._C._ForceDispatchKeyGuard(*_OUTSIDE):
            return self._reference_backward(grads, inputs, spec, needs)

    def _repeat(self, inputs: Sequence[Tensor | None], spec: Spec, wanted: int | None) -> Sequence[Any]:
        return _replay.repeated(self.plans, spec, inputs, lambda tensors: self.launch(*tensors, spec), wanted)

    def _repeat_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], saved: Sequence[Tensor], spec: Spec, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        first, second = len(grads), len(grads) + len(inputs)

        def launch(tensors: Sequence[Any]) -> Sequence[Tensor | None]:
            return self.backward(tensors[:first], tensors[first:second], tensors[second:], spec, needs)

        return _replay.repeated(self.plans, (spec, *needs), (*grads, *inputs, *saved), launch)

    def _mark_broken(self, x: Tensor, error: BaseException) -> None:
        if _forced == "triton":
            raise error
        reason = f"a kernel failed to compile ({type(error).__name__}: {str(error)[:200]})"
        _broken[self.name, x.dtype] = reason
        self._warn(reason)

    def _reference_backward(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], spec: Spec, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The reference's vector-Jacobian product, differentiable in grads and inputs."""
        wanted = [i for i, need in enumerate(needs) if need]

        def outputs(*chosen: Tensor) -> tuple[Tensor, ...]:
            full = list(inputs)
            for i, t in zip(wanted, chosen, strict=True):
                full[i] = t
            return self.reference(*full, spec)

        results, vjp = torch.func.vjp(outputs, *(inputs[i] for i in wanted))  # type: ignore[misc]
        cotangents = tuple(torch.zeros_like(r) if g is None else g.to(r.dtype) for g, r in zip(grads, results, strict=True))
        found: list[Tensor | None] = [None] * len(inputs)
        for i, t in zip(wanted, vjp(cotangents), strict=True):
            found[i] = t
        return found

    # -- autograd: what the registered op and the eager fast path share ---------------------------------------------------------------------

    def save(self, ctx: Any, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], spec: Spec, needs: Sequence[bool]) -> None:
        ctx.save_for_backward(*self.kept(inputs, spec), *(outputs[i] for i in self.saved))
        # slots bring the map's gradient, so they lead nowhere where the map needs none
        ctx.mark_non_differentiable(*outputs[self.differentiable - (0 if any(needs[: self.maps]) else self.slots) :])
        ctx.set_materialize_grads(False)

    def kept(self, inputs: Sequence[Tensor | None], spec: Spec) -> list[Tensor | None]:
        """The inputs, None for those that no backward formula reads."""
        return [None if i == self.residual and spec.activation == "none" else t for i, t in enumerate(inputs)]

    def differentiate(
        self, ctx: Any, grads: Sequence[Tensor | None], spec: Spec, needs: Sequence[bool], launch: Callable[..., Sequence[Tensor | None]]
    ) -> list[Tensor | None]:
        """One gradient or None per input, by launch(grads, inputs, saved, needs)."""
        count, tensors = len(self.inputs), ctx.saved_tensors
        grads, needs = grads[: self.differentiable], [bool(need) for need in needs[:count]]
        if all(g is None for g in grads):
            return [None] * count
        return self.gradients(grads, tensors[:count], tensors[count:], spec, needs, launch)

    def gradients(
        self, grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], saved: Sequence[Tensor], spec: Spec, needs: list[bool],
        launch: Callable[..., Sequence[Tensor | None]],
    ) -> list[Tensor | None]:  # fmt: skip
        passed = self.residual if self.residual is not None and spec.activation == "none" else None
        asked = [need and i != passed for i, need in enumerate(needs)]
        found = self._only(asked, launch(grads, inputs, saved, asked) if any(asked) else asked)
        if passed is not None and needs[passed]:
            found[passed] = grads[0]
        return found

    @staticmethod
    def _only(needs: Sequence[bool], found: Sequence[Any]) -> list[Any]:
        return [f if need else None for f, need in zip(found, needs, strict=True)]

    # -- the registered ops ----------------------------------------------------------------------------------------------------------------

    def _decode(self, text: str) -> Any:
        return decode(self.spec, text)

    def _op_impl(self, *args: Any) -> Any:
        return _schema_result(self.run(args[:-1], self._decode(args[-1])))

    def _op_fake(self, *args: Any) -> Any:
        return _schema_result(self.fake(*args[:-1], self._decode(args[-1])))

    def _split(self, args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Tensor arguments of the backward op -> (grads, inputs, saved)."""
        first, second = self.differentiable, self.differentiable + len(self.inputs)
        return args[:first], args[first:second], args[second:]

    def _op_backward_impl(self, *args: Any) -> Any:
        *tensors, spec, needs = args
        grads, inputs, saved = self._split(tensors)
        settled = []
        spec = self._decode(spec)
        for i, (f, need) in enumerate(zip(self.run_backward(grads, inputs, saved, spec, needs), needs, strict=True)):
            if not need or f is None:
                settled.append(inputs[0].new_empty(0))
                continue
            # an op may not return its argument, and must return the strides that its fake promised
            expected = self.gradient_like(i, inputs, spec)
            same = f.dtype == expected.dtype and f.stride() == expected.stride() and all(f is not a for a in tensors)
            settled.append(f if same else expected.copy_(f))
        return _schema_result(settled)

    def _fake_backward(self, *args: Any) -> Any:
        *tensors, spec, needs = args
        inputs, spec = self._split(tensors)[1], self._decode(spec)
        return _schema_result([self.gradient_like(i, inputs, spec) if need else inputs[0].new_empty(0) for i, need in enumerate(needs)])

    def gradient_like(self, index: int, inputs: Sequence[Any], spec: Any) -> Tensor:
        """Empty, as the backward op returns the gradient of that input."""
        return torch.empty_like(inputs[index])

    def _op_setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec = inputs
        self.save(ctx, tensors, _tuple(output), self._decode(ctx.spec), ctx.needs_input_grad)

    def _op_autograd(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        def launch(grads: Any, inputs: Any, saved: Any, needs: Any) -> Any:
            return _tuple(self.op_backward(*grads, *inputs, *saved, ctx.spec, needs))

        return (*self.differentiate(ctx, grads, self._decode(ctx.spec), ctx.needs_input_grad, launch), None)

    def _op_double_setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.spec, ctx.needs = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    def _op_double(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grads, inputs, saved = self._split(ctx.saved_tensors)
        spec = self._decode(ctx.spec)
        primal = [*grads, *inputs]
        wanted = [i for i, t in enumerate(primal) if t is not None and ctx.needs_input_grad[i]]
        asked = [i for i, need in enumerate(ctx.needs) if need and cotangents[i] is not None]
        result: list[Tensor | None] = [None] * (len(primal) + len(saved) + 2)
        if wanted and asked:

            def first_order(*chosen: Tensor) -> tuple[Tensor | None, ...]:
                full = list(primal)
                for i, t in zip(wanted, chosen, strict=True):
                    full[i] = t
                found = self._reference_backward(full[: len(grads)], full[len(grads) :], spec, ctx.needs)
                return tuple(found[i] for i in asked)

            _, vjp = torch.func.vjp(first_order, *(primal[i] for i in wanted))  # type: ignore[misc]
            for i, t in zip(wanted, vjp(tuple(cotangents[i] for i in asked)), strict=True):
                result[i] = t
        return tuple(result)


def _function(family: Family) -> type[torch.autograd.Function]:
    """The eager fast path: ctx-first, because `setup_context` costs 35 us a call."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, spec: Spec, *inputs: Tensor | None) -> Any:
            outputs = family.run(inputs, spec)
            ctx.spec = spec
            family.save(ctx, inputs, outputs, spec, ctx.needs_input_grad[1:])
            return family._results(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            def launch(grads: Any, inputs: Any, saved: Any, needs: Any) -> Any:
                if torch.is_grad_enabled():  # create_graph=True
                    return _tuple(family.op_backward(*grads, *inputs, *saved, encode(ctx.spec), needs))
                return family.run_backward(grads, inputs, saved, ctx.spec, needs)

            return (None, *family.differentiate(ctx, grads, ctx.spec, ctx.needs_input_grad[1:], launch))

    Fused.__name__ = Fused.__qualname__ = f"tritattn_{family.name}"
    return Fused


def _schema_result(results: Sequence[Tensor]) -> Any:
    """What a registered op returns: in a schema, "(Tensor)" is a Tensor and not a tuple of one."""
    return tuple(results) if len(results) > 1 else results[0]


def _tuple(result: Any) -> tuple[Tensor, ...]:
    """And back."""
    return (result,) if isinstance(result, Tensor) else result


def _device_guard(x: Tensor) -> Any:
    """Python kernels get no device guard from the dispatcher."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def _meet_dtensors() -> Any:
    """The class of sharded tensors, with the ops' rules for it registered; None where nobody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return None
    from ._sharding import register

    register(tuple(_families.values()))
    return module.DTensor


def _met_dtensors() -> bool:
    return _meet_dtensors() is not None


_met_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]
