"""CUDA graphs, streams, threads and devices. The kernels meet on counters in memory, which no two launches at once may share."""

import threading

import pytest
import torch
from cases import BY_NAME, MAIN, fused, run
from on_device import SMALL, inputs, moved, real

from tritattn import nn as blocks
from tritattn import ops
from tritattn.ops import _launch

SHAPE = (4, 64, 56, 56)


def network(device, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        blocks.SqueezeExcite(64), blocks.ConcurrentSE(64), blocks.CBAM(64, rd_ratio=1 / 4, norm=False, activation="relu")
    ).to(device, dtype)


def step(module, x):
    """y and the gradients of its sum of squares with respect to x and the parameters."""
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *module.parameters()))]


def some_map(device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(SHAPE, device=device, generator=generator).requires_grad_()


def captured(module, x):
    """A graph of `step`, and the tensors that its replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(module, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(module, x)
    return graph, results


def same(got, wanted):
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_graph_capture_and_replay(cuda):
    module, x = network(cuda), some_map(cuda, 0)
    graph, results = captured(module, x)
    for seed in (1, 2, 3):
        fresh = some_map(cuda, seed)
        with torch.no_grad():
            x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        same(results, step(module, fresh))


def test_graphs_side_by_side(cuda):
    """Two graphs that were captured one after the other, replayed at once on two streams, beside eager work on a third."""
    modules = [network(cuda) for _ in range(2)]
    maps = [some_map(cuda, seed) for seed in (1, 2)]
    graphs = [captured(module, x) for module, x in zip(modules, maps, strict=True)]
    wanted = [step(module, x) for module, x in zip(modules, maps, strict=True)]
    other, z = network(cuda), some_map(cuda, 3)
    expected = step(other, z)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    eager = []
    for _ in range(20):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager.append(step(other, z))
    torch.cuda.synchronize()
    for (_, results), want in zip(graphs, wanted, strict=True):
        same(results, want)
    for results in eager:
        same(results, expected)


def test_several_streams(cuda):
    module = network(cuda)
    maps = [some_map(cuda, seed) for seed in range(4)]
    wanted = [step(module, x) for x in maps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in maps]
    found = []
    for _ in range(10):
        for x, stream in zip(maps, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(module, x))
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        same(results, wanted[i % len(maps)])


@pytest.mark.parametrize("block, shape", [(blocks.ConcurrentSE, (40, 1024, 14, 14)), (blocks.SqueezeExcite, (48, 256, 28, 28))])
def test_programs_that_wait_on_several_streams(cuda, block, shape):
    """Launches that each take every multiprocessor, side by side, eager and replayed: none may keep another one's programs from starting for ever."""
    module = block(shape[1], activation="relu", device=cuda, dtype=torch.bfloat16)
    maps = [torch.randn(shape, device=cuda, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    wanted = [step(module, x) for x in maps]
    graph, results = captured(module, maps[0])
    streams = [torch.cuda.Stream() for _ in maps]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        with torch.cuda.stream(streams[0]):
            graph.replay()
        for x, stream in zip(maps[1:], streams[1:], strict=True):
            with torch.cuda.stream(stream):
                found.append(step(module, x))
    torch.cuda.synchronize()
    same(results, wanted[0])
    for i, got in enumerate(found):
        same(got, wanted[1 + i % 2])


@pytest.mark.parametrize("own_streams", [False, True])
def test_several_threads(cuda, own_streams):
    module = network(cuda)
    maps = [some_map(cuda, seed) for seed in range(4)]
    wanted = [step(module, x) for x in maps]
    torch.cuda.synchronize()
    failures = []

    def work(x, want):
        try:
            with torch.cuda.stream(torch.cuda.Stream() if own_streams else torch.cuda.default_stream()):
                for _ in range(10):
                    got = step(module, x)
                    torch.cuda.current_stream().synchronize()
                    same(got, want)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(maps, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_counters_are_left_at_zero(cuda):
    for op in MAIN:
        case, activation = real(op, cuda)
        run(fused, op, case, activation)
    torch.cuda.synchronize()
    assert _launch._counters
    assert not any(buffer.any() for buffer in _launch._counters.values())


def test_backward_on_another_stream_than_forward(cuda):
    """autograd runs a node's backward on the stream of its forward, whichever is current."""
    module, x = network(cuda), some_map(cuda, 0)
    wanted = step(module, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = module(x)
    torch.cuda.current_stream().wait_stream(stream)
    got = [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *module.parameters()))]
    torch.cuda.synchronize()
    same(got, wanted)


@pytest.mark.parametrize("name", ["se", "scse", "cbam"])
def test_a_device_that_is_not_the_current_one(cuda, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    op = BY_NAME[name]
    first = inputs(op, SMALL, torch.device("cuda:0"))
    second = inputs(op, SMALL, torch.device("cuda:1"))
    with torch.cuda.device(0):
        wanted, got = run(fused, op, first), run(fused, op, second)
        assert all(t.device.index == 1 for t in got.values())
        same([t.cpu() for t in got.values()], [t.cpu() for t in wanted.values()])
        compiled = torch.compile(lambda x: fused(op, x, second.params), fullgraph=True)(second.x)
    assert compiled.device.index == 1
    torch.testing.assert_close(compiled.cpu(), got["y"].cpu())


def test_arguments_on_two_devices_are_refused(cuda):
    x = torch.randn(SMALL, device=cuda)
    w = torch.randn(1, SMALL[1], 1, 1)
    with pytest.raises(ValueError, match="w: got a tensor on cpu, expected cuda:0, the device of x"):
        ops.sse(x, w)
    assert moved(w, cuda).device.type == "cuda"
