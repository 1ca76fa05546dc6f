"""The shared feature tests on the reference, and what is said of that path alone."""

import threading

import pytest
import torch
from feature_tests import *  # noqa: F403
from feature_tests import BLOCKS, build, every_block, expected, feature_map, gradients, same

import tritattn
from tritattn import ops


@every_block
def test_kernels_cannot_be_forced(name):
    with tritattn.backend("triton"), pytest.raises(RuntimeError, match=r"backend\('triton'\).*cannot run on cpu: the kernels run on GPUs"):
        build(name)(feature_map())


def test_a_compiler_sees_through_the_reference():
    """On a CPU it fuses the block's arithmetic with its neighbours', so no op may stand in the way."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    backend = EagerAndRecordGraphs()
    block, x = build("scse"), feature_map()
    same(gradients(block, torch.compile(block, backend=backend, fullgraph=True), x), expected(block, x))
    (graph,) = backend.graphs
    assert not [node for node in graph.graph.nodes if "tritattn" in str(node.target)]


def test_threads():
    blocks = {name: build(name).eval() for name in BLOCKS}
    inputs = {name: feature_map(seed=i) for i, name in enumerate(BLOCKS)}
    wanted = {name: expected(blocks[name], inputs[name]) for name in BLOCKS}
    failures = []

    def work():
        try:
            for _ in range(5):
                for name, block in blocks.items():
                    same(gradients(block, block, inputs[name]), wanted[name])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads)


def test_unknown_dtypes_are_refused_before_any_path():
    with pytest.raises(TypeError, match="x: got a tensor of torch.float8"):
        ops.sse(torch.zeros(1, 2, 2, 2, dtype=torch.float8_e4m3fn), torch.zeros(1, 2, 1, 1))
