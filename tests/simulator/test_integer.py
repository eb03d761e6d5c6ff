"""Integer, bit and comparison instructions against Python integers (PTX ISA "Integer Arithmetic")."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from simulator.helpers import map_elements

pytestmark = pytest.mark.simulator
COUNT = 512


def samples(kind: str, seed: int, count: int = COUNT) -> np.ndarray:
    """Boundary values, small values and random bits of an integer type."""
    bits = int(kind[1:])
    random = np.random.default_rng(seed)
    edges = [
        0,
        1,
        2,
        5,
        31,
        32,
        33,
        63,
        64,
        (1 << bits) - 1,
        (1 << bits) - 2,
        1 << (bits - 1),
        (1 << (bits - 1)) - 1,
    ]
    picked = random.choice(np.array([edge & ((1 << bits) - 1) for edge in edges], np.uint64), count // 2)
    drawn = random.integers(0, 1 << bits, count - count // 2, dtype=np.uint64, endpoint=False)
    return random.permutation(np.concatenate([picked, drawn])).astype(f"u{bits // 8}")


def value(bits: int, kind: str) -> int:
    """Integer that a bit pattern stands for."""
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def check(
    instruction: str,
    result: str,
    operands: Sequence[str],
    expected: Callable[..., int],
    columns: Sequence[np.ndarray] | None = None,
) -> None:
    columns = columns or [samples(kind, seed) for seed, kind in enumerate(operands)]
    actual = map_elements(instruction, result, operands, columns)
    mask = (1 << int(result[1:])) - 1
    for index, row in enumerate(zip(*columns, strict=True)):
        arguments = [value(int(item), kind) for item, kind in zip(row, operands, strict=True)]
        wanted = int(expected(*arguments)) & mask
        assert int(actual[index]) == wanted, (
            f"{instruction} {arguments}: {int(actual[index]):#x}, expected {wanted:#x}"
        )


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str, kind: str) -> None:
    check(f"{name}.{kind} %d, %a, %b;", kind, [kind, kind], ARITHMETIC[name])


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_multiply_high(kind: str) -> None:
    check(f"mul.hi.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: (a * b) >> int(kind[1:]))


@pytest.mark.parametrize(("kind", "wide"), [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_multiply_wide(kind: str, wide: str) -> None:
    check(f"mul.wide.{kind} %d, %a, %b;", wide, [kind, kind], lambda a, b: a * b)
    check(f"mad.wide.{kind} %d, %a, %b, %c;", wide, [kind, kind, wide], lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_multiply_add(kind: str) -> None:
    check(f"mad.lo.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: a * b + c)
    check(f"mad.hi.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: ((a * b) >> int(kind[1:])) + c)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_divide(kind: str) -> None:
    a, b = samples(kind, 0), samples(kind, 1)
    b[b == 0] = 3
    b[b == np.iinfo(b.dtype).max] = (
        7  # -1: the quotient of the most negative value by it is not representable
    )
    check(f"div.{kind} %d, %a, %b;", kind, [kind, kind], truncated, [a, b])
    check(f"rem.{kind} %d, %a, %b;", kind, [kind, kind], lambda a, b: a - truncated(a, b) * b, [a, b])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_sign(bits: int) -> None:
    check(f"abs.s{bits} %d, %a;", f"s{bits}", [f"s{bits}"], abs)
    check(f"neg.s{bits} %d, %a;", f"s{bits}", [f"s{bits}"], lambda a: -a)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_sum_of_absolute_differences(kind: str) -> None:
    check(f"sad.{kind} %d, %a, %b, %c;", kind, [kind] * 3, lambda a, b, c: abs(a - b) + c)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int) -> None:
    kinds = [f"b{bits}"] * 2
    check(f"and.b{bits} %d, %a, %b;", kinds[0], kinds, lambda a, b: a & b)
    check(f"or.b{bits} %d, %a, %b;", kinds[0], kinds, lambda a, b: a | b)
    check(f"xor.b{bits} %d, %a, %b;", kinds[0], kinds, lambda a, b: a ^ b)
    check(f"not.b{bits} %d, %a;", kinds[0], kinds[:1], lambda a: ~a)
    check(f"cnot.b{bits} %d, %a;", kinds[0], kinds[:1], lambda a: a == 0)


def lookup(a: int, b: int, c: int, table: int) -> int:
    return sum(
        ((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1))) & 1) << i for i in range(32)
    )


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0x6A, 0xE8, 0xF0, 0xCC, 0xAA, 0x1B])
def test_lop3(table: int) -> None:
    operands = ["b32"] * 3
    check(f"lop3.b32 %d, %a, %b, %c, {table};", "b32", operands, lambda a, b, c: lookup(a, b, c, table))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shift(bits: int) -> None:
    """Shift amounts above the width clamp; shr of a signed type fills with the sign."""
    check(f"shl.b{bits} %d, %a, %b;", f"b{bits}", [f"b{bits}", "u32"], lambda a, b: a << min(b, bits))
    for kind in (f"u{bits}", f"s{bits}"):
        check(f"shr.{kind} %d, %a, %b;", kind, [kind, "u32"], lambda a, b: a >> min(b, bits))


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(mode: str) -> None:
    def amount(count: int) -> int:
        return count & 31 if mode == "wrap" else min(count, 32)

    operands = ["b32", "b32", "u32"]
    check(
        f"shf.l.{mode}.b32 %d, %a, %b, %c;",
        "b32",
        operands,
        lambda a, b, c: ((b << 32 | a) << amount(c)) >> 32,
    )
    check(f"shf.r.{mode}.b32 %d, %a, %b, %c;", "b32", operands, lambda a, b, c: (b << 32 | a) >> amount(c))


def permuted(a: int, b: int, selector: int) -> int:
    pool = (b << 32 | a).to_bytes(8, "little")
    result = []
    for position in range(4):
        nibble = selector >> (4 * position) & 15
        byte = pool[nibble & 7]
        result.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(result), "little")


PERMUTE_MODES = {
    "f4e": [0x3210, 0x4321, 0x5432, 0x6543],
    "b4e": [0x5670, 0x6701, 0x7012, 0x0123],
    "rc8": [0x0000, 0x1111, 0x2222, 0x3333],
    "ecl": [0x3210, 0x3211, 0x3222, 0x3333],
    "ecr": [0x0000, 0x1110, 0x2210, 0x3210],
    "rc16": [0x1010, 0x3232, 0x1010, 0x3232],
}


def test_prmt() -> None:
    check("prmt.b32 %d, %a, %b, %c;", "b32", ["b32"] * 3, lambda a, b, c: permuted(a, b, c))
    check("prmt.b32 %d, %a, %b, 0x7531;", "b32", ["b32"] * 2, lambda a, b: permuted(a, b, 0x7531))


@pytest.mark.parametrize("mode", PERMUTE_MODES)
def test_prmt_modes(mode: str) -> None:
    selectors = PERMUTE_MODES[mode]
    check(
        f"prmt.b32.{mode} %d, %a, %b, %c;",
        "b32",
        ["b32"] * 3,
        lambda a, b, c: permuted(a, b, selectors[c & 3]),
    )


def extract(a: int, position: int, length: int, kind: str) -> int:
    bits, position, length = int(kind[1:]), position & 255, length & 255
    pattern = a & ((1 << bits) - 1)
    sign = 0 if kind[0] == "u" or length == 0 else pattern >> min(position + length - 1, bits - 1) & 1
    return sum(
        ((pattern >> (position + i) & 1) if i < length and position + i < bits else sign) << i
        for i in range(bits)
    )


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind: str) -> None:
    check(f"bfe.{kind} %d, %a, %b, %c;", kind, [kind, "u32", "u32"], lambda a, b, c: extract(a, b, c, kind))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_field_insert(bits: int) -> None:
    def insert(a: int, b: int, position: int, length: int) -> int:
        position, length = position & 255, length & 255
        mask = ((1 << length) - 1) << position
        return b & ~mask | a << position & mask

    kind = f"b{bits}"
    check(f"bfi.{kind} %d, %a, %b, %c, %e;", kind, [kind, kind, "u32", "u32"], insert)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_find_leading_bit(kind: str) -> None:
    def leading(a: int) -> int:
        return (a if a >= 0 else ~a).bit_length() - 1

    def shift(a: int) -> int:
        return int(kind[1:]) - 1 - leading(a) if leading(a) >= 0 else -1

    check(f"bfind.{kind} %d, %a;", "u32", [kind], leading)
    check(f"bfind.shiftamt.{kind} %d, %a;", "u32", [kind], shift)


@pytest.mark.parametrize("bits", [32, 64])
def test_count_bits(bits: int) -> None:
    kind = f"b{bits}"
    check(f"popc.{kind} %d, %a;", "u32", [kind], lambda a: a.bit_count())
    check(f"clz.{kind} %d, %a;", "u32", [kind], lambda a: bits - a.bit_length())
    check(f"brev.{kind} %d, %a;", kind, [kind], lambda a: int(f"{a:0{bits}b}"[::-1], 2))


def test_find_nth_set() -> None:
    def nth(mask: int, base: int, offset: int) -> int:
        positions = range(base, 32) if offset >= 0 else range(base, -1, -1)
        remaining = max(abs(offset), 1) if offset else 1
        if offset == 0:
            return base if mask >> base & 1 else -1
        for position in positions:
            remaining -= mask >> position & 1
            if not remaining:
                return position
        return -1

    random = np.random.default_rng(0)
    base = random.integers(0, 32, COUNT, dtype=np.uint32)
    offset = random.integers(-6, 7, COUNT).astype(np.int32).view(np.uint32)
    operands = ["b32", "u32", "s32"]
    check("fns.b32 %d, %a, %b, %c;", "u32", operands, nth, [samples("b32", 3), base, offset])


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_extend_sign_and_mask(mode: str) -> None:
    def amount(count: int) -> int:
        return count & 31 if mode == "wrap" else min(count, 32)

    def extended(a: int, count: int) -> int:
        width = amount(count)
        low = a & ((1 << width) - 1)
        return low - (1 << width) if width and low >> (width - 1) else low

    check(f"szext.{mode}.s32 %d, %a, %b;", "s32", ["u32", "u32"], extended)
    check(f"szext.{mode}.u32 %d, %a, %b;", "u32", ["u32", "u32"], lambda a, b: a & ((1 << amount(b)) - 1))
    check(
        f"bmsk.{mode}.b32 %d, %a, %b;",
        "b32",
        ["u32", "u32"],
        lambda a, b: ((1 << amount(b)) - 1) << amount(a),
    )


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name: str, kind: str) -> None:
    text = f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %d, 7, 9, %p1;"
    check(text, "u32", [kind, kind], lambda a, b: 7 if COMPARISONS[name](a, b) else 9)


@pytest.mark.parametrize(("name", "unsigned"), [("lo", "lt"), ("ls", "le"), ("hi", "gt"), ("hs", "ge")])
def test_setp_unsigned_names(name: str, unsigned: str) -> None:
    check(
        f"setp.{name}.u32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;", "u32", ["u32", "u32"], COMPARISONS[unsigned]
    )


@pytest.mark.parametrize(
    ("name", "join"), [("and", lambda x, y: x & y), ("or", lambda x, y: x | y), ("xor", lambda x, y: x ^ y)]
)
def test_setp_combined(name: str, join: Callable[[bool, bool], bool]) -> None:
    """p = (a < b) op r and q = !(a < b) op r."""
    text = (
        f"setp.ne.u32 %p3, %c, 0; setp.lt.{name}.s32 %p1|%p2, %a, %b, %p3;"
        "selp.u32 %r8, 1, 0, %p1; selp.u32 %r9, 2, 0, %p2; or.b32 %d, %r8, %r9;"
    )
    flags = samples("u32", 5) & 1
    columns = [samples("s32", 0), samples("s32", 1), flags]
    check(text, "u32", ["s32", "s32", "u32"], lambda a, b, c: join(a < b, c) + 2 * join(a >= b, c), columns)


def test_predicate_logic() -> None:
    text = (
        "setp.lt.s32 %p1, %a, 0; setp.lt.s32 %p2, %b, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2;"
        "xor.pred %p5, %p3, %p4; not.pred %p6, %p5; mov.pred %p7, %p6; selp.b32 %d, 1, 0, %p7;"
    )
    check(text, "u32", ["s32", "s32"], lambda a, b: not (((a < 0) and (b < 0)) ^ ((a < 0) or (b < 0))))


def test_select() -> None:
    check("set.lt.u32.s32 %d, %a, %b;", "u32", ["s32", "s32"], lambda a, b: -1 if a < b else 0)
    check("slct.s32.s32 %d, %a, %b, %c;", "s32", ["s32"] * 3, lambda a, b, c: a if c >= 0 else b)
    for bits in (16, 64):
        text = f"setp.lt.s{bits} %p1, %a, %b; selp.b{bits} %d, %a, %b, %p1;"
        check(text, f"s{bits}", [f"s{bits}"] * 2, min)


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (0, (1 << bits) - 1) if kind[0] == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


INTEGERS = ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"]


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(INTEGERS, 2)))
def test_convert(source: str, target: str) -> None:
    """Truncation keeps the low bits, extension follows the source's sign, .sat clamps to the target."""
    low, high = limits(target)
    check(f"cvt.{target}.{source} %d, %a;", target, [source], lambda a: a)
    if limits(source)[0] < low or limits(source)[1] > high:
        check(f"cvt.sat.{target}.{source} %d, %a;", target, [source], lambda a: min(max(a, low), high))


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16"])
def test_pack_saturated(kind: str) -> None:
    """cvt.pack: a goes to the upper half, b to the lower; 8-bit types shift c up (PTX ISA "cvt.pack")."""
    bits = int(kind[1:])
    low, high = limits(kind)

    def packed(a: int, b: int, c: int = 0) -> int:
        pair = [min(max(item, low), high) & ((1 << bits) - 1) for item in (b, a)]
        return (c << 2 * bits | pair[1] << bits | pair[0]) if bits == 8 else pair[1] << bits | pair[0]

    if bits == 8:
        check(f"cvt.pack.sat.{kind}.s32.b32 %d, %a, %b, %c;", "b32", ["s32", "s32", "b32"], packed)
    else:
        check(f"cvt.pack.sat.{kind}.s32 %d, %a, %b;", "b32", ["s32", "s32"], packed)


def test_move_and_pack() -> None:
    text = "mov.b32 {%h1, %h2}, %a; mov.b32 %r8, {%h2, %h1}; mov.b64 %rd11, {%r8, %b};"
    text += "mov.b64 {%r9, %r10}, %rd11; add.u32 %d, %r9, %r10;"
    check(text, "u32", ["b32", "b32"], lambda a, b: (a >> 16 | (a & 0xFFFF) << 16) + b)
