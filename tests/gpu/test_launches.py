"""How many kernels a block launches, torch's own included, counted by the profiler."""

import pytest
import torch
from cases import BY_NAME, fused
from on_device import inputs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MAPS = (8, 256, 56, 56)  # where an image is much larger than the excite's weights
WEIGHTS = (8, 2048, 1, 1)  # where it is much smaller


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(
    "name, shape, limit",
    [
        ("sse", MAPS, 1),
        *((name, MAPS, 2) for name in ("se", "ese", "eca", "cse", "scse")),
        ("se", WEIGHTS, 4),
        ("ese", WEIGHTS, 4),
        ("cbam", MAPS, 4),
        ("cbam-eval", MAPS, 4),
        ("cbam-train", MAPS, 6),
    ],
)
def test_forward_launches(cuda, name, shape, limit, activation, layout):
    op = BY_NAME[name]
    case = inputs(op, shape, cuda, dtype=torch.bfloat16, layout=layout, residual=activation != "none")
    names = launched(lambda: fused(op, case.x, case.params, case.residual, activation))
    assert len(names) <= limit, names


def test_saved_memory(cuda):
    """Between forward and backward a block holds its input, its output and little else."""
    from tritattn import ops

    x = torch.randn(MAPS, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    case = inputs(BY_NAME["cbam"], MAPS, cuda, dtype=torch.bfloat16)
    tensors = [case.params[n] for n in ("w1", "b1", "w2", "b2", "weight", "bias")]
    ops.cbam(x, *tensors)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = ops.cbam(x, *tensors)
    image = x.numel() * x.element_size()
    assert torch.cuda.memory_allocated() - before < 1.25 * image
    del y
