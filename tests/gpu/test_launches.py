"""How many kernels a block launches, torch's own included, counted by the profiler."""

import pytest
import torch
from cases import BY_NAME, fused
from on_device import REAL, inputs, real
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

WEIGHTS = (8, 2048, 1, 1)  # an image much smaller than the excite's weights; at REAL size it is much larger


def launched(call):
    call()  # compiles, and fills the allocator
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == DeviceType.CUDA]
    assert any(n.endswith("_fwd_kernel") for n in names), f"no kernel of this package among {names}"
    return names


# ese has a whole matrix of weights: 4 at this size, 1 for the larger map below
LIMITS = {"sse": 1, "se": 1, "ese": 4, "eca": 1, "cse": 1, "scse": 2, "scse-max": 2, "cbam": 4, "cbam-train": 6}


@pytest.mark.parametrize("name", LIMITS)
def test_with_residual_and_activation(cuda, name):
    op = BY_NAME[name]
    case, activation = real(op, cuda)
    names = launched(lambda: fused(op, case.x, case.params, case.residual, activation))
    assert len(names) <= LIMITS[name], names


ALONE = [("sse", REAL, 1), ("se", REAL, 1), ("ese", (4, 256, 56, 56), 1), ("cbam-eval", REAL, 4), ("se", WEIGHTS, 4), ("ese", WEIGHTS, 4)]


@pytest.mark.parametrize("name, shape, limit", ALONE)
def test_alone(cuda, name, shape, limit):
    op = BY_NAME[name]
    case = inputs(op, shape, cuda, dtype=torch.bfloat16)
    names = launched(lambda: fused(op, case.x, case.params))
    assert len(names) <= limit, names


def test_saved_memory(cuda):
    """Between forward and backward a block holds its inputs, its output and little else: no gated copy of the map."""
    op = BY_NAME["cbam"]
    case, activation = real(op, cuda)
    for _ in range(2):  # the first call compiles, and makes the counters
        before = torch.cuda.memory_allocated()
        y = fused(op, case.x, case.params, case.residual, activation)
        held = torch.cuda.memory_allocated() - before
        del y
    image = case.x.numel() * case.x.element_size()
    assert image <= held < 1.25 * image
