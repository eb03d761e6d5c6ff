"""The unmodified victim kernels pass every schedule, with right results."""

from __future__ import annotations

import pytest
import torch

from simulator.victims import matmul, reduce, victim_ptx

pytestmark = pytest.mark.simulator
SCHEDULES = 24


@pytest.mark.parametrize("offset", range(0, SCHEDULES, 6))
def test_matmul(seed: int, offset: int) -> None:
    for schedule in range(offset, offset + 6):
        case = matmul()
        case.run(victim_ptx("matmul"), seed * SCHEDULES + schedule)
        assert case.is_right()


@pytest.mark.parametrize(("m", "n", "k"), [(128, 192, 64), (120, 104, 192), (72, 8, 448)])
def test_matmul_with_partial_tiles(seed: int, m: int, n: int, k: int) -> None:
    """Rows and columns outside read as zero and are not written."""
    for schedule in range(3):
        case = matmul(m, n, k)
        report = case.run(victim_ptx("matmul"), seed + schedule)
        assert case.is_right()
        assert not sum(report.unwritten.values())


def test_schedules_do_not_change_results() -> None:
    outputs = []
    for schedule in range(6):
        case = matmul()
        case.run(victim_ptx("matmul"), schedule)
        outputs.append(case.output.view(torch.int16))
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_reduce(seed: int) -> None:
    for schedule in range(SCHEDULES):
        case = reduce()
        case.run(victim_ptx("reduce"), seed * SCHEDULES + schedule)
        torch.testing.assert_close(case.output.double(), case.expected, rtol=0, atol=0)


def test_report_counts() -> None:
    case = matmul()
    report = case.run(victim_ptx("matmul"), 0)
    wgmma = sum(count for opcode, count in report.opcodes.items() if opcode.startswith("wgmma.mma_async"))
    assert wgmma == 8 * 4 * 4  # 8 tiles, 4 slices, 4 warps
    assert report.instructions == sum(report.opcodes.values())
    assert report.shared_bytes >= case.plan.shared_bytes
