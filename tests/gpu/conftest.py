"""Tests that need a GPU. On a machine without one they are skipped; TRITATTN_GPU_TESTS=cpu with TRITON_INTERPRET=1 instead runs what does not
need CUDA itself on tiny maps through Triton's interpreter, which finds slips in the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
pytest.register_assert_rewrite("cases", "tolerance")

HERE = Path(__file__).resolve().parent
ON_CPU = os.environ.get("TRITATTN_GPU_TESTS") == "cpu"


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not (torch.cuda.is_available() or ON_CPU):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture
def cuda(device):
    """For what only CUDA has: streams, graphs, a profiler of launches."""
    if device.type != "cuda":
        pytest.skip("needs CUDA")
    return device


@pytest.fixture(autouse=True)
def kernels():
    """No fallback hides behind a right result: a kernel that does not compile is an error here. And torch's own arithmetic, compared with, in full
    precision."""
    from tritattn import backend

    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with backend("triton"):
        yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # an error of this test's kernels shows here and not in the next test
