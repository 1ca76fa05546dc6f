"""What the compilers make of the kernels, for GPUs that need not be here: no spills, the map in 16-byte accesses, NaN kept.

A part of `python -m perf codegen`, which compiles everything shipped.
"""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch

pytest.importorskip("triton")

import tritattn.kernels
from triton.runtime.jit import JITFunction

from perf.cases import Inputs, make_case
from perf.codegen import compile_for, launches, recording, resources, row
from perf.shapes import STAGES, Site
from tritattn import ops, tuning

OPS = ("se+residual+relu", "scse+residual+relu", "cbam+residual+relu", "sse+residual+relu")
CASES = [("bf16", op, layout, target) for op in OPS for layout in ("contiguous", "channels_last") for target in ("sm_90", "gfx942")]
CASES += [("bf16", "gc", "contiguous", "sm_90"), ("bf16", "gc_scale", "channels_last", "sm_80")]
CASES += [("bf16", "gsop", "contiguous", "sm_90"), ("bf16", "gsop", "channels_last", "sm_100"), ("bf16", "aff+relu", "channels_last", "sm_90")]
CASES += [("fp32", "scse+residual+relu", "contiguous", "sm_80"), ("fp16", "cbam+residual+relu", "channels_last", "sm_100")]
CASES += [("bf16", "shuffle+residual+relu", "contiguous", "sm_90"), ("bf16", "simam+residual+relu", "channels_last", "sm_90")]
CASES += [("bf16", "shuffle+residual+relu", "channels_last", "sm_80")]
CASES += [("fp32", op, "contiguous", "sm_90") for op in ("se", "cbam")]
CASES += [("bf16", "norm_se+residual+relu", "channels_last", "sm_90"), ("bf16", "norm_silu_se", "contiguous", "sm_80")]
CASES += [("bf16", "se", "channels_last", "sm_80")]  # the excite inside the squeeze decides its registers


def kernels(dtype, op, layout, stage):
    """One launch of each kernel of a training step, at a batch of 256."""
    return {launch.name: launch for launch in launches(make_case(op, dtype, layout, 256, STAGES[stage]))}


@pytest.mark.parametrize("dtype, op, layout, target", CASES)
def test_no_spills_and_wide_accesses(dtype, op, layout, target):
    found = [row(launch, target) for launch in kernels(dtype, op, layout, 0).values()]
    assert len(found) >= 2
    for made in found:
        assert made["status"] == "ok", made
        assert made["spill_bytes"] == 0, made
        for column in ("map_load_bits", "map_store_bits"):
            assert made[column] is None or made[column] >= 128, made
    assert any(made["map_load_bits"] for made in found) and any(made["map_store_bits"] for made in found)


@pytest.mark.parametrize(("layout", "stage", "target"), [("contiguous", 3, "sm_80"), ("channels_last", 0, "sm_90"), ("channels_last", 0, "gfx942")])
def test_a_norm_and_an_activation_before_a_channel_gate(layout, stage, target):
    case = make_case("se+residual+relu", "bf16", layout, 256, STAGES[stage])
    inputs = Inputs(case, "meta")
    x, residual = inputs.x[0], inputs.residual[0]
    norm = torch.nn.BatchNorm2d(x.shape[1], device="meta").eval().requires_grad_(False)
    with recording(case) as found:
        y = ops.se(x, *inputs.weights.values(), before="silu", before_norm=norm, residual=residual, activation="relu")
        torch.autograd.grad(y, [x, residual], inputs.g[0])
    preceded = [launch for launch in found if "bn_mean_ptr" in launch.bound]
    assert len(preceded) == (2 if stage == 0 else 4)
    for launch in preceded:
        made = row(launch, target)
        assert made["status"] == "ok" and made["spill_bytes"] == 0, made
        assert stage == 3 or made["map_load_bits"] == 128, made


@pytest.mark.parametrize("op", ["se", "cbam", "cbam+residual+relu"])
def test_rows_of_odd_length_do_not_spill(op):
    for launch in kernels("bf16", op, "contiguous", 3).values():
        made = row(launch, "sm_90")
        assert made["status"] == "ok" and made["spill_bytes"] == 0, made


# tiles of whole planes and of several rows; the gate's backward holds the most
STATISTICS = [("fp32", "coord+residual+relu", "channels_last", 2, "sm_80"), ("bf16", "triplet", "contiguous", 2, "sm_80")]
STATISTICS += [("bf16", "ge", "contiguous", 1, "sm_80"), ("fp32", "ge", "channels_last", 1, "sm_80")]


@pytest.mark.parametrize("dtype, op, layout, stage, target", STATISTICS)
def test_statistics_of_lines_do_not_spill(dtype, op, layout, stage, target):
    for launch in kernels(dtype, op, layout, stage).values():
        made = row(launch, target)
        assert made["status"] == "ok" and made["spill_bytes"] == 0, made


GROUPS = [("sse", 2, "sm_80", 64), ("scse_max+residual+relu", 2, "sm_90", 64), ("scse+residual+relu", 3, "sm_100", 128)]
GROUPS += [("gc", 2, "sm_90", 64), ("gc_scale", 3, "sm_80", 128)]


@pytest.mark.parametrize("op, stage, target, bits", GROUPS)
def test_groups_of_programs(op, stage, target, bits):
    """Rows of 14x14 elements are aligned to 8 bytes, rows of 7x7 to 2: eight of these are loaded as one."""
    found = [row(launch, target) for launch in kernels("bf16", op, "contiguous", stage).values() if launch.cooperative]
    assert len(found) == 2
    for made in found:
        assert made["status"] == "ok" and made["spill_bytes"] == 0, made
        assert made["map_load_bits"] == bits and made["map_store_bits"] in (bits, None), made
    assert any(made["map_store_bits"] for made in found)


def test_device_functions_default_to_none_alone():
    """Triton 3.6 does not make a constant of any other default."""
    modules = [importlib.import_module(f"tritattn.kernels.{module.name}") for module in pkgutil.iter_modules(tritattn.kernels.__path__)]
    found = {name: f for module in modules for name, f in vars(module).items() if isinstance(f, JITFunction)}
    signatures = {name: inspect.signature(f.fn) for name, f in found.items()}
    assert len(signatures) > 50
    for name, signature in signatures.items():
        assert {p.default for p in signature.parameters.values()} <= {None, inspect.Parameter.empty}, name


def test_no_maximum_drops_a_nan():
    """`max.f32` and `min.f32` return the other operand of a NaN. Activations and gates must not use them; statistics only beside a test for NaN."""
    seen = 0
    found = kernels("bf16", "cbam+residual+relu", "contiguous", 0)
    with tuning.forced(lag=0):  # each squeeze in a launch of its own
        found |= kernels("bf16", "cbam+residual+relu", "contiguous", 0)
    for name, launch in found.items():
        ptx = compile_for(launch, "sm_90").asm["ptx"]
        dropping = re.findall(r"\b(?:max|min)\.(?:ftz\.)?f(?:32|64)\b", ptx)
        if "squeeze" in name:
            seen += 1
            assert re.search(r"setp\.(?:nan|num)\.f32", ptx), name
        else:
            assert not dropping, name
    assert seen == 3


UNITS = {"sm_80": r"\bmma\.sync", "sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma", "gfx942": r"\bv_mfma_f32"}


@pytest.mark.parametrize("target", UNITS)
def test_products_of_matrices_are_on_matrix_units(target):
    for name, launch in kernels("bf16", "gsop", "contiguous", 1).items():
        if name.startswith(("covariance", "pointwise_convolution")):
            compiled = compile_for(launch, target)
            assert re.search(UNITS[target], compiled.asm.get("ptx") or compiled.asm["amdgcn"]), name
            assert resources(compiled, target)["spill_bytes"] == 0, name


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_strided_convolution_does_not_spill(target):
    case = make_case("gsop", "bf16", "contiguous", 256, STAGES[0])
    x = torch.empty(case.shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    conv = torch.nn.Conv2d(x.shape[1], 128, 1, 2, device="meta", dtype=x.dtype)
    with recording(case) as found:
        y = ops.gsop(x, (conv, torch.nn.Identity()), lambda s: s.flatten(1)[:, : x.shape[1], None, None])
        torch.autograd.grad(y, [x, conv.weight], torch.empty_like(y))
    (launch,) = (launch for launch in found if launch.name == "pointwise_convolution_bwd_kernel")
    made = row(launch, target)
    assert launch.kwargs["STRIDE"] == 2 and made["status"] == "ok" and made["spill_bytes"] == 0 and made["map_load_bits"] == 128, made


@pytest.mark.parametrize("dtype, op, target", [("bf16", "se", "sm_80"), ("fp32", "se", "sm_100"), ("bf16", "ese", "sm_90"), ("fp16", "se", "gfx942")])
def test_products_of_the_excite_are_on_matrix_units(dtype, op, target):
    """Where a tile is too small for its newest units NVIDIA's compiler takes the older ones."""
    seen = 0
    for launch in launches(make_case(op, dtype, "contiguous", 256, STAGES[3])):
        if launch.name in ("linear_kernel", "mlp_weights_bwd_kernel"):
            seen += 1
            compiled = compile_for(launch, target)
            assert re.search(rf"{UNITS[target]}|{UNITS['sm_80']}", compiled.asm.get("ptx") or compiled.asm["amdgcn"]), launch.config
            assert resources(compiled, target)["spill_bytes"] == 0, launch.config
    assert seen == (5 if op == "se" else 3)


@pytest.mark.parametrize(("kernel", "hidden"), [("mlp_weights_bwd_kernel", 168), ("linear_kernel", 28)])
def test_products_of_the_excite_do_not_spill(kernel, hidden):
    """Those of many tiles, the last of which spilled a few registers with 32 x 32 x 64 and with fewer registers for 32 x 64 x 32."""
    found = {launch.name: launch for launch in launches(make_case("se", "bf16", "contiguous", 256, Site(1, 672, 14, 14, hidden)))}
    made = row(found[kernel], "sm_90")
    assert made["status"] == "ok" and made["spill_bytes"] == 0, made


# each spilled a few registers until its pass had a limit of them
LIMITED = [
    ("fp32", "scse", "channels_last", (16, 128, 128, 128, 8), "sm_100", "pixel_gate_bwd_kernel"),
    ("bf16", "sse", "contiguous", (16, 384, 32, 32, 24), "sm_90", "pixel_gate_fwd_kernel"),
    ("fp32", "cbam", "channels_last", (32, 256, 56, 56, 16), "sm_90", "channel_squeeze_fwd_kernel"),
    ("bf16", "se", "contiguous", (256, 120, 28, 28, 32), "sm_80", "channel_gate_ticket_fwd_kernel"),
    # and these stay under theirs
    ("fp32", "se", "channels_last", (8, 2048, 7, 7, 128), "sm_90", "channel_gate_stages_fwd_kernel"),
    ("bf16", "se", "contiguous", (256, 512, 28, 28, 256), "sm_100", "channel_gate_stages_bwd_kernel"),
    ("bf16", "sk", "channels_last", (256, 256, 28, 28, 32), "sm_80", "select_ticket_bwd_kernel"),
]


@pytest.mark.parametrize("dtype, op, layout, shape, target, kernel", LIMITED)
def test_a_limit_of_registers_keeps_them_from_memory(dtype, op, layout, shape, target, kernel):
    n, *site = shape
    with tuning.forced(**({} if "ticket" in kernel or "stages" in kernel else {"lag": 0})):
        found = {launch.name: launch for launch in launches(make_case(op, dtype, layout, n, Site(1, *site), gate="hard_sigmoid"))}
    made = row(found[kernel], target)
    assert made["status"] == "ok" and made["spill_bytes"] == 0 and made["registers"] <= 128, made
