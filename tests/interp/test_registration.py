"""The registered ops as torch sees them: opcheck, strides that the fakes promise, gradients of gradients, torch.compile."""

import pytest
import torch
from cases import BY_NAME, LAYOUTS, MAIN, check, eager, fused, make, run, y_like
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tritattn import _library
from tritattn._relay import RelaySqueeze

SHAPE = (2, 3, 2, 4)
# rows of the table that together run every registered op, forward and backward
REPRESENTATIVES = [
    *("se", "eca-mlp", "eca-circular", "sse", "scse-max", "cbam-eval", "gate-whole", "gate-channel", "channel_statistics", "spatial_statistics"),
    *("gc-both", "gsop", "gsop-fused", "shuffle", "splat", "splat-groups", "triplet-even", "ge"),
    *("aff", "blend", "se-before", "eca-mlp-before", "se-trained"),
]


class Calls(TorchDispatchMode):
    """Keeps every call of an op of ours: (op, arguments, results). Under a dispatch mode all calls take the registered ops."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "tritattn":
            self.made.append((func, args, result if isinstance(result, tuple) else (result,)))
        return result


def recorded(op, inputs, activation="none"):
    with Calls() as calls:
        check(op, inputs, activation)
    return calls.made


def test_representatives_run_every_registered_op():
    made = {func._schema.name for name in REPRESENTATIVES for func, *_ in recorded(BY_NAME[name], make(BY_NAME[name], SHAPE))}
    assert made == {f"tritattn::{name}{suffix}" for name in _library._families for suffix in ("", "_backward")}


CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]  # all that there are


@pytest.mark.parametrize(("name", "layout"), [(name, ("contiguous", "channels_last")[i % 2]) for i, name in enumerate(REPRESENTATIVES)])
def test_opcheck(name, layout, monkeypatch):
    # opcheck compares all results, and slots hold no values
    monkeypatch.setattr(RelaySqueeze, "slot", staticmethod(lambda like, dtype=None: like.new_zeros((), dtype=dtype).expand(like.shape)))
    op = BY_NAME[name]
    inputs = make(op, SHAPE, layout=layout, residual=op.epilogue, dtype=torch.float64)
    calls = {func: args for func, args, _ in recorded(op, inputs, "silu" if op.epilogue else "none")}
    for func, args in calls.items():
        family = _library._families[func._schema.name.removeprefix("tritattn::").removesuffix("_backward")]
        names = [*(["g"] * family.differentiable if func is family.op_backward else []), *family.inputs]
        with_gradients = [name not in ("bn_mean", "bn_var") for name in names] + [False] * len(args)

        def leaf(t, need):
            return t.detach().requires_grad_(need) if isinstance(t, torch.Tensor) else t

        checks = CHECKS
        if func is family.op_backward and torch.__version__ < (2, 13):
            # torch 2.11 cannot trace second derivatives of its own convolution and linear layers with symbolic sizes
            checks = [check for check in CHECKS if check != "test_aot_dispatch_dynamic"]
        torch.library.opcheck(func, tuple(leaf(t, need) for t, need in zip(args, with_gradients, strict=False)), test_utils=checks)


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for i, name in enumerate(REPRESENTATIVES) for j, layout in enumerate(LAYOUTS) if (i + j) % 2 or j < 2]
)
def test_strides(name, layout):
    """x in `layout`, residual and g in every other: the strides that the fakes promise, and the right numbers."""
    op, layouts = BY_NAME[name], list(LAYOUTS)
    for i, other in enumerate(layouts):
        inputs = make(op, SHAPE, layout=layout, residual=op.epilogue)
        if op.epilogue:
            inputs.residual = LAYOUTS[other](inputs.residual.detach()).requires_grad_()
        y = eager(op, inputs.x, inputs.to(torch.float32).params)
        # every pair of (x, residual), (x, g) and (residual, g) comes up
        g = LAYOUTS[layouts[(layouts.index(layout) + i) % len(layouts)]]
        inputs.g[y.shape] = g(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        made = recorded(op, inputs, "relu" if op.epilogue else "none")
        for func, args, results in made:
            with FakeTensorMode() as mode:
                fakes = func(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args))
            for real, fake in zip(results, fakes if isinstance(fakes, tuple) else (fakes,), strict=True):
                for of in (torch.Tensor.size, torch.Tensor.stride, torch.Tensor.storage_offset, lambda t: t.dtype):
                    assert of(real) == of(fake), (func, other)
        if op.epilogue:
            with torch.no_grad():
                assert fused(op, inputs.x, inputs.params, inputs.residual).stride() == y_like(op, inputs.x).stride()


# -- derivatives ------------------------------------------------------------------------------------------------------------------------------


# torch's hardsigmoid, ese's gate by default, has no second derivative
TWICE = ["coord", "se", "ese-sigmoid", "eca", "sse", "scse", "channel_attention", "spatial_attention", "cbam-train", *REPRESENTATIVES[2:]]


@pytest.mark.parametrize("name", TWICE)
def test_gradients_by_differences(name):
    op = BY_NAME[name]
    inputs = make(op, (1, 2, 2, 3), dtype=torch.float64, residual=op.epilogue, seed=2)
    names, tensors = zip(*((n, t) for n, t in inputs.tensors().items() if not n.startswith("norm.")), strict=True)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        params = {n: given.get(n, value) for n, value in inputs.params.items()}
        return fused(op, given["x"], params, given.get("residual"), "gelu" if op.epilogue else "none")

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


# -- torch.compile ----------------------------------------------------------------------------------------------------------------------------


def compiled(op, activation, **options):
    torch._dynamo.reset()

    def function(x, params, residual):
        return 2 * fused(op, torch.relu(x), params, residual, activation)

    return function, torch.compile(function, fullgraph=True, **options)


def both(op, shapes, **options):
    """Value and gradients, eager and compiled, for each shape in turn."""
    activation = "relu" if op.epilogue else "none"
    function, call = compiled(op, activation, **options)
    for shape in shapes:
        inputs = make(op, shape, residual=op.epilogue)
        wanted, got = (
            run(lambda op, x, params, residual, activation, f=f: f(x, params, residual), op, inputs.to(torch.float32)) for f in (function, call)
        )
        for name, t in wanted.items():
            torch.testing.assert_close(got[name], t, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("op", MAIN, ids=str)
def test_compiled(op):
    both(op, [SHAPE], backend="aot_eager")


@pytest.mark.parametrize("name", ["cbam-train", *REPRESENTATIVES])
def test_compiled_with_dynamic_shapes(name):
    both(BY_NAME[name], [(2, 3, 4, 5), (3, 3, 6, 7)], backend="aot_eager", dynamic=True)


def test_inductor():
    """One graph with an op of every family."""
    torch._dynamo.reset()
    chosen = [BY_NAME[name] for name in ("se", "sse", "scse", "cbam", "gate-whole", "channel_attention-gate", "spatial_statistics")]
    everything = {op.name: make(op, SHAPE, seed=i) for i, op in enumerate(chosen)}

    def network(x, params):
        for op in chosen:
            y = fused(op, torch.relu(x + 1), params[op.name])
            x = x * y.mean(1, keepdim=True) if y.shape != x.shape else y
        return x

    def gradients(call):
        x = everything["se"].x.detach().requires_grad_()
        params = {name: inputs.params for name, inputs in everything.items()}
        tensors = [x, *(t for inputs in everything.values() for n, t in inputs.tensors().items() if n != "x")]
        y = call(x, params)
        return [y, *torch.autograd.grad(y.square().sum(), tensors)]

    torch.testing.assert_close(gradients(torch.compile(network, fullgraph=True)), gradients(network))
