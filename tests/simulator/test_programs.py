"""An ordinary CUDA C++ program, as nvcc compiles it, against torch."""

from __future__ import annotations

import pytest
import torch

from simulator import simulate
from simulator.helpers import assert_fault, edit, launch_plan, pointers
from simulator.victims import victim_ptx

pytestmark = pytest.mark.simulator
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def truncated_remainder(a: int, b: int) -> int:
    return abs(a) % b * (1 if a >= 0 else -1)


def signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def mix(thread: int, row: int) -> int:
    """The function of the same name in rows.cu."""
    slot = (thread * 5 + row) % 8
    value = PRIMES[(slot + row) % 8] * (thread + slot)
    branches = {
        0: lambda: value.bit_count() + 100,
        1: lambda: value // 7,
        2: lambda: truncated_remainder(-value, 13),
        3: lambda: signed(value * 123456789 >> 20),
        4: lambda: int(f"{value:032b}"[::-1], 2) >> 8,
        5: lambda: value ^ 0x5A5A,
    }
    return branches[(thread ^ row) % 6]()


def run_rows(rows: int, schedule: int, ptx: str) -> None:
    generator = torch.Generator().manual_seed(schedule)
    source = torch.randn(rows, 256, generator=generator) * 2
    softmax = torch.full((rows, 256), float("nan")).bfloat16()
    ordered = torch.full((rows, 256), float("nan"))
    histogram = torch.zeros(8, dtype=torch.int32)
    mixed = torch.zeros(rows, 128, dtype=torch.int32)
    outputs = (softmax, ordered, histogram, mixed)
    plan = launch_plan(pointers(source, *outputs), kernel="rows", grid=rows, block=128)
    memory = [(source, "r"), (softmax, "w"), (ordered, "w"), histogram, (mixed, "w")]
    report = simulate(ptx, plan, memory, seed=schedule)
    torch.testing.assert_close(softmax.double(), source.double().softmax(1), rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(ordered, source.sort(1).values, rtol=0, atol=0)
    bins = (source.abs() * 2).long().clamp(max=7)
    assert histogram.tolist() == torch.bincount(bins.flatten(), minlength=8).tolist()
    assert mixed.tolist() == [[mix(thread, row) for thread in range(128)] for row in range(rows)]
    assert not sum(report.unwritten.values())


@pytest.mark.parametrize("schedule", range(4))
def test_rows(seed: int, schedule: int) -> None:
    run_rows(3, 4 * seed + schedule, victim_ptx("rows"))


def test_rows_without_barriers() -> None:
    """Each __syncthreads of the program orders something."""
    ptx = victim_ptx("rows")
    count = ptx.count("bar.sync")
    assert count
    faulty = edit(ptx, r"bar\.sync\s+0;", "", count)
    assert_fault(("race", "uninitialised"), lambda seed: run_rows(1, seed, faulty))
