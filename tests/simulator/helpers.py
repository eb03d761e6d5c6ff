"""Helpers of the simulator's own tests: PTX text, plans, memory images, tensor maps and expected faults."""

from __future__ import annotations

import functools
import hashlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from simulator import SimulationError, simulate
from simulator.exact import FORMATS, convert, decode, encode

PROGRAMS = Path(__file__).parent / "programs"
ASSEMBLED = Path(__file__).parents[2] / "build" / "simulator" / "assembled"
ELEMENT_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def address(array: np.ndarray | torch.Tensor) -> int:
    """Device address of an array: its host address."""
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data


def pointers(*arrays: np.ndarray | torch.Tensor | int) -> bytes:
    """Params POD of 64-bit pointers and integers."""
    values = (value if isinstance(value, int) else address(value) for value in arrays)
    return b"".join(struct.pack("<Q", value & (2**64 - 1)) for value in values)


def aligned(shape: Sequence[int], dtype: np.dtype | type | str, alignment: int = 128) -> np.ndarray:
    """Zeroed numpy array whose address is a multiple of `alignment` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def tensor_map(
    tensor: torch.Tensor, box: Sequence[int], swizzle: int = 0, extents: Sequence[int] | None = None
) -> SimpleNamespace:
    """TensorMapPlan of a tensor whose last dimension is contiguous; extents and box are innermost first."""
    strides = [stride * tensor.element_size() for stride in reversed(tensor.stride())]
    return SimpleNamespace(
        address=tensor.data_ptr(),
        element_type=ELEMENT_TYPES[tensor.dtype],
        extents=tuple(extents or reversed(tensor.shape)),
        strides=tuple(strides[1:]),
        box=tuple(box),
        swizzle=swizzle,
    )


def launch_plan(
    params: bytes,
    *,
    kernel: str = "test",
    grid: int | tuple[int, int, int] = 1,
    block: int | tuple[int, int, int] = 32,
    cluster: int = 1,
    shared_bytes: int = 0,
    maps: Sequence[SimpleNamespace] = (),
) -> SimpleNamespace:
    def dims(value: int | tuple[int, int, int]) -> tuple[int, int, int]:
        return value if isinstance(value, tuple) else (value, 1, 1)

    return SimpleNamespace(
        kernel=kernel,
        grid=dims(grid),
        block=dims(block),
        cluster=dims(cluster),
        shared_bytes=shared_bytes,
        maps=list(maps),
        params=params,
    )


def entry(body: str, *, parameters: int = 1, maps: int = 0, declarations: str = "", module: str = "") -> str:
    """PTX module with one entry `test(maps, params)`; dynamic shared memory is `smem`.

    %thread and %lane are ready, the 64-bit params are in %rd0.. and map i's address in %map<i>.
    """
    slots = [f".param .align 64 .b8 maps[{128 * maps}]"] if maps else []
    slots.append(f".param .align 8 .b8 params[{8 * parameters}]")
    load = [f"ld.param.u64 %rd{i}, [params+{8 * i}];" for i in range(parameters)]
    load += ["mov.b64 %map0, maps;", "cvta.param.u64 %map0, %map0;"] if maps else []
    load += [f"add.u64 %map{i}, %map0, {128 * i};" for i in range(1, maps)]
    return "\n".join(
        [
            ".version 8.7\n.target sm_90a\n.address_size 64",
            ".extern .shared .align 1024 .b8 smem[];",
            module,
            f".visible .entry test({', '.join(slots)})\n{{",
            ".reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<330>; .reg .b64 %rd<64>; .reg .b64 %map<8>;",
            ".reg .b32 %thread; .reg .b32 %lane;",
            declarations,
            "mov.u32 %thread, %tid.x;\nand.b32 %lane, %thread, 31;",
            *load,
            body,
            "ret;\n}\n",
        ]
    )


@functools.cache
def assemble(ptx: str) -> str:
    """Check once, with ptxas, that a hand-written program is valid PTX for sm_90a."""
    marker = ASSEMBLED / hashlib.sha256(ptx.encode()).hexdigest()
    if not marker.exists():
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory) / "test.ptx"
            source.write_text(ptx)
            command = ["ptxas", "-arch=sm_90a", "-O0", "-o", "/dev/null", str(source)]
            result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{result.stderr}\n{ptx}"
        ASSEMBLED.mkdir(parents=True, exist_ok=True)
        marker.touch()
    return ptx


def run(ptx: str, arrays: Sequence[Any], *, seed: int = 0, params: bytes | None = None, **plan: Any) -> Any:
    """Assemble and simulate; arrays are memory entries and, unless params is given, the pointers in order."""
    if params is None:
        params = pointers(*(array[0] if isinstance(array, tuple) else array for array in arrays))
    return simulate(assemble(ptx), launch_plan(params, **plan), list(arrays), seed=seed)


def per_thread(register: str, base: str, size: int, index: str = "%thread") -> str:
    """register = base + index * size, 64-bit."""
    return f"mad.wide.u32 {register}, {index}, {size}, {base};"


def copy_words(target: str, source: str, words: int, threads: int, label: str) -> str:
    """Copy 32-bit words by all threads; addresses "shared:%r" (32-bit) or "global:%rd" (64-bit) registers."""

    def operand(place: str, scratch: str) -> tuple[str, str, str]:
        space, register = place.split(":")
        if space == "shared":
            return f"mad.lo.u32 %r3{scratch}0, %r300, 4, {register};", space, f"%r3{scratch}0"
        return f"mad.wide.u32 %rd6{scratch}, %r300, 4, {register};", space, f"%rd6{scratch}"

    to, to_space, to_register = operand(target, "1")
    from_, from_space, from_register = operand(source, "2")
    return f"""
        mov.u32 %r300, %thread;
        setp.ge.u32 %p30, %r300, {words};
        @%p30 bra {label}_END;
    {label}:
        {to} {from_}
        ld.{from_space}.b32 %r301, [{from_register}];
        st.{to_space}.b32 [{to_register}], %r301;
        add.u32 %r300, %r300, {threads};
        setp.lt.u32 %p30, %r300, {words};
        @%p30 bra {label};
    {label}_END:
    """


def wait_parity(barrier: str, parity: int | str, label: str) -> str:
    """Spin until the phase of `parity` of the mbarrier at a shared address register has completed."""
    return (
        f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p31, [{barrier}], {parity}; @!%p31 bra {label};"
    )


def init_barriers(*counts: int, base: str = "%r0") -> str:
    """One thread initialises mbarriers at base, base + 8, ..., then the CTA meets."""
    inits = "".join(
        f"@%p30 mbarrier.init.shared::cta.b64 [{base}+{8 * i}], {count};" for i, count in enumerate(counts)
    )
    return f"setp.eq.u32 %p30, %thread, 0; {inits} @%p30 fence.mbarrier_init.release.cluster; bar.sync 0;"


def swizzled(offsets: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared byte address of each unswizzled one: bits 4.. ^= bits 7.. (PTX ISA "Swizzling Modes")."""
    bits = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    return offsets ^ ((offsets >> 7 & bits) << 4)


def map_elements(
    instruction: str, result: str, operands: Sequence[str], arrays: Sequence[np.ndarray]
) -> np.ndarray:
    """Run one instruction over arrays, an element a thread: operands %a, %b, ... and result %d.

    Types are PTX fundamental types; arrays hold them as numpy arrays of the same width.
    """
    count = arrays[0].size
    assert count % 32 == 0
    widths = [
        int(re.sub(r"\D", "", kind.replace("x2", ""))) * (2 if "x2" in kind else 1)
        for kind in [result, *operands]
    ]
    names = ["d", *"abcefgh"[: len(operands)]]
    declarations = " ".join(
        f".reg .b{max(width, 16)} %{name};" for width, name in zip(widths, names, strict=True)
    )
    body = ["mov.u32 %r0, %ctaid.x;", "mov.u32 %r1, %ntid.x;", "mad.lo.u32 %r0, %r0, %r1, %thread;"]
    for slot, (width, name) in enumerate(zip(widths[1:], names[1:], strict=True), start=1):
        body += [
            per_thread("%rd10", f"%rd{slot}", width // 8, "%r0"),
            f"ld.global.b{width} %{name}, [%rd10];",
        ]
    body += [
        instruction,
        per_thread("%rd10", "%rd0", widths[0] // 8, "%r0"),
        f"st.global.b{widths[0]} [%rd10], %d;",
    ]
    block = next(size for size in (128, 64, 32) if count % size == 0)
    output = np.zeros(count, f"u{widths[0] // 8}")
    inputs = [(np.ascontiguousarray(array), "r") for array in arrays]
    ptx = entry("\n".join(body), parameters=1 + len(arrays), declarations=declarations)
    run(ptx, [(output, "w"), *inputs], grid=count // block, block=block)
    return output


def float_samples(kind: str, count: int, operands: int, seed: int) -> list[np.ndarray]:
    """Bit patterns for each operand: special values in random combinations, random bits, near one."""
    fmt = FORMATS[kind]
    random = np.random.default_rng(seed)
    ulp = 2.0**-fmt.fraction
    finite = [
        0.0,
        fmt.min_normal * ulp,
        fmt.min_normal * (1 - ulp),
        fmt.min_normal,
        1.0,
        1 + ulp,
        1.5,
        2 - ulp,
    ]
    finite += [3.0, 0.1, float(fmt.max_finite), float(fmt.max_finite) / 2]
    values = [*finite, *(-value for value in finite), np.inf, -np.inf, np.nan]
    special = np.array([encode(convert(value, fmt), fmt) for value in values], fmt.unsigned)
    columns = []
    for _ in range(operands):
        picked = random.choice(special, count // 2)
        drawn = random.integers(0, 1 << fmt.bits, count // 4, dtype=np.uint64)
        near_one = random.integers(0, 1 << fmt.fraction, count - count // 2 - count // 4, dtype=np.uint64)
        near_one += np.uint64(encode(1.0, fmt))
        columns.append(np.concatenate([picked.astype(np.uint64), drawn, near_one]).astype(fmt.unsigned))
    return columns


def assert_floats(
    actual: np.ndarray, expected: Sequence[float], kind: str, operands: Sequence[np.ndarray] = ()
) -> None:
    """Bitwise equality; NaN equals any NaN."""
    fmt = FORMATS[kind]
    wanted = np.array([encode(value, fmt) for value in expected], fmt.unsigned)
    both_nan = np.isnan(decode(actual, fmt)) & np.isnan(decode(wanted, fmt))
    wrong = np.flatnonzero((actual != wanted) & ~both_nan)
    details = [
        f"{[hex(int(column[i])) for column in operands]} -> {int(actual[i]):#x}, expected {int(wanted[i]):#x}"
        for i in wrong[:5]
    ]
    assert not wrong.size, f"{wrong.size} of {actual.size} differ:\n" + "\n".join(details)


def edit(ptx: str, pattern: str, replacement: str | Callable[[re.Match[str]], str], count: int = 1) -> str:
    """Replace exactly `count` matches of a multi-line regex in PTX text."""
    found = re.findall(pattern, ptx, flags=re.MULTILINE)
    assert len(found) == count, f"{pattern!r}: {len(found)} matches, expected {count}"
    edited = re.sub(pattern, replacement, ptx, flags=re.MULTILINE)
    assert edited != ptx
    return edited


def assert_fault(
    kinds: str | Sequence[str], action: Callable[[int], Any], seeds: Sequence[int] = range(5)
) -> None:
    """action(seed) must raise SimulationError of one of the kinds for every seed."""
    expected = {kinds} if isinstance(kinds, str) else set(kinds)
    for seed in seeds:
        with pytest.raises(SimulationError) as caught:
            action(seed)
        assert caught.value.kind in expected, f"seed {seed}: {caught.value}"
