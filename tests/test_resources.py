"""Registers and shared memory of every kernel, against the committed kernel_resources.json.

After an intended change: python -m pytest tests/test_resources.py --update-resources
"""

import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import sass
from vsa_cuda import _extension, _kernels

pytestmark = pytest.mark.skipif(
    not _extension.is_available(), reason=f"vsa_cuda._C is not built: {_extension.unavailable_reason()}"
)
TABLE = Path(__file__).with_name("kernel_resources.json")
# The driver's part of a CTA's shared memory on sm_90, counted by cuobjdump where a kernel has any of its own.
RESERVED_SHARED_BYTES = 1024
MOST_SHARED_BYTES = 227 * 1024
REGISTERS_PER_SM = 64 * 1024


def launch_every_kernel(heads, head_dim, dtype):
    """Runs every op of _kernels on a small video. Only plans are made: nothing is launched."""
    video_shape, cube, topk, scale = (5, 6, 7), (4, 4, 4), 2, head_dim**-0.5
    shapes = (video_shape, video_shape, cube, cube)
    q = torch.zeros(1, 5 * 6 * 7, heads, head_dim, dtype=dtype)
    pooled = [torch.zeros(1, heads, 8, head_dim, dtype=dtype)] * 3
    coarse, lse = torch.zeros_like(pooled[0]), torch.zeros(1, heads, 8)
    counts = torch.full((1, heads, 8), topk, dtype=torch.int32)
    indices = torch.arange(topk, dtype=torch.int32).expand(1, heads, 8, topk).contiguous()
    fine_lse = torch.zeros(1, heads, 8, 64)
    gates = (q, q, 1.0, 1.0)

    _kernels.coarse_forward(q, q, q, video_shape, cube, topk, scale, True)
    _kernels.fine_forward(q, q, q, counts, indices, None, None, coarse, *gates, *shapes, scale, True)
    linear, block = (1, 1, 5 * 6 * 7), (1, 1, 64)
    _kernels.fine_forward(
        q, q, q, None, None, None, None, coarse, *gates, linear, linear, block, block, scale, True,
        video_shape, cube,
    )  # fmt: skip
    _kernels.combine_backward(q, q, None, coarse, *gates, None, video_shape, cube)
    _kernels.coarse_backward(coarse, *pooled, coarse, lse, scale)
    _kernels.select(*pooled[:2], topk, scale, "plan_select_large")
    most_small = torch.zeros(1, 12, 512, head_dim, dtype=dtype)  # CTAs with the most rows
    _kernels.select(most_small, most_small, topk, scale)
    lists = counts, indices, *_kernels.transpose_index(counts, indices, 8)
    nothing = (None,) * 4
    for index, deterministic in ((lists, True), (lists, False), (nothing, False), (nothing, True)):
        _kernels.fine_backward(
            q, q, q, q, fine_lse, fine_lse, *index, None, None, None, None, None, *shapes, scale,
            deterministic,
        )  # fmt: skip


@functools.cache
def planned():
    """{kernel: its plan with the most shared memory}; many heads choose the variants for long videos."""
    plans = {}

    def keep(plan, _):
        if plan.kernel not in plans or plan.shared_bytes > plans[plan.kernel].shared_bytes:
            plans[plan.kernel] = plan

    h200_sms = 132
    with mock.patch.multiple(_extension, launch=keep, num_sms=lambda device: h200_sms):
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim in (64, 128):
                for heads in (1, 256):
                    launch_every_kernel(heads, head_dim, dtype)
    return plans


@functools.cache
def measured():
    binary = _extension.load().__file__
    usage, code = sass.resource_usage(binary), sass.machine_code(binary)
    kernels = {}
    for kernel in sorted(usage):
        plan = planned()[kernel]
        kernels[kernel] = {
            "registers": code[kernel]["registers"],
            "registers_at_launch": usage[kernel]["REG"],
            "threads": plan.block[0] * plan.block[1] * plan.block[2],
            "static_shared_bytes": max(usage[kernel]["SHARED"] - RESERVED_SHARED_BYTES, 0),
            "dynamic_shared_bytes": plan.shared_bytes,
        }
    return {"cuda": _extension.load().cuda_version(), "kernels": kernels}


def test_every_kernel_has_a_plan():
    assert set(planned()) == set(_extension.load().kernel_names())
    assert set(sass.resource_usage(_extension.load().__file__)) == set(planned())


def test_kernels_fit_an_sm():
    for kernel, used in measured()["kernels"].items():
        shared = used["static_shared_bytes"] + used["dynamic_shared_bytes"]
        assert shared <= MOST_SHARED_BYTES, f"{kernel}: {shared} bytes of shared memory"
        assert used["registers_at_launch"] * used["threads"] <= REGISTERS_PER_SM, kernel


def test_no_local_memory():
    usage = sass.resource_usage(_extension.load().__file__)
    assert not {kernel for kernel, used in usage.items() if used["STACK"] or used["LOCAL"]}
    code = sass.machine_code(_extension.load().__file__)
    assert not {kernel for kernel, used in code.items() if used["local_accesses"]}


def test_resources_are_as_committed(request):
    got = measured()
    if request.config.getoption("--update-resources"):
        TABLE.write_text(json.dumps(got, indent=1) + "\n")
    table = json.loads(TABLE.read_text())
    assert set(got["kernels"]) == set(table["kernels"])
    same_compiler = got["cuda"] == table["cuda"]
    for kernel, used in got["kernels"].items():
        expected = table["kernels"][kernel]
        if not same_compiler:  # another ptxas allocates other registers; shared memory is ours
            used, expected = (
                {name: row[name] for name in row if "registers" not in name} for row in (used, expected)
            )
        assert used == expected, f"{kernel}: run with --update-resources if this change is intended"


@pytest.mark.parametrize(
    ("opcode", "operands", "highest"),
    [
        ("HGMMA.64x128x16.F32.BF16", "R24, R88, gdesc[UR16], R24, gsb0 ", 91),
        ("HGMMA.64x128x16.F32.BF16", "R40, gdesc[UR4], RZ, !UPT ", 103),
        ("LDS.128", "R16, [R3+UR4+0x10]", 19),
        ("STG.E.64", "desc[UR4][R20.64+0x10], R4", 21),
        ("IMAD.WIDE", "R8, R9, 0x4, R6", 9),
        ("LDSM.16.M88.4", "R100, [R3]", 103),
        ("FADD", "R2, R200, -R7", 200),
        ("EXIT", "", -1),
    ],
)
def test_highest_register(opcode, operands, highest):
    assert sass.highest_register(opcode, operands) == highest
