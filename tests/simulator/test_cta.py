"""Named barriers, mbarriers and setmaxnreg inside one CTA (PTX ISA "bar", "mbarrier", "setmaxnreg")."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.helpers import assert_fault, entry, per_thread, run

pytestmark = pytest.mark.simulator
SEEDS = range(5)
WARP = "shr.u32 %r31, %thread, 5;"


def spin(barrier: str, parity: str, label: str) -> str:
    return (
        f"{label}: mbarrier.try_wait.parity.shared::cta.b64 %p20, [{barrier}], {parity}; @!%p20 bra {label};"
    )


@pytest.mark.parametrize(
    "form",
    ["bar.sync 0", "bar.sync 3, 128", "barrier.sync 2", "barrier.cta.sync.aligned 5, 128", "bar.cta.sync 1"],
)
def test_exchange_through_barrier(form: str) -> None:
    body = f"""
        mov.u32 %r0, smem; mad.lo.u32 %r1, %thread, 4, %r0; mul.lo.u32 %r2, %thread, %thread;
        st.shared.b32 [%r1], %r2;
        {form};
        xor.b32 %r3, %thread, 127; mad.lo.u32 %r4, %r3, 4, %r0; ld.shared.b32 %r5, [%r4];
    """
    ptx = entry(body + per_thread("%rd1", "%rd0", 4) + "st.global.b32 [%rd1], %r5;")
    for seed in SEEDS:
        output = np.zeros(128, np.uint32)
        run(ptx, [(output, "w")], block=128, shared_bytes=512, seed=seed)
        np.testing.assert_array_equal(output, np.arange(127, -1, -1) ** 2)
    faulty = ptx.replace(f"{form};", "")
    assert_fault(
        ("race", "uninitialised"),
        lambda seed: run(faulty, [np.zeros(128, np.uint32)], block=128, shared_bytes=512, seed=seed),
    )


PRODUCER_CONSUMER = (
    WARP
    + """
    mov.u32 %r0, smem; mov.u32 %r10, 0;
    setp.ne.u32 %p1, %r31, 0;
    @%p1 bra CONSUMER;
PRODUCE:
    bar.sync 1, 64;
    mad.lo.u32 %r1, %lane, 4, %r0; add.u32 %r2, %r10, %lane;
    st.shared.b32 [%r1], %r2;
    bar.arrive 2, 64;
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 4; @%p2 bra PRODUCE;
    ret;
CONSUMER:
    bar.arrive 1, 64;
CONSUME:
    bar.sync 2, 64;
    xor.b32 %r3, %lane, 31; mad.lo.u32 %r3, %r3, 4, %r0; ld.shared.b32 %r4, [%r3];
    mad.lo.u32 %r5, %r10, 32, %lane; mad.wide.u32 %rd1, %r5, 4, %rd0; st.global.b32 [%rd1], %r4;
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 4;
    @%p2 bar.arrive 1, 64;
    @%p2 bra CONSUME;
"""
)


def test_barrier_arrive() -> None:
    """One warp fills a buffer four times, another empties it; bar.arrive does not block."""
    ptx = entry(PRODUCER_CONSUMER)
    for seed in range(10):
        output = np.zeros((4, 32), np.uint32)
        run(ptx, [(output, "w")], block=64, shared_bytes=128, seed=seed)
        np.testing.assert_array_equal(output, np.arange(4)[:, None] + np.arange(31, -1, -1))


def test_barrier_arrive_faults() -> None:
    def action(ptx: str):
        return lambda seed: run(
            entry(ptx), [np.zeros((4, 32), np.uint32)], block=64, shared_bytes=128, seed=seed
        )

    unguarded = PRODUCER_CONSUMER.replace("bar.sync 1, 64", "bar.arrive 3, 64").replace(
        "bar.arrive 1, 64", "bar.arrive 4, 64"
    )
    assert_fault(("race", "barrier", "deadlock"), action(unguarded))
    assert_fault("deadlock", action(PRODUCER_CONSUMER.replace("bar.arrive 2, 64;", "")))
    assert_fault(
        ("barrier", "deadlock"), action(PRODUCER_CONSUMER.replace("bar.arrive 2, 64;", "bar.arrive 2, 96;"))
    )


def test_barrier_missed_by_one_warp() -> None:
    body = WARP + "setp.ne.u32 %p1, %r31, 2; @%p1 bar.sync 1, 128;"
    assert_fault("deadlock", lambda seed: run(entry(body), [np.zeros(1, np.uint32)], block=128, seed=seed))


MBARRIER_RING = (
    WARP
    + f"""
    mov.u32 %r0, smem; add.u32 %r20, %r0, 512; add.u32 %r21, %r0, 520;
    setp.ne.u32 %p1, %thread, 0;
    @%p1 bra READY;
    mbarrier.init.shared::cta.b64 [%r20], 32;
    mbarrier.init.shared::cta.b64 [%r21], 96;
READY:
    bar.sync 0;
    mov.u32 %r10, 0; mov.u32 %r11, 0;
    setp.ne.u32 %p1, %r31, 0;
    @%p1 bra CONSUMER;
PRODUCE:
    xor.b32 %r12, %r11, 1;
    {spin("%r21", "%r12", "EMPTY")}
    mad.lo.u32 %r1, %lane, 4, %r0; mad.lo.u32 %r2, %r10, 100, %lane;
    st.shared.b32 [%r1], %r2;
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%r20];
    xor.b32 %r11, %r11, 1;
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 5; @%p2 bra PRODUCE;
    ret;
CONSUMER:
    {spin("%r20", "%r11", "FULL")}
    mad.lo.u32 %r3, %lane, 4, %r0; ld.shared.b32 %r4, [%r3];
    mbarrier.arrive.release.cta.shared::cta.b64 %rd9, [%r21];
    mad.lo.u32 %r5, %r10, 128, %thread; mad.wide.u32 %rd1, %r5, 4, %rd0; st.global.b32 [%rd1], %r4;
    xor.b32 %r11, %r11, 1;
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, 5; @%p2 bra CONSUMER;
"""
)


def ring(text: str, seed: int) -> np.ndarray:
    output = np.zeros((5, 128), np.uint32)
    run(entry(text), [output], block=128, shared_bytes=1024, seed=seed)
    return output


def test_mbarrier_phases() -> None:
    """A buffer handed from one warp to three others through two mbarriers and back, five rounds."""
    for seed in range(20):
        output = ring(MBARRIER_RING, seed)
        np.testing.assert_array_equal(
            output[:, 32:], np.tile(np.arange(5)[:, None] * 100 + np.arange(32), (1, 3))
        )


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (spin("%r20", "%r11", "FULL"), "FULL:", ("race", "uninitialised")),
        (spin("%r21", "%r12", "EMPTY"), "EMPTY:", ("race", "barrier", "deadlock")),
        ("mbarrier.arrive.release.cta.shared::cta.b64 %rd9, [%r21];", "", ("deadlock",)),
        ("mbarrier.arrive.release.cta.shared::cta.b64 _, [%r20];", "", ("deadlock",)),
        (
            "mbarrier.init.shared::cta.b64 [%r21], 96;",
            "mbarrier.init.shared::cta.b64 [%r21], 128;",
            ("deadlock",),
        ),
        (
            "mbarrier.init.shared::cta.b64 [%r21], 96;",
            "mbarrier.init.shared::cta.b64 [%r21], 64;",
            ("barrier", "race"),
        ),
        ("mbarrier.init.shared::cta.b64 [%r21], 96;", "", ("barrier", "uninitialised")),
        ("[%r20], 32;", "[%r20], 32; mbarrier.init.shared::cta.b64 [%r20], 32;", ("barrier",)),
        ("add.u32 %r20, %r0, 512", "add.u32 %r20, %r0, 508", ("misaligned",)),
        ("xor.b32 %r12, %r11, 1;", "mov.b32 %r12, %r11;", ("deadlock",)),
        ("bar.sync 0;", "", ("race", "barrier", "uninitialised")),
    ],
)
def test_mbarrier_faults(old: str, new: str, kinds: tuple[str, ...]) -> None:
    assert MBARRIER_RING.count(old) == 1
    assert_fault(kinds, lambda seed: ring(MBARRIER_RING.replace(old, new), seed))


def mbarrier_state(operations: str, count: int = 2) -> np.ndarray:
    """Values stored by `operations` (registers %r1.. to %rd0) by one thread around one mbarrier in %r0."""
    setup = f"mov.u32 %r0, smem; mbarrier.init.shared::cta.b64 [%r0], {count};"
    output = np.full(8, 99, np.uint32)
    run(entry(setup + operations), [output], block=1, shared_bytes=64)
    return output


def store(slot: int, predicate: str) -> str:
    return f"selp.u32 %r9, 1, 0, {predicate}; st.global.b32 [%rd0+{4 * slot}], %r9;"


def test_mbarrier_test_wait_and_pending_count() -> None:
    output = mbarrier_state(
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 1;"
        + store(0, "%p1")
        + "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;"
        + store(1, "%p1")
        + "mbarrier.arrive.shared::cta.b64 %rd1, [%r0];"
        + "mbarrier.pending_count.b64 %r5, %rd1; st.global.b32 [%rd0+8], %r5;"
        + "mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %rd2, [%r0], 1;"
        + "mbarrier.pending_count.b64 %r5, %rd2; st.global.b32 [%rd0+12], %r5;"
        + "mbarrier.arrive.shared::cta.b64 %rd3, [%r0], 2;"
        + "mbarrier.test_wait.shared::cta.b64 %p1, [%r0], %rd3;"
        + store(4, "%p1")
        + "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 1;"
        + store(5, "%p1")
        + "mbarrier.inval.shared::cta.b64 [%r0]; mbarrier.init.shared::cta.b64 [%r0], 1;"
        + "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;"
        + store(6, "%p1"),
        count=4,
    )
    assert output.tolist() == [1, 0, 4, 3, 1, 0, 0, 99]


def test_mbarrier_transactions() -> None:
    """A phase ends when both the arrivals and the transaction bytes are complete."""
    output = mbarrier_state(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 48;"
        "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r0], 16;"
        "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 32;"
        "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r0];"
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;"
        + store(0, "%p1")
        + "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r0], 32;"
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r0], 0;" + store(1, "%p1")
    )
    assert output.tolist()[:2] == [0, 1]


def test_mbarrier_try_wait_may_time_out() -> None:
    """try_wait of a phase that cannot end returns false in the end instead of blocking."""
    output = mbarrier_state("mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r0], 0, 1000;" + store(0, "%p1"))
    assert output[0] == 0


@pytest.mark.parametrize(
    ("operation", "kinds"),
    [
        ("mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %rd1, [%r0], 2;", "barrier"),
        (
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 1048575;"
            "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r0], 1;",
            "barrier",
        ),
        (
            "mbarrier.inval.shared::cta.b64 [%r0]; mbarrier.arrive.shared::cta.b64 %rd1, [%r0];",
            ("barrier", "uninitialised"),
        ),
        ("mbarrier.init.shared::cta.b64 [%r0], 2;", "barrier"),
        ("ld.shared.b32 %r1, [%r0]; st.global.b32 [%rd0], %r1;", ("barrier", "race", "uninitialised")),
        ("st.shared.b32 [%r0+4], %r0; mbarrier.arrive.shared::cta.b64 %rd1, [%r0];", ("barrier", "race")),
        ("mbarrier.arrive.shared::cta.b64 %rd1, [%r0], 3;", "barrier"),
    ],
)
def test_mbarrier_misuse(operation: str, kinds: str | tuple[str, ...]) -> None:
    """An mbarrier's bytes belong to mbarrier operations, within its counts (PTX ISA "mbarrier")."""
    body = "mov.u32 %r0, smem; mbarrier.init.shared::cta.b64 [%r0], 2;" + operation
    assert_fault(
        kinds, lambda seed: run(entry(body), [np.zeros(4, np.uint32)], block=1, shared_bytes=64, seed=seed)
    )


def registers(producer: int, consumer: int) -> str:
    body = (
        WARP
        + f"""
        setp.lt.u32 %p1, %r31, 4;
        @!%p1 bra CONSUMER;
        setmaxnreg.dec.sync.aligned.u32 {producer};
        bra JOIN;
    CONSUMER:
        setmaxnreg.inc.sync.aligned.u32 {consumer};
    JOIN:
    """
    )
    body += per_thread("%rd1", "%rd0", 4) + "st.global.b32 [%rd1], %thread;"
    return entry(body).replace(")\n{", ")\n.maxntid 384, 1, 1\n.minnctapersm 1\n{", 1)


def test_setmaxnreg() -> None:
    """Three warpgroups of 168 registers: 24 + 2 x 240 fit in the file of 64 K, 152 + 2 x 240 never do."""
    for seed in SEEDS:
        output = np.zeros(384, np.uint32)
        run(registers(24, 240), [(output, "w")], block=384, seed=seed)
        np.testing.assert_array_equal(output, np.arange(384))
    assert_fault(
        ("limit", "deadlock"),
        lambda seed: run(registers(152, 240), [np.zeros(384, np.uint32)], block=384, seed=seed),
    )
