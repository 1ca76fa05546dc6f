"""What torch.compile's code for an H200 moves, found without a GPU. `python -m perf.inductor` is a process of its own: it replaces private functions.

A graph is traced on the CPU in fake tensors, forward and backward, then moved to a CUDA device that is only described, and lowered by Inductor to
the code that it would run there. That code is executed with its kernels replaced by recorders and its buffers by meta tensors: a recorder counts
every load and store site of its kernel at the size of its buffer, or of the kernel's iteration space where that is smaller.

Reads JSON lines {"case": ...} on standard input, writes a JSON line for each on standard output.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .cases import Case, Inputs
from .counting import Counter, MapOrder, Moved, map_order
from .providers import build, compile_options

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=139 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=60 << 20,
    gcnArchName="",
    is_integrated=0,
)
CUDA = torch.device("cuda", 0)


class DescribedDriver:
    """Triton's view of a GPU that is not there."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": H200.shared_memory_per_block_optin, "multiprocessor_count": H200.multi_processor_count, "warpSize": 32}

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


def describe_gpu() -> None:
    """Make torch believe in the GPU of H200, as far as generating code goes."""
    from torch._dynamo import device_interface
    from torch._subclasses import fake_tensor
    from triton.runtime.driver import driver

    driver.set_active(DescribedDriver())
    torch.version.cuda = "13.0"
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_device_name": H200.name,
        "is_bf16_supported": True,
        "_lazy_init": None,
        "synchronize": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    # a torch built for CUDA would ask the driver for its stream and for a context
    torch.accelerator.is_available = lambda: False
    fake_tensor.init_gpu_context = lambda device: None  # type: ignore[assignment]
    torch.cuda.random._lazy_init = torch.cuda._lazy_init  # type: ignore[attr-defined]
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    # the method guards the device, which is not there; the operator behind it does not
    torch.Tensor.copy_ = lambda t, source, non_blocking=False: torch.ops.aten.copy_.default(t, source, non_blocking)  # type: ignore
    interface = device_interface.CudaInterface
    for name in ("is_available", "device_count", "current_device", "get_device_properties", "set_device", "synchronize"):
        setattr(interface, name, staticmethod(getattr(torch.cuda, name)))
    interface.Worker.get_device_properties = staticmethod(torch.cuda.get_device_properties)  # type: ignore[method-assign]
    interface.Worker.current_device = staticmethod(torch.cuda.current_device)  # type: ignore[method-assign]
    interface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[method-assign]
    interface.get_raw_stream = staticmethod(lambda device: 0)  # type: ignore[method-assign]
    interface.is_triton_capable = staticmethod(lambda device=None: True)  # type: ignore[method-assign]
    interface.raise_if_triton_unavailable = staticmethod(lambda device=None: None)  # type: ignore[method-assign]
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)


@dataclasses.dataclass
class Graph:
    module: torch.fx.GraphModule
    inputs: list[tuple[Any, ...]]  # (size, stride, dtype)
    backward: bool


def trace(case: Case) -> list[Graph]:
    """The graphs that Inductor gets for one training step."""
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses import FakeTensorMode

    found: list[Graph] = []

    def keep(module: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        described = [(tuple(t.shape), t.stride(), t.dtype) for t in inputs]
        found.append(Graph(copy.deepcopy(module), described, options.get("is_backward", False)))

        def run(arguments: list[Any]) -> Any:
            return module(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = Inputs(case, "cpu")
        call = build("eager", case, inputs.weights, "cpu")
        call.train(True)

        def backend(module: torch.fx.GraphModule, examples: Any) -> Any:
            return compile_fx(module, examples, inner_compile=keep)  # type: ignore[arg-type]

        compiled = torch.compile(call.run, backend=backend, fullgraph=True, dynamic=False)
        y = compiled(inputs.x[0], inputs.residual[0])
        torch.autograd.grad(y, inputs.wanted(0, call.parameters), inputs.g[0])
    return found


def lower(graph: Graph, layout: str) -> str:
    """Inductor's code for the graph on the described GPU."""
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import record_original_output_strides
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    module = graph.module
    for node in module.graph.nodes:
        node.args = tree_map_only(torch.device, lambda _: CUDA, node.args)
        node.kwargs = tree_map_only(torch.device, lambda _: CUDA, node.kwargs)
        for known in ("val", "tensor_meta"):
            node.meta.pop(known, None)
    module.recompile()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty_strided(size, stride, dtype=dtype, device=CUDA) for size, stride, dtype in graph.inputs]
    view_to_reshape(module)
    FakeTensorProp(module, mode=mode).propagate_dont_convert_inputs(*inputs)
    record_original_output_strides(module)
    with torch.no_grad(), V.set_fake_mode(mode), tracing(TracingContext(mode)), config.patch(compile_options(layout)):
        post_grad_passes(module, False)
        lowering = GraphLowering(module, example_inputs=inputs, shape_env=mode.shape_env, is_backward=graph.backward)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            code: Any = lowering.codegen()
    return code[0].value


class Recorder:
    """Stands for a generated kernel: a launch counts what its source loads and stores."""

    def __init__(self, source: str, moved: Moved, of_map: MapOrder):
        self.moved, self.of_map = moved, of_map
        signature = re.search(r"^def (\w+)\((.*)\):$", source, re.MULTILINE)
        assert signature is not None
        self.name = signature[1]
        self.parameters = [parameter.split(":")[0].strip() for parameter in signature[2].split(",")]
        self.sites = re.findall(r"tl\.(load|store|atomic_\w+)\((\w+) \+", source)
        self.iterations = math.prod(int(size) for size in re.findall(r"^ +[xyzr]\d?_?numel = (\d+)$", source, re.MULTILINE))

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.moved.launches += 1
        self.moved.names.append(self.name)
        buffers = dict(zip(self.parameters, args, strict=False))
        for kind, name in self.sites:
            buffer = buffers[name]
            size = min(buffer.numel(), self.iterations) * buffer.element_size()
            directions = {"load": ("read",), "store": ("write",)}.get(kind, ("read", "write"))
            for direction in directions:
                self.moved.add(direction, self.of_map(buffer.numel()), size)


def execute(source: str, graph: Graph, of_map: MapOrder) -> Moved:
    """Run generated code with recorders for kernels and meta tensors for buffers; operators that it calls are counted as dispatched."""
    from unittest import mock

    from torch._inductor.async_compile import AsyncCompile

    counter = Counter(of_map)

    def recorder(_: Any, name: str, kernel: str, **options: Any) -> Recorder:
        return Recorder(kernel, counter.moved, of_map)

    def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def reinterpret(t: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
        return t.as_strided(size, stride, t.storage_offset() + offset)

    with mock.patch.object(AsyncCompile, "triton", recorder), mock.patch.object(AsyncCompile, "wait", lambda *args: None):
        namespace: dict[str, Any] = {"__name__": "generated", "__file__": "generated.py"}
        exec(compile(source, "generated.py", "exec"), namespace)
        namespace.update(empty_strided_cuda=allocate, reinterpret_tensor=reinterpret, assert_alignment=lambda *args: None)
        arguments = [allocate(*described) for described in graph.inputs]
        with torch.no_grad(), counter:
            namespace["call"](arguments)
    return counter.moved


def count(case: Case) -> dict[str, Moved]:
    """Mode -> what it moves."""
    of_map = map_order(case)
    return {"bwd" if graph.backward else "fwd": execute(lower(graph, case.layout), graph, of_map) for graph in trace(case)}


def main() -> None:
    describe_gpu()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: dict[str, Any] = {mode: dataclasses.asdict(moved) for mode, moved in count(Case(**asked["case"])).items()}
        except Exception as error:
            answer = {"unavailable": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
