"""The victim kernels of programs/: their PTX, inputs, launch plans and expected results."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from simulator import Report, compile_ptx, simulate
from simulator.helpers import PROGRAMS, launch_plan, pointers, tensor_map

DECAY = 0.75
MATMUL_SHARED = 6 * 8192 + 4096 + 48


@functools.cache
def victim_ptx(name: str) -> str:
    return compile_ptx(PROGRAMS / f"{name}.cu", include_dirs=[])


@dataclass
class Case:
    """One launch: memory[-1] is the output, expected its right value."""

    plan: SimpleNamespace
    memory: list[Any]
    expected: torch.Tensor

    @property
    def output(self) -> torch.Tensor:
        last = self.memory[-1]
        return last[0] if isinstance(last, tuple) else last

    def run(self, ptx: str, seed: int) -> Report:
        return simulate(ptx, self.plan, self.memory, seed=seed, max_steps=2_000_000)

    def is_right(self) -> bool:
        return torch.allclose(self.output.double(), self.expected, rtol=2**-7, atol=2**-7)


def matmul(
    m: int = 64, n: int = 64, k: int = 512, *, swizzles: tuple[int, int, int] = (128, 128, 64)
) -> Case:
    """A [m, k], B [n, k], C [m, n] bf16; k a multiple of 64."""
    torch.manual_seed(m + n + k)
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    c = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    boxes = ((64, 64), (64, 64), (32, 64))
    maps = [tensor_map(x, box, swizzle) for x, box, swizzle in zip((a, b, c), boxes, swizzles, strict=True)]
    plan = launch_plan(
        struct.pack("<if", k // 64, DECAY),
        kernel="matmul",
        grid=(-(-n // 64), -(-m // 64), 1),
        block=256,
        shared_bytes=MATMUL_SHARED,
        maps=maps,
    )
    expected = torch.zeros(m, n, dtype=torch.float64)
    for start in range(0, k, 64):
        expected = DECAY * expected + a[:, start : start + 64].double() @ b[:, start : start + 64].double().T
    return Case(plan, [(a, "r"), (b, "r"), (c, "w")], expected)


def reduce(ctas: int = 3, rows: int = 5) -> Case:
    """out [rows, 256] = initial + 2 * sum of in [ctas, rows, 256]; integers, so exact in any order."""
    torch.manual_seed(ctas + rows)
    source = torch.randint(-50, 50, (ctas, rows, 256)).float()
    out = torch.randint(-50, 50, (rows, 256)).float()
    expected = (out + 2 * source.sum(0)).double()
    params = pointers(source, out, rows)
    plan = launch_plan(params, kernel="reduce", grid=ctas, block=128)
    return Case(plan, [(source, "r"), out], expected)
