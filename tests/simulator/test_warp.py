"""Warp-level instructions, predication and divergence (PTX ISA "shfl.sync", "vote.sync", ...)."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.helpers import assert_fault, entry, map_elements, per_thread, run

pytestmark = pytest.mark.simulator
LANES = np.arange(32, dtype=np.uint32)
FULL = "0xffffffff"


def draw(seed: int, high: int = 1 << 32, count: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, count, dtype=np.uint64).astype(np.uint32)


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """Source lane and predicate by the pseudocode of shfl.sync (PTX ISA "shfl.sync")."""
    bound, segment = c & 31, c >> 8 & 31
    last = (lane & segment) | (bound & ~segment & 31)
    source, valid = {
        "up": (lane - (b & 31), lane - (b & 31) >= last),
        "down": (lane + (b & 31), lane + (b & 31) <= last),
        "bfly": (lane ^ (b & 31), lane ^ (b & 31) <= last),
        "idx": ((lane & segment) | (b & ~segment & 31), ((lane & segment) | (b & ~segment & 31)) <= last),
    }[mode]
    if mode == "bfly":
        valid = (lane ^ (b & 31)) <= last
    return (source if valid else lane), valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffle(mode: str, width: int) -> None:
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    values, offsets = draw(0), draw(1, 32)
    expected = [shuffled(mode, lane, int(offsets[lane]), clamp) for lane in range(32)]
    text = f"shfl.sync.{mode}.b32 %d, %a, %b, {clamp}, {FULL};"
    np.testing.assert_array_equal(
        map_elements(text, "b32", ["b32", "b32"], [values, offsets]),
        [values[source] for source, _ in expected],
    )
    text = f"shfl.sync.{mode}.b32 %r9|%p1, %a, %b, {clamp}, {FULL}; selp.b32 %d, 1, 0, %p1;"
    np.testing.assert_array_equal(
        map_elements(text, "b32", ["b32", "b32"], [values, offsets]), [valid for _, valid in expected]
    )


def test_shuffle_of_members() -> None:
    """Only the lanes of the member mask take part, in a divergent branch."""
    text = """
        mov.b32 %d, %a;
        setp.ge.u32 %p1, %lane, 16;
        @%p1 bra SKIP;
        shfl.sync.bfly.b32 %d, %a, 5, 31, 0x0000ffff;
    SKIP:
    """
    values = draw(2)
    expected = np.where(LANES < 16, values[LANES ^ np.where(LANES < 16, 5, 0)], values)
    np.testing.assert_array_equal(map_elements(text, "b32", ["b32"], [values]), expected)


@pytest.mark.parametrize("pattern", [0, 0xFFFFFFFF, 0x00FF1234, 1 << 31])
def test_vote(pattern: int) -> None:
    flags = (np.uint32(pattern) >> LANES) & 1
    setup = "setp.ne.u32 %p1, %a, 0;"
    select = "selp.u32 %d, 1, 0, %p2;"
    for mode, expected in {
        "all": pattern == 0xFFFFFFFF,
        "any": pattern != 0,
        "uni": pattern in (0, 0xFFFFFFFF),
    }.items():
        text = f"{setup} vote.sync.{mode}.pred %p2, %p1, {FULL}; {select}"
        assert set(map_elements(text, "u32", ["u32"], [flags])) == {int(expected)}, mode
    text = f"{setup} vote.sync.ballot.b32 %d, %p1, {FULL};"
    assert set(map_elements(text, "u32", ["u32"], [flags])) == {pattern}
    text = f"{setup} vote.sync.ballot.b32 %d, !%p1, {FULL};"
    assert set(map_elements(text, "u32", ["u32"], [flags])) == {pattern ^ 0xFFFFFFFF}


def test_active_mask() -> None:
    text = """
        and.b32 %r8, %lane, 3;
        setp.eq.u32 %p1, %r8, 0;
        @%p1 bra FOURTH;
        activemask.b32 %d;
        bra JOIN;
    FOURTH:
        activemask.b32 %d;
    JOIN:
    """
    fourth = 0x11111111
    actual = map_elements(text, "u32", ["u32"], [LANES])
    for lane, mask in enumerate(actual.tolist()):
        group = fourth if lane % 4 == 0 else fourth ^ 0xFFFFFFFF
        assert mask & ~group == 0 and mask >> lane & 1


@pytest.mark.parametrize("bits", [32, 64])
def test_match(bits: int) -> None:
    values = draw(3, 5).astype(f"u{bits // 8}") << (bits - 8)
    text = f"match.any.sync.b{bits} %d, %a, {FULL};"
    expected = [sum(1 << int(lane) for lane in np.flatnonzero(values == value)) for value in values]
    np.testing.assert_array_equal(map_elements(text, "u32", [f"b{bits}"], [values]), expected)
    text = f"match.all.sync.b{bits} %d|%p1, %a, {FULL}; @!%p1 add.u32 %d, %d, 7;"
    assert set(map_elements(text, "u32", [f"b{bits}"], [values])) == {7}
    assert set(map_elements(text, "u32", [f"b{bits}"], [np.full_like(values, 9)])) == {0xFFFFFFFF}


@pytest.mark.parametrize(
    ("name", "kind", "function"),
    [
        ("add", "u32", lambda values: values.sum(dtype=np.uint32)),
        ("add", "s32", lambda values: values.view(np.int32).sum(dtype=np.int32)),
        ("min", "u32", np.min),
        ("max", "u32", np.max),
        ("min", "s32", lambda values: values.view(np.int32).min()),
        ("max", "s32", lambda values: values.view(np.int32).max()),
        ("and", "b32", np.bitwise_and.reduce),
        ("or", "b32", np.bitwise_or.reduce),
        ("xor", "b32", np.bitwise_xor.reduce),
    ],
)
def test_redux(name: str, kind: str, function: object) -> None:
    values = draw(4)
    actual = map_elements(f"redux.sync.{name}.{kind} %d, %a, {FULL};", "u32", ["u32"], [values])
    assert set(actual.tolist()) == {int(function(values)) & 0xFFFFFFFF}
    text = f"mov.b32 %d, 0; setp.lt.u32 %p1, %lane, 8; @%p1 redux.sync.{name}.{kind} %d, %a, 0xff;"
    actual = map_elements(text, "u32", ["u32"], [values])
    assert set(actual[:8].tolist()) == {int(function(values[:8])) & 0xFFFFFFFF} and not actual[8:].any()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFF0000, 0x00000100])
def test_elect(mask: int) -> None:
    """Exactly one lane of the mask is elected and every lane learns which (PTX ISA "elect.sync")."""
    member = f"shr.u32 %r8, {mask}, %lane; and.b32 %r8, %r8, 1; setp.ne.u32 %p1, %r8, 0; mov.b32 %d, 0x55;"
    text = (
        member
        + f"@!%p1 bra SKIP; elect.sync %r9|%p2, {mask};"
        + "selp.u32 %r10, 256, 0, %p2; or.b32 %d, %r9, %r10; SKIP:"
    )
    actual = map_elements(text, "u32", ["u32"], [LANES])
    members = [lane for lane in range(32) if mask >> lane & 1]
    leader = int(actual[members[0]]) & 31
    assert leader in members
    for lane in range(32):
        assert int(actual[lane]) == (leader + 256 * (lane == leader) if lane in members else 0x55)


def test_predication() -> None:
    text = "setp.lt.s32 %p1, %a, 0; mov.b32 %d, 5; @%p1 mov.b32 %d, 6; @!%p1 add.u32 %d, %d, 10;"
    values = draw(5)
    expected = np.where(values.view(np.int32) < 0, 6, 15)
    np.testing.assert_array_equal(map_elements(text, "u32", ["s32"], [values]), expected)


def test_loop_with_divergent_trip_counts() -> None:
    """Collatz steps of every lane's value; lanes leave the loop at different times and meet at a shuffle."""
    text = f"""
        mov.u32 %r8, 0;
    LOOP:
        setp.le.u32 %p1, %a, 1;
        @%p1 bra DONE;
        and.b32 %r9, %a, 1;
        setp.eq.u32 %p2, %r9, 0;
        @%p2 bra EVEN;
        mad.lo.u32 %a, %a, 3, 1;
        bra NEXT;
    EVEN:
        shr.u32 %a, %a, 1;
    NEXT:
        add.u32 %r8, %r8, 1;
        bra LOOP;
    DONE:
        bar.warp.sync {FULL};
        shfl.sync.bfly.b32 %r10, %r8, 1, 31, {FULL};
        mad.lo.u32 %d, %r8, 1000, %r10;
    """

    def steps(value: int) -> int:
        return 0 if value <= 1 else 1 + steps(value * 3 + 1 if value & 1 else value // 2)

    counts = np.array([steps(lane + 1) for lane in range(32)])
    expected = counts * 1000 + counts[LANES ^ 1]
    np.testing.assert_array_equal(map_elements(text, "u32", ["u32"], [LANES + 1]), expected)


def test_nested_branches_and_early_return() -> None:
    text = """
        mov.b32 %d, 1;
        setp.lt.u32 %p1, %lane, 20;
        @!%p1 bra OUTER;
        setp.lt.u32 %p2, %lane, 7;
        @%p2 bra INNER;
        add.u32 %d, %d, 10;
        bra JOIN;
    INNER:
        setp.eq.u32 %p3, %lane, 3;
        st.global.b32 [%rd0], %d;
        @%p3 ret;
        add.u32 %d, %d, 100;
    JOIN:
        add.u32 %d, %d, 1000;
    OUTER:
    """
    expected = np.where(LANES < 20, np.where(LANES < 7, 1101, 1011), 1)
    expected[0], expected[3] = 1101, 0
    output = np.zeros(32, np.uint32)
    body = text + per_thread("%rd1", "%rd0", 4) + "st.global.b32 [%rd1], %d;"
    run(entry(body, declarations=".reg .b32 %d;"), [output])
    np.testing.assert_array_equal(output, expected)


def test_indirect_branch() -> None:
    text = """
        and.b32 %r8, %a, 3;
        TARGETS: .branchtargets ZERO, ONE, TWO, THREE;
        brx.idx %r8, TARGETS;
    ZERO: mov.b32 %d, 10; bra JOIN;
    ONE: mov.b32 %d, 11; bra JOIN;
    TWO: mov.b32 %d, 12; bra JOIN;
    THREE: mov.b32 %d, 13;
    JOIN:
    """
    values = draw(6)
    np.testing.assert_array_equal(map_elements(text, "u32", ["u32"], [values]), 10 + (values & 3))


@pytest.mark.parametrize("waiting", [0, 31])
def test_divergent_lanes_make_progress(waiting: int) -> None:
    """One lane spins on a flag that another lane of its warp sets later in program order."""
    body = f"""
        mov.u32 %r0, smem;
        setp.eq.u32 %p1, %lane, 5;
        @%p1 st.shared.b32 [%r0], 0;
        bar.warp.sync {FULL};
        setp.eq.u32 %p1, %lane, {waiting};
        @!%p1 bra OTHER;
    SPIN:
        ld.acquire.cta.shared.b32 %r1, [%r0];
        setp.eq.u32 %p2, %r1, 0;
        @%p2 bra SPIN;
        st.global.b32 [%rd0], %r1;
        bra JOIN;
    OTHER:
        setp.eq.u32 %p3, %lane, 5;
        mov.b32 %r2, 77;
        @%p3 st.release.cta.shared.b32 [%r0], %r2;
    JOIN:
    """
    output = np.zeros(1, np.uint32)
    for seed in range(5):
        output[:] = 0
        run(entry(body), [output], shared_bytes=1024, seed=seed)
        assert output[0] == 77


def test_special_registers() -> None:
    """Indices of a 2-D grid and block, lane masks and dimensions."""
    names = [
        "tid.x",
        "tid.y",
        "tid.z",
        "ntid.x",
        "ntid.y",
        "ctaid.x",
        "ctaid.y",
        "nctaid.x",
        "nctaid.y",
        "laneid",
    ]
    names += ["lanemask_eq", "lanemask_lt", "lanemask_le", "lanemask_gt", "lanemask_ge"]
    body = """
        mov.u32 %r1, %tid.y; mov.u32 %r2, %ntid.x; mov.u32 %r3, %ntid.y; mad.lo.u32 %r0, %r1, %r2, %thread;
        mul.lo.u32 %r4, %r2, %r3; mov.u32 %r5, %ctaid.y; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %ctaid.x;
        mad.lo.u32 %r5, %r5, %r6, %r7; mad.lo.u32 %r0, %r5, %r4, %r0;
    """
    body += per_thread("%rd1", "%rd0", 4 * len(names), "%r0")
    body += "".join(
        f"mov.u32 %r8, %{name}; st.global.b32 [%rd1+{4 * i}], %r8;" for i, name in enumerate(names)
    )
    output = np.zeros((6, 64, len(names)), np.uint32)
    run(entry(body), [output], grid=(3, 2, 1), block=(16, 4, 1))
    for cta in range(6):
        for thread in range(64):
            lane = thread % 32
            below = (1 << lane) - 1
            expected = [thread % 16, thread // 16, 0, 16, 4, cta % 3, cta // 3, 3, 2, lane]
            expected += [1 << lane, below, below * 2 + 1, ~(below * 2 + 1) & 0xFFFFFFFF, ~below & 0xFFFFFFFF]
            np.testing.assert_array_equal(output[cta, thread], expected)


def test_clock_is_monotone() -> None:
    body = "mov.u64 %rd1, %clock64; mov.u64 %rd2, %clock64; setp.ge.u64 %p1, %rd2, %rd1;"
    body += "selp.u32 %r1, 1, 0, %p1;"
    output = np.zeros(1, np.uint32)
    run(entry(body + "nanosleep.u32 20; st.global.b32 [%rd0], %r1;"), [output], block=1)
    assert output[0] == 1


def test_unknown_instruction_is_named() -> None:
    ptx = entry("dp2a.lo.u32.u32 %r1, %r2, %r3, %r4;")
    output = np.zeros(1, np.uint32)
    assert_fault("unknown-instruction", lambda seed: run(ptx, [output], seed=seed), seeds=[0])
    with pytest.raises(Exception, match="dp2a"):
        run(ptx, [output])


def test_trap_is_unsupported() -> None:
    assert_fault("unsupported", lambda seed: run(entry("trap;"), [np.zeros(1, np.uint32)], seed=seed))


def test_undefined_register_as_address() -> None:
    output = np.zeros(1, np.uint32)
    ptx = entry("ld.global.b32 %r1, [%rd9]; st.global.b32 [%rd0], %r1;")
    assert_fault("uninitialised", lambda seed: run(ptx, [output], seed=seed))
    ptx = entry("@%p9 st.global.b32 [%rd0], 1;")
    assert_fault("uninitialised", lambda seed: run(ptx, [output], seed=seed))
