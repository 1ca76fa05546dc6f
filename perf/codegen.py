"""Kernels compiled offline, for GPUs that need not be here: registers, spills, shared memory, and how wide the map is loaded and stored.

There is no list of kernels and signatures to keep in step: the ops run on meta tensors with Triton's launcher replaced by a recorder, and what it
records is compiled.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .cases import DTYPES, LAYOUTS, Case, Inputs, all_cases
from .counting import map_order
from .environment import environment
from .ops import OPS
from .providers import build
from .schema import CODEGEN, Writer
from .shapes import SETS
from .summary import print_codegen

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
# what a program may take
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_COLUMNS = 512


@dataclasses.dataclass
class Launch:
    """A kernel as an op launches it. maps: names of its pointers to maps of x's or y's size."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    maps: frozenset[str]
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def cooperative(self) -> bool:
        """Whether its programs wait for each other, as routing has them do on NVIDIA's GPUs alone."""
        return bool(self.kwargs.get("launch_cooperative_grid"))

    @property
    def bound(self) -> dict[str, Any]:
        names = self.kernel.signature.parameters
        return self.kernel.signature.bind(*self.args, **{k: v for k, v in self.kwargs.items() if k in names}).arguments

    @property
    def config(self) -> str:
        """Everything that the compiler sees as a constant, and of each size what it is told about its divisibility."""
        parts = []
        for parameter in self.kernel.params:
            value = self.bound.get(parameter.name)
            if parameter.is_constexpr:
                parts.append(f"{parameter.name}={value}")
            elif isinstance(value, int) and not isinstance(value, bool) and (value == 1 or value % 16 == 0):
                parts.append(f"{parameter.name}={value}" if value == 1 else f"{parameter.name}%16=0")
            elif value is None:
                parts.append(f"{parameter.name}=None")
        options = [f"{k}={v}" for k, v in self.kwargs.items() if k not in self.kernel.signature.parameters]
        return " ".join(parts + options)


@contextmanager
def recording(case: Case) -> Iterator[list[Launch]]:
    """Inside the block tritattn takes its kernels on any device, and launches are recorded instead of made."""
    from triton.runtime.jit import JITFunction

    from tritattn import _library

    found: list[Launch] = []
    of_map = map_order(case)

    def whole(t: torch.Tensor) -> bool:
        # workspaces of map order are not accessed as maps are
        return of_map(t.numel()) and t.numel() in (of_map.map_numel, case.op.block.wide * of_map.map_numel)

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch(kernel, args, kwargs, frozenset(), case.layout, case.dtype)
        tensors = {name: value for name, value in launch.bound.items() if isinstance(value, torch.Tensor)}
        found.append(dataclasses.replace(launch, maps=frozenset(n for n, t in tensors.items() if whole(t))))

    with mock.patch.object(_library, "_device_problem", lambda device: None), mock.patch.object(JITFunction, "run", record):
        yield found


def launches(case: Case) -> list[Launch]:
    """The kernels of one training step of the case."""
    from tritattn import ops

    inputs = Inputs(case, "meta")
    call = build("tritattn", case, inputs.weights, "meta")
    call.train(True)
    x, g = inputs.x[0], inputs.g[0]
    with recording(case) as found:
        y = call.run(x, inputs.residual[0])
        torch.autograd.grad(y, inputs.wanted(0, call.parameters), g)
        if case.op_name == "se":  # and the kernel that no block of the harness needs: a gate with a weight for every element
            weights = torch.empty_like(g, requires_grad=True)
            torch.autograd.grad(ops.gate(x, weights), [x, weights], g)
    return found


def compile_for(launch: Launch, target: str) -> Any:
    """The launch's kernel, compiled for the target with the constants and attributes that a launch there would have."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, gpu = launch.kernel, GPUTarget(*TARGETS[target])
    backend = make_backend(gpu)
    kwargs = {**launch.kwargs, "debug": False}
    if gpu.backend == "hip":
        kwargs.pop("maxnreg", None)  # a matter of NVIDIA's assembler
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=options.__dict__)
    compiled.arguments = [name for name, kind in signature.items() if kind != "constexpr"]
    return compiled


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Raises RuntimeError for a kernel that the device has no room for, of which the assembler knows nothing: it would not be launched."""
    shared, tensor_memory = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
    if shared > SHARED_BYTES[target] or tensor_memory > TENSOR_COLUMNS:
        raise RuntimeError(f"too large: {shared} bytes of shared memory, {tensor_memory} columns of tensor memory")
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found, f"no {name} in the assembly"
            return int(found[1])

        # a vector register is 4 bytes in each lane; scalar registers spill into vector registers
        return {"registers": field("vgpr_count"), "spill_bytes": 4 * field("vgpr_spill_count"), "shared_bytes": shared}
    log = _assemble(compiled.asm["ptx"], TARGETS[target][1])
    registers, spills = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers and spills, log
    return {"registers": int(registers[1]), "spill_bytes": int(spills[1]) + int(spills[2]), "shared_bytes": shared}


def _assemble(ptx: str, capability: Any) -> str:
    """What NVIDIA's assembler says about a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert architecture
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture[1]}", file.name, "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


_SIZES = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
_NVIDIA = re.compile(r"(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)")
_ASYNC = re.compile(r"cp\.async\.\w+\.shared\.global .*?, (0x[0-9a-f]+|\d+)")
_AMD = re.compile(r"raw\.ptr\.buffer\.(load|store)\.(?:v(\d+))?(?:i|f|bf)(\d+)")
_PLAIN = re.compile(r"(?:= (?:tail )?|\s)(load|store) (?:volatile )?(?:<(\d+) x )?(\w+)>?[ ,]")


def _access(line: str) -> tuple[str, int] | None:
    """("load" or "store", bits) of a line of LLVM's language that reaches global memory."""
    if found := _NVIDIA.search(line):
        return ("load" if found[1] == "ld" else "store"), int(found[2] or 1) * int(found[3])
    if found := _ASYNC.search(line):
        return "load", 8 * int(found[1], 0)
    if found := _AMD.search(line):
        return found[1], int(found[2] or 1) * int(found[3])
    if "addrspace(1)" in line and (found := _PLAIN.search(line)):
        size = _SIZES.get(found[3]) or (int(found[3][1:]) if re.fullmatch(r"i\d+", found[3]) else 0)
        return found[1], int(found[2] or 1) * size
    return None


def widths(llir: str, arguments: Sequence[str], maps: frozenset[str]) -> dict[str, int | None]:
    """The narrowest access to a map, in bits, by following every address back to the argument that it came from."""
    body = llir[llir.index("define ") :]
    body = body[: body.index("\n}")]
    defined = {found[1]: found[2] for found in re.finditer(r"^\s+(%[\w.]+) = (.*)$", body, re.MULTILINE)}
    pointers = re.compile(r"ptr addrspace\([18]\)(?: \w+)* (%[\w.]+)")

    def origins(name: str, seen: set[str]) -> set[str]:
        if name in seen:
            return set()
        seen.add(name)
        if name not in defined:
            number = name[1:]
            return {arguments[int(number)]} if number.isdigit() and int(number) < len(arguments) else set()
        text = defined[name]
        if text.startswith("phi"):
            sources = re.findall(r"\[ (%[\w.]+),", text)
        elif text.startswith("select"):
            sources = pointers.findall(text)
        else:
            sources = pointers.findall(text)[:1]
        return set().union(*(origins(source, seen) for source in sources))

    narrowest: dict[str, int] = {}
    for line in body.splitlines():
        access = _access(line)
        if access is None:
            continue
        addresses = pointers.findall(line.split('",')[-1] if "asm " in line else line)
        if any(origins(address, set()) & maps for address in addresses):
            kind, bits = access
            narrowest[kind] = min(bits, narrowest.get(kind, bits))
    return {"map_load_bits": narrowest.get("load"), "map_store_bits": narrowest.get("store")}


def identity(launch: Launch, target: str) -> dict[str, Any]:
    return {"kernel": launch.name, "config": launch.config, "layout": launch.layout, "dtype": launch.dtype, "target": target}


def row(launch: Launch, target: str) -> dict[str, Any]:
    columns = identity(launch, target)
    try:
        compiled = compile_for(launch, target)
        return {**columns, **resources(compiled, target), **widths(compiled.asm["llir"], compiled.arguments, launch.maps), "status": "ok"}
    except (ImportError, AttributeError, TypeError) as error:  # another Triton than this was written for
        return {**columns, "status": f"unavailable: {type(error).__name__}: {error}".splitlines()[0][:200]}
    except Exception as error:
        return {**columns, "status": f"error: {type(error).__name__}: {error}".splitlines()[0][:200]}


def shipped() -> set[str]:
    """Names of all kernels of the package."""
    from tritattn.ops._launch import _kernels

    return {name for name in vars(_kernels()) if name.endswith("_kernel")}


def collect(quick: bool, op_names: Sequence[str] = OPS, dtypes: Sequence[str] = tuple(DTYPES)) -> list[Launch]:
    """Launches to compile, each kernel, configuration, dtype and layout once; with `quick` one per kernel and layout."""
    found: dict[tuple[str, ...], Launch] = {}
    for case in all_cases(op_names, SETS, dtypes, LAYOUTS):
        for launch in launches(case):
            key = (launch.name, launch.layout) if quick else (launch.name, launch.layout, launch.dtype, launch.config)
            found.setdefault(key, launch)
        kernels = {launch.name: launch for launch in found.values()}
        # programs wait for each other where rows are short, which is a matter of one layout
        if quick and kernels.keys() >= shipped() and len(found) == sum(1 if launch.cooperative else 2 for launch in kernels.values()):
            break
    return list(found.values())


_work: list[tuple[Launch, str]] = []


def _job(index: int) -> dict[str, Any]:
    return row(*_work[index])


def compile_all(found: Sequence[Launch], targets: Sequence[str], writer: Writer, console: Console) -> None:
    """Write a row for each launch and target that the writer has none for."""
    global _work
    wanted = [(launch, target) for target in targets for launch in found if TARGETS[target][0] == "cuda" or not launch.cooperative]
    _work = [(launch, target) for launch, target in wanted if not writer.has(identity(launch, target))]
    columns = (TextColumn("codegen {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # compilers take a core each and share nothing; forked, because launches hold kernels that cannot be sent
    pool = multiprocessing.get_context("fork").Pool(os.cpu_count())
    with pool, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(_work))
        for made in pool.imap(_job, range(len(_work))):
            writer.write(made)
            progress.update(task, advance=1, description=made["kernel"])


def codegen(
    path: str | os.PathLike[str], console: Console, *, quick: bool = False, op_names: Sequence[str] = OPS, dtypes: Sequence[str] = tuple(DTYPES),
    targets: Sequence[str] = tuple(TARGETS), resume: bool = True,
) -> Path:  # fmt: skip
    found = collect(quick, op_names, dtypes)
    with Writer(path, CODEGEN, environment("cpu"), resume=resume) as writer:
        compile_all(found, targets, writer, console)
        for name in sorted(shipped() - {launch.name for launch in found}) if op_names == OPS else ():
            writer.write({"kernel": name, "config": "", "layout": "", "dtype": "", "target": "", "status": "not reached by any op of the harness"})
        print_codegen(writer.rows, console)
    return Path(path)
