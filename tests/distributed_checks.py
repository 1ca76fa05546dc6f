"""Two processes on one machine, joined by gloo: what each check does in both of them, and the test that runs them all.

Every check compares with the same network on the whole batch in one process. The test is collected by both runs, as those of feature_tests are.
"""

from __future__ import annotations

import copy
import json
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritattn import _library, ops
from tritattn import nn as blocks

WORLD = 2
SECONDS = 60
CHECKS: dict[str, Callable[[int], None]] = {}


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        blocks.SqueezeExcite(6, rd_channels=3),
        blocks.ConcurrentSE(6),
        blocks.CBAM(6, rd_channels=3, kernel_size=3, norm=norm, residual=True, activation="relu"),
        nn.Conv2d(6, 2, 1),
    ]
    return nn.Sequential(*layers).double()


def batch() -> Tensor:
    return torch.randn(2 * WORLD, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def own(t: Tensor, rank: int) -> Tensor:
    return t.chunk(WORLD)[rank]


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def average_of_halves(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The mean gradient of the two halves of the batch, each run by itself."""
    found = []
    for half in x.chunk(WORLD):
        other = copy.deepcopy(module)
        loss(other(half)).backward()
        found.append(gradients(other))
    return {name: (found[0][name] + found[1][name]) / 2 for name in found[0]}


@check
def ddp(rank: int) -> None:
    model = network()
    wanted = average_of_halves(model, batch())
    parallel = DistributedDataParallel(copy.deepcopy(model))
    loss(parallel(own(batch(), rank))).backward()
    torch.testing.assert_close(gradients(parallel.module), wanted)


@check
def ddp_of_a_compiled_model(rank: int) -> None:
    model = nn.Sequential(network()[3])
    x = torch.randn(2 * WORLD, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = average_of_halves(model, x)
    parallel = DistributedDataParallel(copy.deepcopy(model))
    loss(torch.compile(parallel, backend="aot_eager")(own(x, rank))).backward()
    torch.testing.assert_close(gradients(parallel.module), wanted)


@check
def fsdp2(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    wanted = average_of_halves(model, batch())
    state = model.state_dict()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model(own(batch(), rank))).backward()
    torch.testing.assert_close({name: g.full_tensor() for name, g in gradients(model).items()}, wanted)
    before = {name: state[name].clone() for name, _ in model.named_parameters()}
    optimizer.step()
    after = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(after, {name: before[name] - 0.1 * wanted[name] for name in before})


@check
def sync_batchnorm(rank: int) -> None:
    """torch's SyncBatchNorm trains on GPUs alone; on a CPU the converted network evaluates, and says so where it is trained."""
    model = network()
    with torch.no_grad():
        model[3].spatial.bn.running_mean.fill_(0.3)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    norm = converted[3].spatial.bn
    assert type(norm) is nn.SyncBatchNorm and type(converted[3]) is blocks.CBAM
    torch.testing.assert_close(converted.eval()(batch()), model.eval()(batch()))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        converted.train()(batch())


@check
def a_norm_that_talks_to_the_others(rank: int) -> None:
    """A module with collectives of its own between squeeze and gate, as SyncBatchNorm is on GPUs: the whole batch's statistics."""
    from torch.distributed.nn.functional import all_reduce

    class Synchronised(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            mean = all_reduce(x.mean()) / WORLD
            variance = all_reduce((x - mean).square().mean()) / WORLD
            return (x - mean) * (variance + self.eps).rsqrt() * self.weight.view(1, 1, 1, 1) + self.bias.view(1, 1, 1, 1)

    model = network()[3]
    tensors = (model.channel.fc1.weight, model.channel.fc1.bias, model.channel.fc2.weight, model.channel.fc2.bias, model.spatial.conv.weight)
    x = torch.randn(2 * WORLD, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = x.clone().requires_grad_()
    y = ops.cbam(whole, *tensors, norm=model.spatial.bn)
    wanted = torch.autograd.grad(y.square().sum(), (whole, *tensors))
    norm = Synchronised(1).double()
    mine = own(x, rank).clone().requires_grad_()
    part = ops.cbam(mine, *tensors, norm=norm)
    torch.testing.assert_close(part, own(y, rank))
    dx, *found = torch.autograd.grad(part.square().sum(), (mine, *tensors))
    for g in found:
        dist.all_reduce(g)
    torch.testing.assert_close((dx, *found), (own(wanted[0], rank), *wanted[1:]))


def _blocks_for_dtensors() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found: dict[str, nn.Module] = {
        "se": blocks.SqueezeExcite(6, rd_channels=3),
        "eca": blocks.ECA(6, kernel_size=3, residual=True, activation="relu"),
        "sse": blocks.SpatialSE(6),
        "scse": blocks.ConcurrentSE(6, activation="silu", bias=False),
        "cbam": blocks.CBAM(6, rd_channels=3, kernel_size=3, norm=False, residual=True, activation="relu"),
        "cbam-eval": blocks.CBAM(6, rd_channels=3, kernel_size=3).eval(),
        "channel": blocks.ChannelAttention(6, rd_channels=3, pools=("avg", "max", "lse"), apply=False),
    }
    return {name: block.double() for name, block in found.items()}


def _dtensors(rank: int, placement: Any, names: Collection[str]) -> None:
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(2 * WORLD, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    every = _blocks_for_dtensors()
    for name in names:
        block = every[name]
        whole = x.clone().requires_grad_()
        y = block(whole)
        g = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        y.backward(g)
        wanted = {"y": y.detach(), "x": whole.grad, **gradients(block)}
        shared = distribute_module(copy.deepcopy(block), mesh)
        shared.zero_grad()
        spread = distribute_tensor(x, mesh, [placement]).requires_grad_()
        z = shared(spread)
        assert z.placements == (placement,), f"{name}: {z.placements}"
        z.backward(distribute_tensor(g, mesh, [placement]))
        assert spread.grad.placements == (placement,), f"{name}: {spread.grad.placements}"
        got = {"y": z.detach(), "x": spread.grad, **gradients(shared)}
        got = {key: t.redistribute(mesh, [Replicate()]).to_local() for key, t in got.items()}
        torch.testing.assert_close(got, wanted, msg=lambda m, name=name: f"{name}: {m}")


@check
def dtensors_sharded_by_batch(rank: int) -> None:
    from torch.distributed.tensor import Shard

    _dtensors(rank, Shard(0), _blocks_for_dtensors())


@check
def dtensors_replicated(rank: int) -> None:
    from torch.distributed.tensor import Replicate

    _dtensors(rank, Replicate(), ("se", "cbam"))


@check
def dtensors_sharded_otherwise(rank: int) -> None:
    """A layout that no rule keeps is redistributed first; the values stay right."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(2 * WORLD, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = _blocks_for_dtensors()["se"]
    with torch.no_grad():
        wanted = block(x)
        got = distribute_module(copy.deepcopy(block), mesh)(distribute_tensor(x, mesh, [Shard(1)]))
    torch.testing.assert_close(got.redistribute(mesh, [Replicate()]).to_local(), wanted)


@check
def dtensors_compiled(rank: int) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    if not _library.INTERPRET:
        return  # a CPU's compiler gets the reference, whose operators are torch's
    mesh = init_device_mesh("cpu", (WORLD,))
    x = torch.randn(2 * WORLD, 6, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = _blocks_for_dtensors()["se"]
    whole = x.clone().requires_grad_()
    block(whole).square().sum().backward()
    shared = distribute_module(copy.deepcopy(block), mesh)
    shared.zero_grad()
    spread = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    torch.compile(shared, backend="aot_eager", fullgraph=True)(spread).square().sum().backward()
    torch.testing.assert_close(spread.grad.full_tensor(), whole.grad)
    torch.testing.assert_close({n: g.full_tensor() for n, g in gradients(shared).items()}, gradients(block))


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    if _library.INTERPRET:
        from interpreter import faithful

        faithful()
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS)
    )
    results: dict[str, str] = {}
    file = Path(folder) / f"{rank}.json"
    for name, function in CHECKS.items():
        torch._dynamo.reset()
        try:
            function(rank)
        except BaseException:
            results[name] = traceback.format_exc()
        else:
            results[name] = ""
        file.write_text(json.dumps(results))
        failed = torch.tensor([float(bool(results[name]))])
        dist.all_reduce(failed)  # both go on together; hangs, for SECONDS, where one of them still waits inside a check
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo")
def test_two_processes(tmp_path):
    """One test, so that two processes are started once, whatever runs the tests in parallel."""
    context = torch.multiprocessing.start_processes(_work, args=(str(tmp_path),), nprocs=WORLD, join=False, start_method="spawn")
    deadline = time.monotonic() + 3 * SECONDS
    try:
        while not (finished := context.join(timeout=1)) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    assert finished, "not done in time"
    for rank in range(WORLD):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert list(results) == list(CHECKS)
        failures = [f"process {rank}, {name}: {trace}" for name, trace in results.items() if trace]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
