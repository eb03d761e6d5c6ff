"""Loads, stores, state spaces, atomics and cp.async (PTX ISA "Data Movement")."""

from __future__ import annotations

import numpy as np
import pytest

from simulator import SimulationError
from simulator.helpers import aligned, assert_fault, entry, per_thread, run

pytestmark = pytest.mark.simulator


def aligned_words(count: int) -> np.ndarray:
    return aligned((count,), np.uint32)


def draw(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .integers(0, 256, count * np.dtype(dtype).itemsize, dtype=np.uint8)
        .view(dtype)
    )


@pytest.mark.parametrize(
    ("bits", "lanes"),
    [(bits, lanes) for bits in (8, 16, 32, 64) for lanes in (1, 2, 4) if bits * lanes <= 128],
)
def test_vector_load_store(bits: int, lanes: int) -> None:
    size, vector = bits // 8 * lanes, f".v{lanes}" if lanes > 1 else ""
    prefix = {8: "%h", 16: "%h", 32: "%r1", 64: "%rd1"}[bits]
    registers = [f"{prefix}{i}" for i in range(lanes)]
    group = "{" + ", ".join(registers) + "}" if lanes > 1 else registers[0]
    reverse = "{" + ", ".join(reversed(registers)) + "}" if lanes > 1 else registers[0]
    body = per_thread("%rd20", "%rd0", size) + per_thread("%rd21", "%rd1", size)
    body += f"ld.global{vector}.b{bits} {group}, [%rd21]; st.global{vector}.b{bits} [%rd20], {reverse};"
    source = draw(32 * lanes, f"u{bits // 8}")
    output = np.zeros_like(source)
    run(entry(body, parameters=2), [(output, "w"), (source, "r")])
    np.testing.assert_array_equal(output.reshape(32, lanes), source.reshape(32, lanes)[:, ::-1])


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32"])
def test_loads_extend(kind: str) -> None:
    source = draw(32, f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    body = per_thread("%rd2", "%rd1", source.itemsize) + per_thread("%rd3", "%rd0", 8)
    wide = "s64" if kind[0] == "s" else "u64"
    body += f"ld.global.{kind} %rd4, [%rd2]; st.global.{wide} [%rd3], %rd4;"
    output = np.zeros(32, np.int64)
    run(entry(body, parameters=2), [(output, "w"), (source, "r")])
    np.testing.assert_array_equal(output, source)


LOADS = [
    "",
    ".volatile",
    ".relaxed.gpu",
    ".acquire.gpu",
    ".nc",
    ".ca",
    ".cg",
    ".L1::no_allocate",
    ".nc.L1::no_allocate.L2::128B",
]


@pytest.mark.parametrize("form", LOADS)
def test_load_forms(form: str) -> None:
    volatile, nc = form.startswith((".volatile", ".relaxed", ".acquire")), form.startswith(".nc")
    operator = f"ld{form}.global" if volatile else f"ld.global{form}"
    store = f"st{form.replace('acquire', 'release')}.global" if volatile else "st.global"
    assert not (volatile and nc)
    body = (
        per_thread("%rd2", "%rd1", 4)
        + per_thread("%rd3", "%rd0", 4)
        + f"{operator}.b32 %r1, [%rd2]; {store}.b32 [%rd3], %r1;"
    )
    source, output = draw(32, "u4"), np.zeros(32, np.uint32)
    run(entry(body, parameters=2), [(output, "w"), (source, "r")])
    np.testing.assert_array_equal(output, source)


def test_store_narrow() -> None:
    """A store writes the low bytes of its register and leaves its neighbours alone."""
    body = (
        per_thread("%rd1", "%rd0", 8)
        + "mov.b32 %r1, 0x11223344; st.global.u8 [%rd1+1], %r1; st.global.u16 [%rd1+4], %r1;"
    )
    output = np.full((32, 8), 0xEE, np.uint8)
    run(entry(body), [output])
    np.testing.assert_array_equal(output, [[0xEE, 0x44, 0xEE, 0xEE, 0x44, 0x33, 0xEE, 0xEE]] * 32)


def test_state_spaces() -> None:
    """Module .const and .global arrays, .local arrays, generic addresses and isspacep."""
    module = """
    .const .align 4 .b32 table[4] = {10, 20, 0x30, -40};
    .global .align 4 .b8 counters[8] = {1, 2, 3, 4, 5};
    """
    body = """
        .local .align 16 .b8 stack[128];
        and.b32 %r1, %lane, 3;
        mov.u64 %rd1, table;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        ld.const.b32 %r2, [%rd2];
        and.b32 %r3, %lane, 7;
        mov.u64 %rd3, counters;
        cvt.u64.u32 %rd4, %r3;
        add.u64 %rd4, %rd3, %rd4;
        ld.global.u8 %r4, [%rd4];
        mov.u64 %rd5, stack;
        cvta.local.u64 %rd6, %rd5;
        mad.wide.u32 %rd7, %lane, 4, %rd6;
        st.b32 [%rd7], %lane;
        mad.wide.u32 %rd8, %lane, 4, %rd5;
        ld.local.b32 %r5, [%rd8];
        mov.u32 %r30, smem;
        cvt.u64.u32 %rd9, %r30;
        cvta.shared.u64 %rd10, %rd9;
        mad.wide.u32 %rd11, %lane, 4, %rd10;
        st.b32 [%rd11], %r2;
        ld.b32 %r6, [%rd11];
        isspacep.shared %p1, %rd11;
        isspacep.global %p2, %rd0;
        isspacep.local %p3, %rd6;
        isspacep.global %p4, %rd11;
        selp.u32 %r7, 1, 0, %p1;
        selp.u32 %r8, 2, 0, %p2;
        selp.u32 %r9, 4, 0, %p3;
        selp.u32 %r10, 8, 0, %p4;
        or.b32 %r7, %r7, %r8; or.b32 %r9, %r9, %r10; or.b32 %r7, %r7, %r9;
        cvta.to.shared.u64 %rd12, %rd11;
        cvt.u32.u64 %r11, %rd12;
        ld.shared.b32 %r12, [%r11];
    """
    body += per_thread("%rd20", "%rd0", 24)
    stores = ["%r2", "%r4", "%r5", "%r6", "%r7", "%r12"]
    body += "".join(f"st.global.b32 [%rd20+{4 * i}], {register};" for i, register in enumerate(stores))
    output = np.zeros((32, 6), np.int32)
    run(entry(body, module=module), [output], shared_bytes=1024)
    lane = np.arange(32)
    table = np.array([10, 20, 0x30, -40])[lane & 3]
    counters = np.array([1, 2, 3, 4, 5, 0, 0, 0])[lane & 7]
    np.testing.assert_array_equal(output, np.stack([table, counters, lane, table, np.full(32, 7), table], 1))


def test_static_shared_arrays() -> None:
    """Two static arrays do not overlap each other or dynamic shared memory."""
    module = ".shared .align 4 .b8 first[128];\n.shared .align 16 .b32 second[32];"
    body = (
        """
        mov.u32 %r1, first; mad.lo.u32 %r1, %lane, 4, %r1; st.shared.b32 [%r1], 1;
        mov.u32 %r2, second; mad.lo.u32 %r2, %lane, 4, %r2; st.shared.b32 [%r2], 2;
        mov.u32 %r3, smem; mad.lo.u32 %r3, %lane, 4, %r3; st.shared.b32 [%r3], 4;
        ld.shared.b32 %r4, [%r1]; ld.shared.b32 %r5, [%r2]; ld.shared.b32 %r6, [%r3];
        mad.lo.u32 %r4, %r4, 100, %r5; mad.lo.u32 %r4, %r4, 100, %r6;
    """
        + per_thread("%rd1", "%rd0", 4)
        + "st.global.b32 [%rd1], %r4;"
    )
    output = np.zeros(32, np.uint32)
    run(entry(body, module=module), [output], shared_bytes=128)
    assert set(output) == {10204}


ATOMICS = {
    "add.u32": (np.uint32, lambda values: values.sum(dtype=np.uint32)),
    "add.s32": (np.int32, lambda values: values.sum(dtype=np.int32)),
    "add.u64": (np.uint64, lambda values: values.sum(dtype=np.uint64)),
    "min.u32": (np.uint32, np.min),
    "max.s32": (np.int32, np.max),
    "min.s64": (np.int64, np.min),
    "and.b32": (np.uint32, np.bitwise_and.reduce),
    "or.b32": (np.uint32, np.bitwise_or.reduce),
    "xor.b32": (np.uint32, np.bitwise_xor.reduce),
    "add.f32": (np.float32, np.sum),
}


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation", ATOMICS)
def test_reduction(operation: str, space: str) -> None:
    """atom and red from 4 warps; atom returns the value before."""
    dtype, function = ATOMICS[operation]
    values = draw(128, np.dtype(dtype).str[1:], 3)
    if dtype == np.float32:
        values = np.arange(128, dtype=np.float32)
    bits = np.dtype(dtype).itemsize * 8
    register = "%rd10" if bits == 64 else "%r10"
    old = "%rd11" if bits == 64 else "%r11"
    target = "[%rd0]" if space == "global" else "[%r20]"
    load = f"ld.global.b{bits} {register}, [%rd2];"
    body = per_thread("%rd2", "%rd1", bits // 8) + load + "mov.u32 %r20, smem; setp.eq.u32 %p1, %thread, 0;"
    initial = np.zeros(1, dtype)
    if operation.startswith(("min", "and")):
        initial[0] = np.iinfo(dtype).max
    if space == "shared":
        body += f"@%p1 ld.global.b{bits} {old}, [%rd0]; @%p1 st.shared.b{bits} [%r20], {old}; bar.sync 0;"
    body += "and.b32 %r1, %thread, 1; setp.eq.u32 %p2, %r1, 0;"
    body += f"@%p2 red.{space}.{operation} {target}, {register};"
    body += f"@!%p2 atom.{space}.{operation} {old}, {target}, {register};"
    if space == "shared":
        body += f"bar.sync 0; @%p1 ld.shared.b{bits} {old}, [%r20]; @%p1 st.global.b{bits} [%rd0], {old};"
    output = initial.copy()
    run(entry(body, parameters=2), [output, (values, "r")], block=128, shared_bytes=128, seed=1)
    assert output[0] == function(np.concatenate([initial, values]))


def test_atomic_returns_old_value() -> None:
    """Tickets of an atomic counter are a permutation."""
    body = "atom.relaxed.gpu.global.add.u32 %r1, [%rd0], 1;" + per_thread("%rd2", "%rd1", 4)
    body += "st.global.b32 [%rd2], %r1;"
    counter, tickets = np.zeros(1, np.uint32), np.zeros(256, np.uint32)
    run(entry(body, parameters=2), [counter, (tickets, "w")], block=256, seed=2)
    assert counter[0] == 256
    np.testing.assert_array_equal(np.sort(tickets), np.arange(256))


def test_compare_and_swap() -> None:
    """A lock-free sum by CAS; exch swaps."""
    body = """
        ld.relaxed.gpu.global.b32 %r1, [%rd0];
    RETRY:
        add.u32 %r2, %r1, %thread;
        atom.global.cas.b32 %r3, [%rd0], %r1, %r2;
        setp.ne.u32 %p1, %r3, %r1;
        mov.b32 %r1, %r3;
        @%p1 bra RETRY;
        setp.eq.u32 %p2, %thread, 9;
        @%p2 atom.global.exch.b32 %r4, [%rd1], 55;
        @%p2 st.global.b32 [%rd1+4], %r4;
    """
    total, swapped = np.zeros(1, np.uint32), np.array([33, 0], np.uint32)
    run(entry(body, parameters=2), [total, swapped], block=64, seed=3)
    assert total[0] == sum(range(64)) and swapped.tolist() == [55, 33]


def test_atomics_between_ctas() -> None:
    body = "red.global.add.u32 [%rd0], 1; atom.global.inc.u32 %r1, [%rd0+4], 4;"
    output = np.zeros(2, np.uint32)
    run(entry(body), [output], grid=6, block=64)
    assert output.tolist() == [384, 384 % 5]


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(size: int) -> None:
    """Two groups, waited one by one; src-size below cp-size zero-fills."""
    cache = "cg" if size == 16 else "ca"
    body = f"""
        mov.u32 %r0, smem;
        mad.lo.u32 %r1, %thread, {size}, %r0;
        mad.wide.u32 %rd2, %thread, {size}, %rd1;
        cp.async.{cache}.shared.global [%r1], [%rd2], {size};
        cp.async.commit_group;
        cp.async.{cache}.shared.global [%r1+{64 * size}], [%rd2], {size}, {size // 2};
        cp.async.commit_group;
        cp.async.wait_group 1;
        bar.sync 0;
        xor.b32 %r2, %thread, 63;
        mad.lo.u32 %r3, %r2, {size}, %r0;
        mad.wide.u32 %rd3, %thread, {2 * size}, %rd0;
        ld.shared.b32 %r4, [%r3];
        st.global.b32 [%rd3], %r4;
        cp.async.wait_all;
        bar.sync 0;
        ld.shared.b32 %r5, [%r3+{64 * size + size - 4}];
        st.global.b32 [%rd3+4], %r5;
    """
    source, output = draw(16 * size, "u4"), np.zeros((64, size // 2), np.uint32)
    for seed in range(3):
        output[:] = 0
        run(entry(body, parameters=2), [output, (source, "r")], block=64, shared_bytes=128 * size, seed=seed)
        words = source.reshape(64, size // 4)[::-1]
        np.testing.assert_array_equal(output[:, 0], words[:, 0])
        expected = words[:, 0] & 0xFFFF if size == 4 else np.zeros(64)
        np.testing.assert_array_equal(output[:, 1], expected)


def test_cp_async_without_wait() -> None:
    body = """
        mov.u32 %r0, smem; mad.lo.u32 %r1, %lane, 16, %r0; mad.wide.u32 %rd2, %lane, 16, %rd1;
        cp.async.cg.shared.global [%r1], [%rd2], 16; cp.async.commit_group;
        ld.shared.b32 %r2, [%r1]; cp.async.wait_group 0; st.global.b32 [%rd0], %r2;
    """
    source, output = draw(128, "u4"), np.zeros(1, np.uint32)
    ptx = entry(body, parameters=2)
    assert_fault(
        ("race", "uninitialised"),
        lambda seed: run(ptx, [output, (source, "r")], shared_bytes=512, seed=seed),
    )


FAULTS = {
    "misaligned-global": ("ld.global.b32 %r1, [%rd0+2];", "misaligned"),
    "misaligned-vector": ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", "misaligned"),
    "misaligned-shared": ("st.shared.b64 [%r0+4], %rd0;", "misaligned"),
    "past-global": ("ld.global.b32 %r1, [%rd0+256];", "out-of-bounds"),
    "before-global": ("st.global.b32 [%rd0+-4], %r0;", "out-of-bounds"),
    "null": ("mov.u64 %rd1, 0; ld.global.b32 %r1, [%rd1];", "out-of-bounds"),
    "past-shared": ("st.shared.b32 [%r0+512], %r0;", "out-of-bounds"),
    "past-shared-vector": ("st.shared.v4.b32 [%r0+1024], {%r0, %r0, %r0, %r0};", "out-of-bounds"),
    "unwritten-shared": ("ld.shared.b32 %r1, [%r0+64]; st.global.b32 [%rd0], %r1;", "uninitialised"),
    "partly-written-shared": (
        "st.shared.b32 [%r0], %r0; ld.shared.b64 %rd1, [%r0]; st.global.b64 [%rd0], %rd1;",
        "uninitialised",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_access_faults(name: str) -> None:
    text, kind = FAULTS[name]
    memory = aligned_words(64)
    ptx = entry("mov.u32 %r0, smem;" + text)
    assert_fault(kind, lambda seed: run(ptx, [memory], shared_bytes=512, seed=seed))


def test_write_to_read_only_memory() -> None:
    ptx = entry("st.global.b32 [%rd0], 1;")
    assert_fault("out-of-bounds", lambda seed: run(ptx, [(aligned_words(4), "r")], seed=seed))


def test_read_of_unwritten_output() -> None:
    memory = aligned_words(64)
    ptx = entry(per_thread("%rd1", "%rd0", 4) + "st.global.b32 [%rd1], 1; ld.global.b32 %r1, [%rd0+128];")
    assert_fault("uninitialised", lambda seed: run(ptx, [(memory, "w")], seed=seed))


def test_unwritten_bytes_are_counted() -> None:
    memory, complete = aligned_words(64), aligned_words(32)
    text = (
        per_thread("%rd2", "%rd0", 4)
        + per_thread("%rd3", "%rd1", 4)
        + "st.global.b32 [%rd2], 1; st.global.b32 [%rd3], 2;"
    )
    report = run(entry(text, parameters=2), [(memory, "w"), (complete, "w")])
    assert report.unwritten.get(0) == 128 and not report.unwritten.get(1)


def test_fault_names_its_place() -> None:
    ptx = entry(
        "ld.global.b32 %r1, [%rd0];\nsetp.eq.u32 %p1, %thread, 37;\n@%p1 st.global.b32 [%rd0+6], %r1;"
    )
    with pytest.raises(SimulationError) as caught:
        run(ptx, [aligned_words(64)], grid=2, block=64)
    error = caught.value
    line = 1 + next(i for i, text in enumerate(ptx.splitlines()) if "+6" in text)
    assert (error.kind, error.kernel, error.warp, error.lane, error.ptx_line) == (
        "misaligned",
        "test",
        1,
        5,
        line,
    )
    assert "misaligned" in str(error) and "test" in str(error)


FENCES = """
    membar.cta; membar.gl; membar.sys; fence.acq_rel.cta; fence.acq_rel.gpu; fence.sc.cluster;
    fence.proxy.async; fence.proxy.async.global; fence.proxy.async.shared::cluster; fence.proxy.alias;
    fence.mbarrier_init.release.cluster;
    griddepcontrol.launch_dependents; griddepcontrol.wait; prefetch.global.L2 [%rd0]; prefetchu.L1 [%rd0];
    createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0; ld.global.L2::cache_hint.b32 %r1, [%rd0], %rd9;
    fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;
"""


def test_fences_and_hints_do_nothing_by_themselves() -> None:
    memory = aligned_words(32)
    memory[0] = 41
    run(entry(FENCES + "add.u32 %r1, %r1, 1; st.global.b32 [%rd0+64], %r1;"), [memory], block=1)
    assert memory[16] == 42


def test_release_acquire_orders_plain_accesses() -> None:
    """A flag published with st.release and polled with ld.acquire by another warp; relaxed is not enough."""
    body = """
        mov.u32 %r0, smem; setp.eq.u32 %p1, %thread, 0; @%p1 st.shared.b32 [%r0+4], 0; bar.sync 0;
        setp.eq.u32 %p2, %thread, 32;
        @%p1 bra WRITER; @%p2 bra READER; ret;
    WRITER:
        st.shared.b32 [%r0], 1234; st.release.cta.shared.b32 [%r0+4], 1; ret;
    READER:
        ld.acquire.cta.shared.b32 %r1, [%r0+4]; setp.eq.u32 %p3, %r1, 0; @%p3 bra READER;
        ld.shared.b32 %r2, [%r0]; st.global.b32 [%rd0], %r2;
    """
    output = np.zeros(1, np.uint32)

    def action(text: str):
        return lambda seed: run(entry(text), [output], block=64, shared_bytes=64, seed=seed)

    for seed in range(5):
        action(body)(seed)
        assert output[0] == 1234
    assert_fault("race", action(body.replace("st.release.cta", "st.relaxed.cta")))
    assert_fault("race", action(body.replace("ld.acquire.cta", "ld.relaxed.cta")))


def test_flag_between_ctas() -> None:
    """Data handed from CTA 0 to CTA 1 by a flag in global memory: both must be resident at once."""
    body = """
        mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra WRITER;
    READER:
        ld.acquire.gpu.global.b32 %r2, [%rd0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra READER;
        ld.global.b32 %r3, [%rd0+64]; st.global.b32 [%rd0+96], %r3; ret;
    WRITER:
        st.global.b32 [%rd0+64], 99; st.release.gpu.global.b32 [%rd0], 1;
    """
    for seed in range(5):
        memory = aligned_words(32)
        run(entry(body), [memory], block=1, grid=2, seed=seed)
        assert memory[24] == 99
