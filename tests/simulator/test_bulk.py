"""One-dimensional bulk copies and reductions (PTX ISA "cp.async.bulk", "cp.reduce.async.bulk")."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulator.exact import BF16, F16, decode
from simulator.helpers import aligned, assert_fault, copy_words, entry, init_barriers, run, wait_parity

pytestmark = pytest.mark.simulator
TILE = 128


def load_program(size: int, *, tile: int = TILE, expect: int | None = None, source: int = 0) -> str:
    return entry(
        f"""
        mov.u32 %r0, smem; add.u32 %r1, %r0, {tile}; add.u64 %rd2, %rd1, {source}; mov.u32 %r2, {size};
        {init_barriers(1)}
        setp.eq.u32 %p1, %thread, 0;
        @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0], {size if expect is None else expect};
        @%p1 cp.async.bulk.prefetch.L2.global [%rd2], %r2;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2], %r2, [%r0];
        {wait_parity("%r0", 0, "WAIT")}
        {copy_words("global:%rd0", "shared:%r1", size // 4, 64, "COPY")}
        """,
        parameters=2,
    )


def run_load(size: int, seed: int, **options: int) -> tuple[np.ndarray, np.ndarray]:
    source = aligned((1024,), np.uint32)
    source[:] = np.arange(1024)
    output = np.zeros(size // 4, np.uint32)
    run(load_program(size, **options), [(output, "w"), (source, "r")], block=64, shared_bytes=2048, seed=seed)
    return output, source[: size // 4]


@pytest.mark.parametrize("size", [16, 48, 1024])
def test_load(size: int) -> None:
    for seed in range(4):
        np.testing.assert_array_equal(*run_load(size, seed))


def test_load_faults() -> None:
    assert_fault("misaligned", lambda seed: run_load(24, seed))
    assert_fault("misaligned", lambda seed: run_load(32, seed, tile=TILE + 8))
    assert_fault("misaligned", lambda seed: run_load(32, seed, source=4))
    assert_fault("out-of-bounds", lambda seed: run_load(32, seed, source=4080))
    assert_fault("out-of-bounds", lambda seed: run_load(32, seed, tile=2032))
    assert_fault(("race", "barrier", "deadlock"), lambda seed: run_load(32, seed, expect=16))
    assert_fault(("deadlock", "barrier"), lambda seed: run_load(32, seed, expect=48))


def store_program(instruction: str, size: int, *, tail: str = "") -> str:
    return entry(
        f"""
        mov.u32 %r0, smem; add.u32 %r1, %r0, {TILE};
        {copy_words("shared:%r1", "global:%rd1", size // 4, 64, "COPY")}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        setp.eq.u32 %p1, %thread, 0;
        @%p1 {instruction} [%rd0], [%r1], {size};
        @%p1 cp.async.bulk.commit_group;
        {tail}
        @%p1 cp.async.bulk.wait_group 0;
        """,
        parameters=2,
    )


def random_words(count: int, dtype: np.dtype | type, seed: int) -> np.ndarray:
    array = aligned((count,), dtype)
    array.view(np.uint8)[:] = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
    return array


STORE = "cp.async.bulk.global.shared::cta.bulk_group"


def test_store() -> None:
    for seed in range(4):
        source, target = random_words(64, np.uint32, seed), random_words(64, np.uint32, 9)
        rest = target[48:].copy()
        run(store_program(STORE, 192), [target, (source, "r")], block=64, shared_bytes=1024, seed=seed)
        np.testing.assert_array_equal(target[:48], source[:48])
        np.testing.assert_array_equal(target[48:], rest)


REDUCTIONS = {
    "add.u32": (np.uint32, np.add),
    "add.s32": (np.int32, np.add),
    "add.u64": (np.uint64, np.add),
    "min.u32": (np.uint32, np.minimum),
    "max.s32": (np.int32, np.maximum),
    "min.s64": (np.int64, np.minimum),
    "and.b32": (np.uint32, np.bitwise_and),
    "or.b64": (np.uint64, np.bitwise_or),
    "xor.b32": (np.uint32, np.bitwise_xor),
}


@pytest.mark.parametrize("operation", REDUCTIONS)
def test_integer_reductions(operation: str) -> None:
    dtype, function = REDUCTIONS[operation]
    source, target = random_words(32, dtype, 1), random_words(32, dtype, 2)
    expected = function(source, target)
    ptx = store_program(f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}", source.nbytes)
    run(ptx, [target, (source, "r")], block=64, shared_bytes=1024)
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("ctas", [1, 5])
def test_float_reduction(ctas: int) -> None:
    source, target = aligned((64,), np.float32), aligned((64,), np.float32)
    source[:], target[:] = np.arange(64), -2.5
    ptx = store_program("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32", 256)
    run(ptx, [target, (source, "r")], block=64, grid=ctas, shared_bytes=1024, seed=ctas)
    np.testing.assert_array_equal(target, ctas * np.arange(64) - 2.5)


@pytest.mark.parametrize(
    ("name", "dtype", "fmt"), [("bf16", torch.bfloat16, BF16), ("f16", torch.float16, F16)]
)
def test_half_reductions(name: str, dtype: torch.dtype, fmt: object) -> None:
    """add.noftz rounds to nearest even; min and max compare as numbers."""
    source = torch.randn(64).to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
    initial = torch.randn(64).to(dtype).view(torch.int16).numpy().view(np.uint16).copy()
    a, b = (torch.from_numpy(decode(column, fmt)).to(dtype) for column in (source, initial))
    for operation, expected in {
        "add.noftz": a + b,
        "min": torch.minimum(a, b),
        "max": torch.maximum(a, b),
    }.items():
        inputs, target = aligned((64,), np.uint16), aligned((64,), np.uint16)
        inputs[:], target[:] = source, initial
        ptx = store_program(f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{operation}.{name}", 128)
        run(ptx, [target, (inputs, "r")], block=64, shared_bytes=1024)
        np.testing.assert_array_equal(target, expected.view(torch.int16).numpy().view(np.uint16))


def test_reuse_of_the_source() -> None:
    """The source may be written again behind wait_group.read, not before."""
    overwrite = "bar.sync 0; setp.eq.u32 %p2, %thread, 40; @%p2 st.shared.b32 [%r1], 0;"

    def action(tail: str):
        def run_once(seed: int) -> None:
            source, target = random_words(32, np.uint32, 1), aligned((32,), np.uint32)
            run(
                store_program(STORE, 128, tail=tail),
                [target, (source, "r")],
                block=64,
                shared_bytes=1024,
                seed=seed,
            )
            np.testing.assert_array_equal(target, source)

        return run_once

    for seed in range(5):
        action("@%p1 cp.async.bulk.wait_group.read 0;" + overwrite)(seed)
    assert_fault("bulk-read", action(overwrite))
    assert_fault(("bulk-read", "race"), action("setp.eq.u32 %p2, %thread, 40; @%p2 st.shared.b32 [%r1], 0;"))


def test_reading_the_source_is_allowed() -> None:
    source, target = random_words(32, np.uint32, 1), aligned((32,), np.uint32)
    ptx = store_program(STORE, 128, tail="ld.shared.b32 %r5, [%r1];")
    for seed in range(5):
        run(ptx, [target, (source, "r")], block=64, shared_bytes=1024, seed=seed)
        np.testing.assert_array_equal(target, source)


def test_store_faults() -> None:
    def action(ptx: str):
        source = random_words(64, np.uint32, 1)
        return lambda seed: run(
            ptx, [aligned((32,), np.uint32), (source, "r")], block=64, shared_bytes=1024, seed=seed
        )

    good = store_program(STORE, 128)
    action(good)(0)
    assert_fault("missing-fence", action(good.replace("fence.proxy.async.shared::cta;", "")))
    assert_fault(
        "missing-fence", action(good.replace("fence.proxy.async.shared::cta;", "fence.proxy.async.global;"))
    )
    assert_fault("exit", action(good.replace("@%p1 cp.async.bulk.wait_group 0;", "")))
    assert_fault("out-of-bounds", action(store_program(STORE, 144)))
    assert_fault("uninitialised", action(good.replace("[%rd0], [%r1], 128", "[%rd0], [%r1+128], 128")))


def test_stores_of_two_ctas_overlap() -> None:
    source, target = random_words(32, np.uint32, 1), aligned((32,), np.uint32)
    ptx = store_program(STORE, 128)
    assert_fault(
        "race", lambda seed: run(ptx, [target, (source, "r")], block=64, grid=2, shared_bytes=1024, seed=seed)
    )


def test_plain_stores_of_two_ctas_overlap() -> None:
    target = aligned((32,), np.uint32)
    ptx = entry("st.global.b32 [%rd0], %thread;")
    assert_fault("race", lambda seed: run(ptx, [target], block=1, grid=2, seed=seed))
    read = entry(
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;"
        "@%p1 st.global.b32 [%rd0], 1; @!%p1 ld.global.b32 %r2, [%rd0];"
    )
    assert_fault("race", lambda seed: run(read, [target], block=1, grid=2, seed=seed))
