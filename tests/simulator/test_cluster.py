"""Clusters: distributed shared memory, barriers, remote mbarriers, multicast (PTX ISA "barrier.cluster")."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulator.helpers import (
    assert_fault,
    copy_words,
    entry,
    init_barriers,
    pointers,
    run,
    tensor_map,
    wait_parity,
)

pytestmark = pytest.mark.simulator
SEEDS = range(6)
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
RANK = "mov.u32 %r30, %cluster_ctarank; xor.b32 %r31, %r30, 1;"


def test_cluster_registers() -> None:
    names = [
        "cluster_ctarank",
        "cluster_nctarank",
        "cluster_ctaid.x",
        "cluster_nctaid.x",
        "clusterid.x",
        "nclusterid.x",
        "ctaid.x",
    ]
    body = "mov.u32 %r0, %ctaid.x;" + f"mad.wide.u32 %rd1, %r0, {4 * len(names)}, %rd0;"
    body += "".join(
        f"mov.u32 %r8, %{name}; st.global.b32 [%rd1+{4 * i}], %r8;" for i, name in enumerate(names)
    )
    output = np.zeros((6, len(names)), np.uint32)
    run(entry(body), [(output, "w")], grid=6, block=1, cluster=2)
    expected = [[cta % 2, 2, cta % 2, 2, cta // 2, 3, cta] for cta in range(6)]
    np.testing.assert_array_equal(output, expected)


EXCHANGE = (
    RANK
    + """
    mov.u32 %r0, smem; mad.lo.u32 %r1, %thread, 4, %r0; mad.lo.u32 %r2, %r30, 1000, %thread;
    st.shared.b32 [%r1], %r2;
    """
    + MEET
    + """
    mapa.shared::cluster.u32 %r3, %r1, %r31;
    ld.shared::cluster.b32 %r4, [%r3];
    mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ntid.x; mad.lo.u32 %r5, %r5, %r6, %thread;
    mad.wide.u32 %rd1, %r5, 4, %rd0; st.global.b32 [%rd1], %r4;
    getctarank.shared::cluster.u32 %r7, %r3;
    setp.ne.u32 %p1, %r7, %r31; @%p1 st.global.b32 [%rd1], 7;
    """
    + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
)


def exchange(text: str, seed: int) -> np.ndarray:
    output = np.zeros((4, 64), np.uint32)
    run(entry(text), [(output, "w")], grid=4, block=64, cluster=2, shared_bytes=256, seed=seed)
    return output


def test_distributed_shared_memory() -> None:
    for seed in SEEDS:
        expected = np.array([1000, 0, 1000, 0])[:, None] + np.arange(64)
        np.testing.assert_array_equal(exchange(EXCHANGE, seed), expected)


def test_distributed_shared_memory_faults() -> None:
    assert EXCHANGE.count(MEET) == 1
    assert_fault(("race", "uninitialised"), lambda seed: exchange(EXCHANGE.replace(MEET, ""), seed))
    last = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    assert EXCHANGE.count(last) == 1
    assert_fault("exit", lambda seed: exchange(EXCHANGE.replace(last, ""), seed))
    relaxed = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
    assert_fault("race", lambda seed: exchange(EXCHANGE.replace(MEET, relaxed), seed))
    again = "setp.eq.u32 %p2, %r30, 0; @%p2 bra SKIP;" + last + last + "SKIP:"
    assert_fault(("deadlock", "exit"), lambda seed: exchange(EXCHANGE.replace(last, again), seed))


TRY_WAIT = """
WAIT:
    mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r0], 0; @!%p1 bra WAIT;
"""
REMOTE_ARRIVE = (
    RANK
    + "mov.u32 %r0, smem;"
    + init_barriers(64)
    + MEET
    + """
    add.u32 %r1, %r0, 64; mad.lo.u32 %r1, %thread, 4, %r1;
    mapa.shared::cluster.u32 %r2, %r1, %r31; mapa.shared::cluster.u32 %r3, %r0, %r31;
    mad.lo.u32 %r4, %r30, 500, %thread;
    st.shared::cluster.b32 [%r2], %r4;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];
"""
    + TRY_WAIT
    + """
    xor.b32 %r5, %thread, 63; mad.lo.u32 %r5, %r5, 4, %r0; ld.shared.b32 %r6, [%r5+64];
    mov.u32 %r7, %ctaid.x; mad.lo.u32 %r7, %r7, 64, %thread;
    mad.wide.u32 %rd1, %r7, 4, %rd0; st.global.b32 [%rd1], %r6;
"""
    + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
)


def test_remote_arrive() -> None:
    """Each CTA writes the other's buffer and arrives on the other's mbarrier."""
    for seed in SEEDS:
        output = exchange_buffer(REMOTE_ARRIVE, seed)
        expected = np.array([500, 0, 500, 0])[:, None] + np.arange(63, -1, -1)
        np.testing.assert_array_equal(output, expected)


def exchange_buffer(text: str, seed: int) -> np.ndarray:
    output = np.zeros((4, 64), np.uint32)
    run(entry(text), [output], grid=4, block=64, cluster=2, shared_bytes=320, seed=seed)
    return output


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        (TRY_WAIT, "", ("race", "uninitialised")),
        (MEET, "", ("race", "uninitialised", "barrier", "exit")),
        ("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r3];", "", ("deadlock",)),
        (
            "mapa.shared::cluster.u32 %r3, %r0, %r31;",
            "mapa.shared::cluster.u32 %r3, %r0, %r30;",
            ("race", "uninitialised"),
        ),
        ("bar.sync 0;", "bar.sync 0; setp.eq.u32 %p5, %r30, 1; @%p5 bra OUT;", ("deadlock", "exit")),
    ],
)
def test_remote_arrive_faults(old: str, new: str, kinds: tuple[str, ...]) -> None:
    assert REMOTE_ARRIVE.count(old) == 1
    faulty = REMOTE_ARRIVE.replace(old, new) + ("OUT:" if "OUT" in new else "")
    assert_fault(kinds, lambda seed: exchange_buffer(faulty, seed))


MULTICAST = (
    RANK
    + "mov.u32 %r0, smem; add.u32 %r1, %r0, 1024; mad.lo.u32 %r2, %r30, 1024, %r1;"
    + "mul.lo.u32 %r3, %r30, 8; mov.u32 %r4, 0; mov.u16 %h1, 3;"
    + init_barriers(1)
    + MEET
    + """
    setp.eq.u32 %p1, %thread, 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 2048;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
        [%r2], [%map0, {%r4, %r3}], [%r0], %h1;
    """
    + wait_parity("%r0", 0, "WAIT")
    + "mov.u32 %r7, %ctaid.x; mad.wide.u32 %rd1, %r7, 2048, %rd0;"
    + copy_words("global:%rd1", "shared:%r1", 512, 64, "COPY")
    + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
)


def multicast(text: str, seed: int) -> tuple[np.ndarray, torch.Tensor]:
    source = (torch.arange(16 * 64) % 251).reshape(16, 64).bfloat16()
    output = np.zeros((2, 16, 64), np.uint16)
    run(
        entry(text, maps=1),
        [(source, "r"), output],
        params=pointers(output),
        maps=[tensor_map(source, (64, 8), 0)],
        grid=2,
        block=64,
        cluster=2,
        shared_bytes=3072,
        seed=seed,
    )
    return output, source


def test_multicast() -> None:
    """Each CTA loads half of a tile into both, at the same offset; each barrier counts both halves."""
    for seed in SEEDS:
        output, source = multicast(MULTICAST, seed)
        expected = source.view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(output[0], expected)
        np.testing.assert_array_equal(output[1], expected)


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        ("[%r0], 2048;", "[%r0], 1024;", ("race", "uninitialised", "barrier")),
        ("mov.u16 %h1, 3;", "mov.u16 %h1, 1;", ("deadlock", "barrier", "race", "uninitialised")),
        ("fence.mbarrier_init.release.cluster;", "mov.u32 %r9, 0;", ("missing-fence",)),
        ("mov.u16 %h1, 3;", "mov.u16 %h1, 7;", ("out-of-bounds", "unsupported")),
    ],
)
def test_multicast_faults(old: str, new: str, kinds: tuple[str, ...]) -> None:
    assert MULTICAST.count(old) == 1
    assert_fault(kinds, lambda seed: multicast(MULTICAST.replace(old, new), seed))


def test_bulk_copy_to_another_cta() -> None:
    """cp.async.bulk from shared::cta to the peer's shared memory completes on the peer's mbarrier."""
    body = (
        RANK
        + "mov.u32 %r0, smem; add.u32 %r1, %r0, 128; add.u32 %r2, %r0, 384; mad.lo.u32 %r8, %thread, 4, %r1;"
        + "mad.lo.u32 %r9, %r30, 300, %thread; st.shared.b32 [%r8], %r9; fence.proxy.async.shared::cta;"
        + init_barriers(1)
        + MEET
        + """
        setp.eq.u32 %p1, %thread, 0;
        mapa.shared::cluster.u32 %r3, %r2, %r31; mapa.shared::cluster.u32 %r4, %r0, %r31;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], 256;
        @%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r3], [%r1], 256, [%r4];
        """
        + wait_parity("%r0", 0, "WAIT")
        + "mov.u32 %r7, %ctaid.x; mad.wide.u32 %rd1, %r7, 256, %rd0;"
        + copy_words("global:%rd1", "shared:%r2", 64, 64, "COPY")
        + "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    )
    for seed in SEEDS:
        output = np.zeros((2, 64), np.uint32)
        run(entry(body), [output], grid=2, block=64, cluster=2, shared_bytes=640, seed=seed)
        np.testing.assert_array_equal(output, np.array([300, 0])[:, None] + np.arange(64))
