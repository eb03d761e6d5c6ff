"""wgmma.mma_async against exact products (PTX ISA "wgmma.mma_async")."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from simulator.helpers import assert_fault, copy_words, entry, run
from simulator.wgmma_layout import Layout, a_fragments, accumulator_index, layout

pytestmark = pytest.mark.simulator
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
B_AT = 32768


def accumulators(n: int, first: int = 0) -> str:
    return "{" + ", ".join(f"%f{first + i}" for i in range(n // 2)) + "}"


def descriptor(register: str, offset: int, constant: int) -> str:
    """64-bit descriptor of dynamic shared memory + offset."""
    text = f"add.u32 %r9, %r0, {offset}; and.b32 %r9, %r9, 0x3ffff; shr.u32 %r9, %r9, 4;"
    return text + f"cvt.u64.u32 {register}, %r9; or.b64 {register}, {register}, {constant};"


def multiply(
    n: int,
    kind: str,
    a: str,
    b: str,
    *,
    scale_d: str = "1",
    scales: str = "1, 1",
    transposes: str = ", 0, 0",
    first: int = 0,
) -> str:
    opcode = f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind}"
    return f"{opcode} {accumulators(n, first)}, {a}, {b}, {scale_d}, {scales}{transposes};"


FENCE = "wgmma.fence.sync.aligned;"
COMMIT = "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def fill(a_bytes: int, b_bytes: int) -> str:
    """Copy the operands' images from params[1], params[2] and make them visible to the async proxy."""
    copies = copy_words("shared:%r0", "global:%rd1", a_bytes // 4, 128, "COPY_A") if a_bytes else ""
    copies += f"add.u32 %r1, %r0, {B_AT};" + copy_words(
        "shared:%r1", "global:%rd2", b_bytes // 4, 128, "COPY_B"
    )
    return "mov.u32 %r0, smem;" + copies + "fence.proxy.async.shared::cta; bar.sync 0;"


def initialise(n: int, value: float | None = 0.0, first: int = 0) -> str:
    bits = int(np.float32(value).view(np.uint32))
    return "".join(f"mov.b32 %f{first + i}, {bits:#x};" for i in range(n // 2))


def write_back(n: int, first: int = 0, pointer: str = "%rd0") -> str:
    address = f"mad.wide.u32 %rd20, %thread, {2 * n}, {pointer};"
    return address + "".join(f"st.global.b32 [%rd20+{4 * i}], %f{first + i};" for i in range(n // 2))


DECLARATIONS = ".reg .b32 %f<256>; .reg .b32 %a<16>;"


def operands(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Small integers: every sum is exact."""
    generator = torch.Generator().manual_seed(seed + n)
    return tuple(torch.randint(-4, 5, (rows, k), generator=generator).to(dtype) for rows in (64, n))


def bits(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


def gathered(output: np.ndarray, n: int) -> np.ndarray:
    result = np.full((64, n), np.nan, np.float32)
    result[accumulator_index(n)] = output.view(np.float32)
    return result


def run_shared(
    n: int, kind: str, a_layout: Layout, b_layout: Layout, a: torch.Tensor, b: torch.Tensor, seed: int = 0
) -> np.ndarray:
    a_image, b_image = a_layout.image(bits(a)), b_layout.image(bits(b))
    transposes = f", {int(not a_layout.k_major)}, {int(not b_layout.k_major)}"
    body = fill(a_image.size, b_image.size) + initialise(n) + FENCE
    for s in range(a.shape[1] // 16):
        body += descriptor("%rd10", s * a_layout.step, a_layout.descriptor)
        body += descriptor("%rd11", B_AT + s * b_layout.step, b_layout.descriptor)
        body += multiply(n, kind, "%rd10", "%rd11", transposes=transposes)
    body += COMMIT + WAIT + write_back(n)
    output = np.zeros((128, n // 2), np.uint32)
    ptx = entry(body, parameters=3, declarations=DECLARATIONS)
    run(
        ptx,
        [(output, "w"), (a_image, "r"), (b_image, "r")],
        block=128,
        shared_bytes=B_AT + b_image.size,
        seed=seed,
    )
    return gathered(output, n)


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_width(n: int) -> None:
    kind = "bf16" if n // 8 % 2 else "f16"
    a, b = operands(n, 64, TYPES[kind])
    actual = run_shared(n, kind, layout(64, 64, True, 128), layout(n, 64, True, 128), a, b, seed=n)
    np.testing.assert_array_equal(actual, (a.double() @ b.double().T).numpy())


@pytest.mark.parametrize("n", [24, 128])
@pytest.mark.parametrize("b_major", ["k", "mn"])
@pytest.mark.parametrize("a_major", ["k", "mn"])
@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_layouts(swizzle: int, a_major: str, b_major: str, n: int) -> None:
    """Each canonical layout of both operands; without swizzle, in both orders of the core matrices."""
    k = swizzle // 2 if swizzle and "k" in (a_major, b_major) else 32
    a, b = operands(n, k, torch.bfloat16)
    for spread in (False, True) if swizzle == 0 else (False,):
        a_layout = layout(64, k, a_major == "k", swizzle, spread)
        b_layout = layout(n, k, b_major == "k", swizzle, spread)
        actual = run_shared(n, "bf16", a_layout, b_layout, a, b)
        np.testing.assert_array_equal(actual, (a.double() @ b.double().T).numpy())


def run_registers(
    n: int, kind: str, b_layout: Layout, a: torch.Tensor, b: torch.Tensor, seed: int = 0
) -> np.ndarray:
    slices = a.shape[1] // 16
    fragments, b_image = a_fragments(bits(a)), b_layout.image(bits(b))
    body = fill(0, b_image.size) + initialise(n)
    for s in range(slices):
        body += f"mad.wide.u32 %rd21, %thread, 16, %rd1; add.u64 %rd21, %rd21, {s * 2048};"
        body += f"ld.global.v4.b32 {{%a{4 * s}, %a{4 * s + 1}, %a{4 * s + 2}, %a{4 * s + 3}}}, [%rd21];"
    body += FENCE
    for s in range(slices):
        body += descriptor("%rd11", B_AT + s * b_layout.step, b_layout.descriptor)
        registers = "{" + ", ".join(f"%a{4 * s + i}" for i in range(4)) + "}"
        body += multiply(n, kind, registers, "%rd11", transposes=f", {int(not b_layout.k_major)}")
    body += COMMIT + WAIT + write_back(n)
    output = np.zeros((128, n // 2), np.uint32)
    ptx = entry(body, parameters=3, declarations=DECLARATIONS)
    run(
        ptx,
        [(output, "w"), (fragments, "r"), (b_image, "r")],
        block=128,
        shared_bytes=B_AT + b_image.size,
        seed=seed,
    )
    return gathered(output, n)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("b_major", ["k", "mn"])
@pytest.mark.parametrize("n", [8, 64, 128, 256])
def test_register_operand(n: int, b_major: str, kind: str) -> None:
    a, b = operands(n, 64, TYPES[kind])
    b_layout = layout(n, 64, b_major == "k", 128)
    np.testing.assert_array_equal(run_registers(n, kind, b_layout, a, b), (a.double() @ b.double().T).numpy())


def test_rounding_is_single_precision() -> None:
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    actual = run_shared(64, "bf16", layout(64, 64, True, 128), layout(64, 64, True, 128), a, b)
    bound = 64 * 2.0**-24 * (a.double().abs() @ b.double().abs().T).numpy()
    assert (np.abs(actual - (a.double() @ b.double().T).numpy()) <= bound).all()


SMALL = layout(64, 16, True, 32), layout(8, 16, True, 32)


def small(body: str, seed: int = 0, *, n: int = 8, fenced: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Run `body` with descriptors %rd10 of A [64, 16] and %rd11 of B [n, 16]; returns D and A B^T."""
    a, b = operands(n, 16, torch.bfloat16)
    a_image, b_image = SMALL[0].image(bits(a)), SMALL[1].image(bits(b))
    setup = fill(a_image.size, b_image.size)
    if not fenced:
        assert setup.count("fence.proxy.async.shared::cta;") == 1
        setup = setup.replace("fence.proxy.async.shared::cta;", "")
    setup += descriptor("%rd10", 0, SMALL[0].descriptor) + descriptor("%rd11", B_AT, SMALL[1].descriptor)
    output, second = np.zeros((128, n // 2), np.uint32), np.zeros((128, n // 2), np.uint32)
    ptx = entry(setup + body, parameters=4, declarations=DECLARATIONS)
    memory = [output, (a_image, "r"), (b_image, "r"), second]
    run(ptx, memory, block=128, shared_bytes=B_AT + 1024, seed=seed)
    return gathered(output, n), (a.double() @ b.double().T).numpy()


MMA = multiply(8, "bf16", "%rd10", "%rd11")


def test_scales() -> None:
    """scale-d = false ignores the accumulators, even NaN; imm-scale negates an operand."""
    predicate = "setp.ne.u32 %p1, %r0, %r0;"
    text = multiply(8, "bf16", "%rd10", "%rd11", scale_d="%p1")
    actual, product = small(initialise(8, np.nan) + predicate + FENCE + text + COMMIT + WAIT + write_back(8))
    np.testing.assert_array_equal(actual, product)
    text = multiply(8, "bf16", "%rd10", "%rd11", scale_d="%p1")
    actual, product = small(
        initialise(8, 5.0) + predicate.replace("ne", "eq") + FENCE + text + COMMIT + WAIT + write_back(8)
    )
    np.testing.assert_array_equal(actual, product + 5)
    for scales, sign in (("-1, 1", -1), ("1, -1", -1), ("-1, -1", 1)):
        text = multiply(8, "bf16", "%rd10", "%rd11", scales=scales)
        actual, product = small(initialise(8, 1.0) + FENCE + text + COMMIT + WAIT + write_back(8))
        np.testing.assert_array_equal(actual, 1 + sign * product)


def test_groups_complete_in_order() -> None:
    """wait_group 1 makes the older of two groups' accumulators readable."""
    other = multiply(8, "bf16", "%rd10", "%rd11", first=64)
    start = initialise(8) + initialise(8, 0.0, 64) + FENCE + MMA + COMMIT + other + COMMIT
    good = start + "wgmma.wait_group.sync.aligned 1;" + write_back(8) + WAIT + write_back(8, 64, "%rd3")
    for seed in range(5):
        actual, product = small(good, seed)
        np.testing.assert_array_equal(actual, product)
    early = start + "wgmma.wait_group.sync.aligned 1;" + write_back(8, 64) + WAIT
    assert_fault("wgmma-register", lambda seed: small(early, seed))


def test_accumulating_needs_no_fence() -> None:
    """Consecutive wgmmas on the same accumulators, of the same shape, are ordered by themselves."""
    actual, product = small(initialise(8) + FENCE + MMA + MMA + COMMIT + MMA + COMMIT + WAIT + write_back(8))
    np.testing.assert_array_equal(actual, 3 * product)


LOAD_A = "mov.b32 %a0, 0; mov.b32 %a1, 0; mov.b32 %a2, 0; mov.b32 %a3, 0;"
MMA_RS = multiply(8, "bf16", "{%a0, %a1, %a2, %a3}", "%rd11", transposes=", 0")
WRITE_ACCUMULATOR = "cvt.rn.f32.u32 %f2, %thread;"
WRITE_FRAGMENT = "add.u32 %a1, %thread, 1;"
REGISTER_FAULTS = {
    "accumulator read without fence": initialise(8)
    + FENCE
    + MMA
    + COMMIT
    + WAIT
    + "st.global.b32 [%rd0], %f2;"
    + MMA
    + COMMIT
    + WAIT,
    "accumulator read before the wait": initialise(8) + FENCE + MMA + COMMIT + write_back(8) + WAIT,
    "accumulator written before the wait": initialise(8) + FENCE + MMA + COMMIT + WRITE_ACCUMULATOR + WAIT,
    "accumulator read without commit": initialise(8) + FENCE + MMA + WAIT + write_back(8) + COMMIT + WAIT,
    "accumulator read with a wait too weak": initialise(8)
    + FENCE
    + MMA
    + COMMIT
    + "wgmma.wait_group.sync.aligned 1;"
    + write_back(8)
    + WAIT,
    "accumulator modified without fence": initialise(8)
    + FENCE
    + MMA
    + COMMIT
    + WAIT
    + WRITE_ACCUMULATOR
    + MMA
    + COMMIT
    + WAIT,
    "no fence at all": initialise(8) + MMA + COMMIT + WAIT,
    "accumulator modified behind the fence": initialise(8) + FENCE + WRITE_ACCUMULATOR + MMA + COMMIT + WAIT,
    "A register written before the wait": initialise(8)
    + LOAD_A
    + FENCE
    + MMA_RS
    + COMMIT
    + WRITE_FRAGMENT
    + WAIT,
    "A register modified without fence": initialise(8)
    + LOAD_A
    + FENCE
    + MMA_RS
    + COMMIT
    + WAIT
    + WRITE_FRAGMENT
    + MMA_RS
    + COMMIT
    + WAIT,
    "accumulator of another shape in flight": initialise(16)
    + FENCE
    + MMA
    + multiply(16, "bf16", "%rd10", "%rd11")
    + COMMIT
    + WAIT,
}


@pytest.mark.parametrize("name", REGISTER_FAULTS)
def test_register_faults(name: str) -> None:
    kinds = (
        ("wgmma-register", "uninitialised", "out-of-bounds") if "another shape" in name else "wgmma-register"
    )
    assert_fault(kinds, lambda seed: small(REGISTER_FAULTS[name], seed))


def test_shared_memory_faults() -> None:
    good = initialise(8) + FENCE + MMA + COMMIT + WAIT
    small(good)
    assert_fault("missing-fence", lambda seed: small(good, seed, fenced=False))
    overwrite = f"mad.lo.u32 %r5, %thread, 4, %r0; st.shared.b32 [%r5+{B_AT}], 0;"
    assert_fault("race", lambda seed: small(initialise(8) + FENCE + MMA + COMMIT + overwrite + WAIT, seed))
    assert_fault("exit", lambda seed: small(initialise(8) + FENCE + MMA + COMMIT, seed))
    far = "add.u64 %rd11, %rd11, 64;"
    assert_fault(
        ("out-of-bounds", "uninitialised"),
        lambda seed: small(initialise(8) + far + FENCE + MMA + COMMIT + WAIT, seed),
    )


@pytest.mark.parametrize("byte", [1024, B_AT], ids=["A", "B"])
def test_a_wait_is_for_the_own_warp(byte: int) -> None:
    """What a warp has waited for, the product of another may still read: its rows of A, and all of B."""
    product = initialise(8) + FENCE + MMA + COMMIT + WAIT
    first_warp = "setp.lt.u32 %p1, %thread, 32; mad.lo.u32 %r5, %thread, 4, %r0;"
    overwrite = first_warp + f"@%p1 st.shared.b32 [%r5+{byte}], 0;"
    small(product + "bar.sync 0;" + overwrite)
    assert_fault("race", lambda seed: small(product + overwrite, seed))
