"""The choice of tiles."""

import pytest
import torch

pytest.importorskip("triton")

from perf.cases import make_case
from perf.codegen import launches
from perf.shapes import STAGES
from tritattn import _linear, tuning
from tritattn.ops import context, pixel
from tritattn.ops._launch import kernels

GPU, INTERPRETER = torch.device("meta"), torch.device("cpu")
SHORT_ROWS = ("pixel", 256, 1024, 196, 2)


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    tuning.choose.cache_clear()
    yield
    tuning.choose.cache_clear()


def test_programs_wait_for_each_other_where_rows_are_short():
    config = tuning.choose(*SHORT_ROWS, False, GPU)
    assert config.group and config.key.endswith("g")
    assert not tuning.choose(*SHORT_ROWS, True, GPU).group
    assert not tuning.choose("pixel", 256, 256, 3136, 2, False, GPU).group
    # a context's program holds whole sectors of 1024 channels, where rows consist of them
    assert tuning.choose("context", 256, 1024, 196, 2, False, GPU).group and not tuning.choose("context", 256, 1024, 784, 2, False, GPU).group


@pytest.mark.parametrize(("c", "hw", "itemsize"), [(1024, 196, 2), (2048, 49, 2), (2047, 49, 2), (768, 256, 2), (2048, 49, 4), (768, 400, 2)])
@pytest.mark.parametrize("n", [1, 3, 256])
@pytest.mark.parametrize("maps", [1, 2])
def test_no_more_programs_wait_than_there_are_multiprocessors(maps, n, c, hw, itemsize):
    config = tuning.choose("pixel", n, c, hw, itemsize, False, GPU, maps)
    assert config.group and 1 <= config.splits <= n
    assert config.splits * -(-c // config.block_c) <= tuning.processors(GPU)
    assert config.block_c % tuning.rows_together(c, hw, itemsize) == 0 and config.num_warps == 8


def test_an_image_that_fits_in_no_group_is_walked():
    assert not tuning.choose("pixel", 256, 65536, 196, 2, False, GPU).group
    assert tuning.choose("pixel", 256, 1024, 784, 2, False, GPU).group
    assert not tuning.choose("pixel", 256, 1024, 784, 2, False, GPU, 2).group  # but one of its maps would


def test_no_program_waits_where_no_launch_runs_all_of_them(amd):
    assert not tuning.choose(*SHORT_ROWS, False, GPU).group


@pytest.mark.parametrize("reason", ["too many blocks in cooperative launch", "operation not supported"])
@pytest.mark.parametrize(("op", "module", "family"), [("scse_max+residual+relu", pixel, "pixel_gate"), ("gc", context, "context")])
def test_a_device_that_refuses_a_cooperative_launch_walks(monkeypatch, reason, op, module, family):
    monkeypatch.setattr(tuning, "_refused", set())
    case = make_case(op, "bf16", "contiguous", 256, STAGES[3])
    assert sum(launch.cooperative for launch in launches(case)) == 2

    class Refusing:
        def __getattr__(self, name):
            return self if "group" in name else getattr(kernels(), name)

        def __getitem__(self, grid):
            raise RuntimeError(f"Triton Error [CUDA]: {reason}")

    monkeypatch.setattr(module, "kernels", Refusing)
    with pytest.warns(RuntimeWarning, match=f"walks maps of short rows twice on meta.*{reason}") as warned:
        walked = [launch.name for launch in launches(case)]
    tuning.choose.cache_clear()
    assert len(warned) == 1
    assert {f"{family}_fwd_kernel", f"{family}_bwd_kernel"} < set(walked) and not any("group" in name for name in walked)


def test_another_error_of_a_cooperative_launch_is_raised():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuning.refused(GPU, RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert tuning.cooperative(GPU)


def test_no_program_waits_in_the_interpreter_of_triton():
    assert not tuning.choose(*SHORT_ROWS, False, INTERPRETER).group


SEVERAL, ONE = [(2048, 49, 2, 8), (2048, 49, 4, 4), (8, 6, 2, 4)], [(2047, 49, 2, 1), (1024, 196, 2, 1), (3, 5, 8, 1)]


@pytest.mark.parametrize(("c", "hw", "itemsize", "rows"), SEVERAL + ONE)
def test_rows_that_only_together_load_in_vectors(c, hw, itemsize, rows):
    assert tuning.rows_together(c, hw, itemsize) == rows


# (M, J, K): layers of SE and of ESE for a batch and for one image, and their weights' gradients
PRODUCTS = [(256, 128, 2048), (256, 2048, 128), (128, 2048, 256), (256, 2048, 2048), (32, 16, 256), (1, 128, 2048), (2048, 2048, 1)]


@pytest.mark.parametrize("sizes", PRODUCTS, ids=str)
def test_tiles_of_a_product(sizes):
    """Each range of a sum has terms, matrix units take 16 of everything, and the model expects no more than of one tile for every size."""
    m, j, k = sizes
    for itemsize in (4, 8):
        tile = _linear.choose(*sizes, itemsize, 132)
        assert (tile.splits - 1) * tile.block_k < k
        if tile.units:
            assert itemsize == 4 and min(m, j, k, tile.block_m, tile.block_j, tile.block_k) >= 16
        else:
            assert tile.block_m * tile.block_j * tile.block_k <= _linear.PRODUCTS
        plain = _linear.Tile(min(m, 16), min(j, 16), min(k, 32))
        assert tile.time(*sizes, itemsize, 132) <= plain.time(*sizes, itemsize, 132)
    assert _linear.choose(*sizes, 4, 132).units == (min(sizes) >= 16)


def test_what_the_model_of_products_knows_of_a_launch():
    """Two-byte operands are half as much to load, those of bf16 half of the products on matrix units; two products share the multiprocessors."""
    sizes = (256, 2048, 128)
    for units in (True, False):
        bf16, fp16, fp32 = (_linear.Tile(32, 32, 32, units=units).time(*sizes, 4, 132, right) for right in (torch.bfloat16, torch.float16, None))
        assert fp16 < fp32 and (bf16 < fp16 if units else bf16 == fp16)
    asked = (("both_weights", 132), ("weights", 66), ("weights", 132))
    both, halved, one = (_linear.choose(256, 1024, 256, 4, processors, None, role) for role, processors in asked)
    assert both == halved != one


def test_long_sums_are_cut_where_there_are_few_programs():
    assert _linear.choose(256, 128, 2048, 4, 132).splits > 1
    assert _linear.choose(256, 2048, 128, 4, 132).splits == 1
