"""Planted faults: each edit of a victim's PTX must raise the right kind of SimulationError for every seed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest

from simulator import SimulationError, simulate
from simulator.helpers import assert_fault, edit
from simulator.victims import Case, matmul, reduce, victim_ptx

pytestmark = pytest.mark.simulator
SEEDS = range(6)
TRY_WAIT = r"mbarrier\.try_wait\S+\s+P_OUT, [^;]*;"
TRUE = "setp.eq.u32 P_OUT, 0, 0;"
EARLY = ("race", "uninitialised")
ARRIVE = r"(mbarrier\.arrive\.shared\.b64\s+%rd\d+,\s+\[%r\d+\];)"


def after(place: str, pattern: str, replacement: str) -> Callable[[str], str]:
    """Edit the first match of `pattern` between the comment `// at: place` and the next such."""

    def apply(ptx: str) -> str:
        (mark,) = re.finditer(rf"// at: {place}\n", ptx)
        end = ptx.find("// at: ", mark.end()) % len(ptx)
        match = re.compile(pattern).search(ptx, mark.end(), end)
        assert match, f"{pattern!r} not found behind {place!r}"
        assert match.group() != match.expand(replacement)
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    return apply


def everywhere(pattern: str, replacement: str, count: int) -> Callable[[str], str]:
    return lambda ptx: edit(ptx, pattern, replacement, count)


def release_before_wait(ptx: str) -> str:
    """Move wgmma.wait_group behind the arrival on `empty`."""
    wait = "wgmma.wait_group.sync.aligned 0;"
    removed = after("multiply", re.escape(wait), "")(ptx)
    return after("release", r"(\$L__BB\d+_\d+:)", rf"\1 {wait}")(removed)


MATMUL_FAULTS = {
    "full wait dropped": (after("wait full", TRY_WAIT, TRUE), EARLY),
    "empty wait dropped": (after("wait empty", TRY_WAIT, TRUE), ("race", "barrier")),
    "full wait on the wrong phase": (
        after(
            "wait full",
            r"(mbarrier\.try_wait\S+\s+P_OUT, \S+ )(%r\d+);",
            r".reg .b32 Q; xor.b32 Q, \2, 1; \1Q;",
        ),
        (*EARLY, "barrier", "deadlock"),
    ),
    "empty wait on the wrong phase": (
        after("wait empty", r"xor\.b32\s+(%r\d+), (%r\d+), 1;", r"mov.b32 \1, \2;"),
        "deadlock",
    ),
    "consumer's phase never flips": (
        after("release", r"xor\.b32\s+(%r\d+), %r\d+, %r\d+;", ""),
        (*EARLY, "barrier"),
    ),
    "producer's phase never flips": (
        after("load", r"xor\.b32\s+(%r\d+), %r\d+, %r\d+;", ""),
        ("race", "barrier"),
    ),
    "off by one stage": (after("multiply", r"(add\.s32\s+%r\d+, %r\d+, )24576;", r"\g<1>32768;"), EARLY),
    "release of the wrong stage": (
        after("release", r"(add\.s32\s+%r\d+, %r\d+, )53272;", r"\g<1>53280;"),
        ("deadlock", "barrier", "race", "out-of-bounds"),
    ),
    "early release": (release_before_wait, "race"),
    "release dropped": (after("release", ARRIVE, ""), "deadlock"),
    "extra arrival": (after("release", ARRIVE, r"\1 \1"), ("barrier", "race", "deadlock")),
    "transaction bytes expected without an arrival": (
        after(
            "load",
            r"(mbarrier\.arrive\.expect_tx)(\S+) %rd\d+, (\S+), (%r\d+);",
            r"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 \3, \4;",
        ),
        "deadlock",
    ),
    "descriptor stride": (
        after("multiply", "4611686293305360384", str(4611686293305360384 + (64 << 32))),
        EARLY + ("out-of-bounds",),
    ),
    "wgmma.fence dropped": (after("multiply", r"wgmma\.fence\.sync\.aligned;", ""), "wgmma-register"),
    "wgmma wait dropped": (
        after("multiply", r"wgmma\.wait_group\.sync\.aligned 0;", ""),
        ("race", "wgmma-register"),
    ),
    "wgmma wait of the group before": (
        after("multiply", r"wait_group\.sync\.aligned 0;", "wait_group.sync.aligned 1;"),
        ("race", "wgmma-register"),
    ),
    "wgmma commit dropped": (
        after("multiply", r"wgmma\.commit_group\.sync\.aligned;", ""),
        ("race", "wgmma-register"),
    ),
    "fence.proxy.async dropped": (everywhere(r"fence\.proxy\.async\.shared::cta;", "", 2), "missing-fence"),
    "second fence.proxy.async dropped": (
        after(
            "epilogue", r"(fence\.proxy\.async\.shared::cta;[\s\S]*?)fence\.proxy\.async\.shared::cta;", r"\1"
        ),
        "missing-fence",
    ),
    "fence.mbarrier_init dropped": (
        everywhere(r"fence\.mbarrier_init\.release\.cluster;", "", 1),
        "missing-fence",
    ),
    "wait_group.read dropped": (everywhere(r"cp\.async\.bulk\.wait_group\.read 0;", "", 1), "bulk-read"),
    "barrier after wait_group.read dropped": (everywhere(r"bar\.sync 1, 128;", "", 1), ("bulk-read", "race")),
    "barrier before the store dropped": (
        after("epilogue", r"bar\.sync 2, 128;", ""),
        ("race", "missing-fence", "uninitialised"),
    ),
    "last bulk wait dropped": (everywhere(r"cp\.async\.bulk\.wait_group 0;", "", 1), "exit"),
    "too few transaction bytes": (
        after("load", r"(mov\.u32\s+%r\d+, )16384;", r"\g<1>8192;"),
        EARLY + ("barrier",),
    ),
    "too many transaction bytes": (
        after("load", r"(mov\.u32\s+%r\d+, )16384;", r"\g<1>16400;"),
        ("deadlock", "barrier"),
    ),
    "no transaction bytes": (
        after("load", r"(mbarrier\.arrive)\.expect_tx(\S+) (%rd\d+, \S+), %r\d+;", r"\1\2 \3;"),
        EARLY + ("barrier",),
    ),
    "barrier initialised twice": (
        everywhere(
            r"(mbarrier\.init\.shared\.b64 \[%r\d+\], %r\d+;)(?![\s\S]*mbarrier\.init)",
            r"\1 \1",
            1,
        ),
        "barrier",
    ),
    "init barrier dropped": (
        everywhere(r"bar\.sync\s+0;", "", 1),
        ("race", "uninitialised", "barrier", "missing-fence"),
    ),
    "misaligned tile": (after("load", r"(add\.s32\s+%r\d+, %r\d+, )24576;", r"\g<1>24640;"), "misaligned"),
    "load past shared memory": (
        after("load", r"(add\.s32\s+%r\d+, %r\d+, )24576;", r"\g<1>57344;"),
        "out-of-bounds",
    ),
    "unknown instruction": (
        after("multiply", r"wgmma\.fence\.sync\.aligned;", "wgmma.fense.sync.aligned;"),
        "unknown-instruction",
    ),
}


@pytest.mark.parametrize("name", MATMUL_FAULTS)
def test_matmul_fault(name: str) -> None:
    plant, kinds = MATMUL_FAULTS[name]
    faulty = plant(victim_ptx("matmul"))
    assert_fault(kinds, lambda seed: matmul().run(faulty, seed), SEEDS)


def caught(ptx: str, case: Case, seed: int) -> bool:
    try:
        case.run(ptx, seed)
    except SimulationError:
        return True
    return not case.is_right()


@pytest.mark.parametrize(
    ("name", "plant", "swizzles"),
    [
        (
            "64-byte swizzle in the descriptor",
            after("multiply", "4611686293305360384", str(4611686293305360384 + (1 << 62))),
            (128, 128, 64),
        ),
        ("no swizzle in the store's map", lambda ptx: ptx, (128, 128, 0)),
        ("no swizzle in the load's map", lambda ptx: ptx, (0, 128, 64)),
        (
            "slices out of step",
            after("multiply", r"(add\.s64\s+%rd\d+, %rd\d+, )4;", r"\g<1>2;"),
            (128, 128, 64),
        ),
        (
            "accumulator overwritten",
            after(
                "multiply",
                r"(%rd\d+, %rd\d+, )1, 1, 1, 0, 0;(?=[\s\S]*?commit_group)(?![\s\S]*mma_async)",
                r"\g<1>0, 1, 1, 0, 0;",
            ),
            (128, 128, 64),
        ),
    ],
)
def test_wrong_layout_is_caught(
    name: str, plant: Callable[[str], str], swizzles: tuple[int, int, int]
) -> None:
    """A layout that is legal but not the one meant shows in the results, if not as a fault."""
    faulty = plant(victim_ptx("matmul"))
    for seed in SEEDS:
        assert caught(faulty, matmul(swizzles=swizzles), seed), f"{name}: seed {seed}"


def test_too_little_shared_memory() -> None:
    def run(seed: int) -> None:
        case = matmul()
        case.plan.shared_bytes = 16384
        case.run(victim_ptx("matmul"), seed)

    assert_fault("out-of-bounds", run, SEEDS)


def test_box_larger_than_its_tile() -> None:
    """A box of 128 rows overruns the tile that it should fill, and its bytes the barrier's count."""

    def run(seed: int) -> None:
        case = matmul()
        case.plan.maps[1].box = (64, 128)
        case.run(victim_ptx("matmul"), seed)

    assert_fault(("race", "barrier", "deadlock", "uninitialised"), run, SEEDS)


def test_store_overlaps_another_cta() -> None:
    """Every CTA of a row stores to the first tile of C."""
    plant = after("epilogue", r"mov\.u32\s+(%r\d+), %ctaid\.x;", r"mov.u32 \1, 0;")
    faulty = plant(victim_ptx("matmul"))
    assert_fault("race", lambda seed: matmul(64, 128).run(faulty, seed), SEEDS)


def test_tensor_map_outside_memory() -> None:
    """A map that covers more rows than the tensor has."""

    def run(seed: int) -> None:
        case = matmul()
        maps = copy.deepcopy(case.plan.maps)
        maps[0].address += 4096 * 64
        case.plan.maps = maps
        case.run(victim_ptx("matmul"), seed)

    assert_fault("out-of-bounds", run, SEEDS)


def test_step_limit() -> None:
    def run(seed: int) -> None:
        case = matmul()
        simulate(victim_ptx("matmul"), case.plan, case.memory, seed=seed, max_steps=200)

    assert_fault("limit", run, SEEDS)


REDUCE_FAULTS = {
    "fence.proxy.async dropped": (everywhere(r"fence\.proxy\.async\.shared::cta;", "", 1), "missing-fence"),
    "wait_group.read dropped": (everywhere(r"cp\.async\.bulk\.wait_group\.read 1;", "", 1), "bulk-read"),
    "wait_group.read one group late": (
        everywhere(r"wait_group\.read 1;", "wait_group.read 2;", 1),
        "bulk-read",
    ),
    "last bulk wait dropped": (everywhere(r"cp\.async\.bulk\.wait_group 0;", "", 1), "exit"),
    "commit dropped": (everywhere(r"cp\.async\.bulk\.commit_group;", "", 1), ("bulk-read", "exit")),
    "plain store to rows of all CTAs": (
        everywhere(
            r"cp\.reduce\.async\.bulk\.global\.shared::cta\.bulk_group\.add\.f32",
            "cp.async.bulk.global.shared::cta.bulk_group",
            1,
        ),
        "race",
    ),
    "size not a multiple of 16": (everywhere(r"(mov\.u32\s+%r\d+, )1024;", r"\g<1>1000;", 1), "misaligned"),
    "size past the row": (
        everywhere(r"(mov\.u32\s+%r\d+, )1024;", r"\g<1>4096;", 1),
        ("out-of-bounds", "uninitialised", "race", "bulk-read"),
    ),
}


@pytest.mark.parametrize("name", REDUCE_FAULTS)
def test_reduce_fault(name: str) -> None:
    plant, kinds = REDUCE_FAULTS[name]
    faulty = plant(victim_ptx("reduce"))
    assert_fault(kinds, lambda seed: reduce().run(faulty, seed), SEEDS)


def test_reduce_barrier_dropped() -> None:
    """Without the barrier behind the writes the reduction reads before other warps have written."""
    ptx = victim_ptx("reduce")
    barriers = list(re.finditer(r"bar\.sync\s+0;", ptx))
    assert len(barriers) == 2
    for barrier, kinds in zip(
        barriers, (("bulk-read", "race"), ("race", "uninitialised", "missing-fence")), strict=True
    ):
        faulty = ptx[: barrier.start()] + ptx[barrier.end() :]
        assert_fault(kinds, lambda seed, faulty=faulty: reduce().run(faulty, seed), SEEDS)
