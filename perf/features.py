"""What every block does, one line each, found by running it: the table of the README.

The kernels run in Triton's interpreter, in a process of its own (`TRITON_INTERPRET=1 python -m perf.features`, JSON lines in and out), the CPU
path in another. A cell says "yes" where the results agreed with fp64, else what went wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import tritattn
from tritattn import _library

from . import interpret, traffic
from .blocks import BLOCKS
from .cases import DTYPES, LAYOUTS, Case, make_case
from .counting import Moved, map_order
from .environment import environment
from .runner import status_of
from .schema import FEATURES, Writer, read
from .shapes import Site
from .sweep import Bench

# where traffic is counted: rows of whole sectors
SITE = Site(1, 32, 16, 32, 4)
# planes that fit on chip in either layout; a map whose (mean, maximum) of columns are not of its order
SITES = dict.fromkeys(("shuffle", "simam"), Site(1, 64, 8, 8, 4)) | {"triplet": Site(1, 32, 32, 32, 4)}
# hidden maps too small to count as maps
SITES |= dict.fromkeys(("bam", "mscam", "aff", "iaff"), Site(1, 32, 16, 32, 2))
TRACED = Site(1, 64, 16, 16, 4)


def counted_case(op_name: str, layout: str) -> Case:
    """d: of GSoP's reduced map, small enough not to count."""
    return make_case(op_name, "bf16", layout, traffic.BATCH, SITES.get(op_name.split("+")[0], SITE), d=2)


def _numbers(case: Case, mode: str) -> str:
    """Right within the case's tolerance, or where torch's own layers round more, within twice the error of eager code."""
    bench = Bench(case, "cpu")
    with torch.autograd.set_multithreading_enabled(False):
        error, right = bench.error(mode, bench.call("tritattn", mode)(0))
        right = right or error <= 2 * bench.error(mode, bench.call("eager", mode)(0))[0]
    return "yes" if right else f"off by {error:.1e}"


class _Module(nn.Module):
    """A case's call, in inference, as what is compiled or exported."""

    def __init__(self, bench: Bench):
        super().__init__()
        self.run = bench.provider("tritattn").run

    def forward(self, x: Any) -> Tensor:
        return self.run(x, None)


def _compiled(case: Case) -> str:
    bench = Bench(case, "cpu")
    call, inputs = bench.provider("tritattn"), bench.inputs
    call.train(True)
    torch._dynamo.reset()
    y = torch.compile(call.run, backend="aot_eager", fullgraph=True)(inputs.x[0], None)
    grads = torch.autograd.grad(y, inputs.wanted(0, call.parameters), inputs.g[0])
    error, right = bench.error("fwd_bwd", (y, grads))
    return "yes" if right else f"off by {error:.1e}"


def _exported(case: Case) -> str:
    bench = Bench(case, "cpu")
    bench.provider("tritattn").train(False)
    x = tuple(t.detach() for t in bench.inputs.x[0]) if isinstance(bench.inputs.x[0], tuple) else bench.inputs.x[0].detach()
    with torch.no_grad():
        y = torch.export.export(_Module(bench), (x,)).module()(x)
    error, right = bench.error("inference", y)
    return "yes" if right else f"off by {error:.1e}"


CHECKS: dict[str, Callable[[Case], Any]] = {
    "forward": lambda case: _numbers(case, "fwd"),
    "backward": lambda case: _numbers(case, "bwd"),
    "compile": _compiled,
    "export": _exported,
    "moved": lambda case: {mode: dataclasses.asdict(moved) for mode, moved in interpret.count(case, traffic.TILES_FOR).items()},
}


def _answer(asked: dict[str, Any]) -> Any:
    try:
        return CHECKS[asked["check"]](Case(**asked["case"]))
    except Exception as error:
        return status_of(error)


def main() -> None:
    if _library.INTERPRET:
        interpret.warm_up()
    for line in sys.stdin:
        print(json.dumps({"answer": _answer(json.loads(line))}), flush=True)


def checkpoints(name: str) -> str:
    """Whose blocks convert and load, from the table that both use."""
    from tritattn.peers import PEERS

    module = type(tritattn.nn.create(name, 64, device="meta"))
    kinds = {kind.__name__ for kind in module.__mro__} | {module.__name__}
    return ", ".join(dict.fromkeys(peer.source.split(",")[0].split(" (")[0] for peer in PEERS if peer.module in kinds))


def names() -> list[str]:
    """The blocks of the harness that are modules too."""
    return [name for name in BLOCKS if name in tritattn.nn.available()]


def row(name: str, ask: Callable[[str, Case], Any], ask_cpu: Callable[[str, Case], Any], ask_inductor: Callable[[Case], Any]) -> dict[str, Any]:
    def case(dtype: str, layout: str = "contiguous") -> Case:
        return make_case(name, dtype, layout, traffic.BATCH, TRACED)

    found: dict[str, Any] = {"op": name, "module": type(tritattn.nn.create(name, 64, device="meta")).__name__, "checkpoints": checkpoints(name)}
    checks: dict[tuple[str, str, str], Any] = {}
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for direction in ("forward", "backward"):
                checks[direction, layout, dtype] = ask(direction, case(dtype, layout))
    for axis, columns in enumerate((("forward", "backward"), tuple(LAYOUTS), tuple(DTYPES))):
        for column in columns:
            bad = [result for key, result in checks.items() if key[axis] == column and result != "yes"]
            found[column] = "; ".join(dict.fromkeys(map(str, bad))) or "yes"
    for check in ("compile", "export"):
        found[check] = ask(check, case("fp32"))
    cpu = [ask_cpu(direction, case("fp32")) for direction in ("forward", "backward")]
    found["cpu"] = "; ".join(dict.fromkeys(result for result in cpu if result != "yes")) or "yes"
    small = counted_case(name, "contiguous")
    bars, floors = small.op.bar_u, small.op.floor_u
    counted = {layout: ask("moved", counted_case(name, layout)) for layout in LAYOUTS}
    others = {"eager": traffic.eager(small), "compile": ask_inductor(dataclasses.replace(small, n=traffic.TILES_FOR))}
    for index, mode in enumerate(("fwd", "bwd")):
        found.update({f"bar_{mode}": bars[index], f"floor_{mode}": floors[index]})
        ours = [Moved(**moved[mode]) for moved in counted.values() if mode in moved]
        if len(ours) == len(LAYOUTS):
            map_bytes = map_order(small).map_numel * small.itemsize
            found[f"u_{mode}"] = max(moved.in_u(map_bytes)["total_u"] for moved in ours)
            found[f"launches_{mode}"] = max(moved.launches for moved in ours)
        for provider, moved in others.items():
            if mode in moved:
                launches = moved[mode].launches if isinstance(moved[mode], Moved) else moved[mode]["launches"]
                found[f"{provider}_launches_{mode}"] = launches
    return found


def features(path: str | os.PathLike[str], console: Console, *, readme: Path | None = None, only: Sequence[str] = ()) -> Path:
    """Fill the table, a row per block as soon as it is known, and put it into the README between its markers."""
    chosen = [name for name in names() if not only or name in only]
    columns = (TextColumn("features {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Writer(path, FEATURES, environment("cpu"), resume=True) as writer, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        interpreted, plain = (traffic.Worker("perf.features", TRITON_INTERPRET=value) for value in "10")
        inductor = traffic.Worker("perf.inductor", TRITON_INTERPRET="0")

        def asking(worker: traffic.Worker) -> Callable[[str, Case], Any]:
            def ask(check: str, case: Case) -> Any:
                reply = worker.ask({"check": check, "case": dataclasses.asdict(case)})
                return reply.get("answer", reply.get("unavailable"))

            return ask

        try:
            for name in chosen:
                progress.update(task, description=name)
                if not writer.has({"op": name}):
                    answer = row(name, asking(interpreted), asking(plain), lambda case: inductor.ask({"case": dataclasses.asdict(case)}))
                    writer.write(answer)
                progress.advance(task)
        finally:
            for worker in (interpreted, plain, inductor):
                worker.close()
    # the latest row of every block, whatever commit it was found at
    found = read(path, FEATURES).set_index("op", drop=False)
    table = found.loc[[name for name in names() if name in found.index]]
    if readme is not None:
        insert(readme, "features", markdown(table))
    console.print(markdown(table), soft_wrap=True, highlight=False)
    return Path(path)


def markdown(table: pd.DataFrame) -> str:
    """The README's table: cells that hold "yes" throughout as one column each, traffic and launches as forward / backward."""

    def pair(row: Any, name: str, form: str = ".3g") -> str:
        cells = (row[name.format("fwd")], row[name.format("bwd")])
        return " / ".join("?" if pd.isna(cell) else format(cell, form) for cell in cells)

    titles = ["op", "module", "forward", "backward", *LAYOUTS, *DTYPES, "compile fullgraph", "export", "CPU"]
    titles += ["traffic, U", "bar", "floor", "launches", "eager", "Inductor", "checkpoints of"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for _, found in table.iterrows():
        cells = [f"`{found.op}`", f"`{found.module}`"]
        cells += ["✓" if found[name] == "yes" else found[name] for name in ("forward", "backward", *LAYOUTS, *DTYPES, "compile", "export", "cpu")]
        cells += [pair(found, name) for name in ("u_{}", "bar_{}", "floor_{}")]
        cells += [pair(found, name, "g") for name in ("launches_{}", "eager_launches_{}", "compile_launches_{}")]
        lines.append(f"| {' | '.join(cells)} | {found.checkpoints} |")
    return "\n".join(lines)


def insert(readme: Path, name: str, table: str) -> None:
    """Put a table in place of what stands between its markers in a Markdown file."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = readme.read_text(encoding="utf-8").partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{readme}: no {start} ... {end} to put the table between")
    readme.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
