"""ldmatrix, stmatrix and mma.sync (PTX ISA "Matrix multiply-accumulate operation using mma instruction")."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulator.helpers import assert_fault, copy_words, entry, run

pytestmark = pytest.mark.simulator


def fragment(matrix: np.ndarray) -> np.ndarray:
    """32-bit register of each lane that holds an 8 x 8 matrix of 16-bit elements."""
    lane, half = np.meshgrid(np.arange(32), np.arange(2), indexing="ij")
    pairs = matrix[lane // 4, lane % 4 * 2 + half].astype(np.uint16)
    return np.ascontiguousarray(pairs).view(np.uint32)[:, 0]


def row_address(count: int) -> str:
    """%r5: lane l gives the address of row l of the matrices, which lie one behind the other."""
    return f"and.b32 %r4, %lane, {8 * count - 1}; mad.lo.u32 %r5, %r4, 16, %r0;"


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count: int, trans: str) -> None:
    source = np.random.default_rng(count).integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    registers = ", ".join(f"%r1{i}" for i in range(count))
    body = (
        "mov.u32 %r0, smem;"
        + copy_words("shared:%r0", "global:%rd1", 32 * count, 32, "COPY")
        + "bar.warp.sync 0xffffffff;"
    )
    body += (
        row_address(count) + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r5];"
    )
    body += f"mad.wide.u32 %rd5, %lane, {4 * count}, %rd0;"
    body += "".join(f"st.global.b32 [%rd5+{4 * i}], %r1{i};" for i in range(count))
    output = np.zeros((32, count), np.uint32)
    run(entry(body, parameters=2), [(output, "w"), (source, "r")], shared_bytes=512)
    for i in range(count):
        np.testing.assert_array_equal(output[:, i], fragment(source[i].T if trans else source[i]))


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count: int, trans: str) -> None:
    matrices = np.random.default_rng(count).integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    source = np.stack([fragment(matrix) for matrix in matrices], 1).copy()
    registers = ", ".join(f"%r1{i}" for i in range(count))
    body = "mov.u32 %r0, smem;" + row_address(count) + f"mad.wide.u32 %rd5, %lane, {4 * count}, %rd1;"
    body += "".join(f"ld.global.b32 %r1{i}, [%rd5+{4 * i}];" for i in range(count))
    body += f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r5], {{{registers}}};"
    body += "bar.warp.sync 0xffffffff;" + copy_words("global:%rd0", "shared:%r0", 32 * count, 32, "COPY")
    output = np.zeros((count, 8, 8), np.uint16)
    run(entry(body, parameters=2), [(output, "w"), (source, "r")], shared_bytes=512)
    np.testing.assert_array_equal(output, matrices.transpose(0, 2, 1) if trans else matrices)


def test_matrix_faults() -> None:
    body = "mov.u32 %r0, smem;" + row_address(1)
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r5]; st.global.b32 [%rd0], %r10;"

    def action(text: str):
        return lambda seed: run(entry(text), [np.zeros(1, np.uint32)], shared_bytes=256, seed=seed)

    assert_fault("uninitialised", action(body + load))
    assert_fault(
        "misaligned",
        action(body + "st.shared.v4.b32 [%r5], {%r0, %r0, %r0, %r0}; add.u32 %r5, %r5, 8;" + load),
    )
    assert_fault("out-of-bounds", action(body + "add.u32 %r5, %r5, 512;" + load))


def mma_fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Registers of A [16, 16], B [16, 8] (16-bit patterns) and C [16, 8] (fp32), a row a lane."""
    a_registers = [fragment(a[r : r + 8, k : k + 8]) for k in (0, 8) for r in (0, 8)]
    b_registers = [fragment(b[k : k + 8].T) for k in (0, 8)]
    lane = np.arange(32)
    c_registers = [c[lane // 4 + r, lane % 4 * 2 + i] for r in (0, 8) for i in (0, 1)]
    return np.stack(a_registers, 1), np.stack(b_registers, 1), np.stack(c_registers, 1).astype(np.float32)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_mma(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-8, 9, shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    patterns = [x.to(dtype).view(torch.int16).numpy().view(np.uint16) for x in (a, b)]
    a_registers, b_registers, c_registers = mma_fragments(*patterns, c.numpy())
    body = "mad.wide.u32 %rd10, %lane, 16, %rd1; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];"
    body += "mad.wide.u32 %rd11, %lane, 8, %rd2; ld.global.v2.b32 {%r14, %r15}, [%rd11];"
    body += "mad.wide.u32 %rd12, %lane, 16, %rd3; ld.global.v4.b32 {%r20, %r21, %r22, %r23}, [%rd12];"
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r24, %r25, %r26, %r27}}, "
    body += "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r20, %r21, %r22, %r23};"
    body += "mad.wide.u32 %rd13, %lane, 16, %rd0; st.global.v4.b32 [%rd13], {%r24, %r25, %r26, %r27};"
    output = np.zeros((32, 4), np.float32)
    memory = [
        (output, "w"),
        *((np.ascontiguousarray(x), "r") for x in (a_registers, b_registers, c_registers)),
    ]
    run(entry(body, parameters=4), memory)
    expected = (a.double() @ b.double() + c).numpy()
    lane = np.arange(32)
    for i in range(4):
        np.testing.assert_array_equal(output[:, i], expected[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2])
