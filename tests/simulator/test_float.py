"""Floating-point instructions against correctly rounded rationals (PTX ISA "Floating Point")."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from simulator import exact
from simulator.exact import FORMATS, decode, flushed
from simulator.helpers import assert_floats, float_samples, map_elements

pytestmark = pytest.mark.simulator
COUNT = 512


def check(instruction: str, kind: str, operands: int, expected: Callable[..., float], seed: int = 0) -> None:
    columns = float_samples(kind, COUNT, operands, seed)
    actual = map_elements(instruction, kind, [kind] * operands, columns)
    values = [decode(column, FORMATS[kind]).tolist() for column in columns]
    assert_floats(actual, [expected(*row) for row in zip(*values, strict=True)], kind, columns)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_rounding(kind: str, mode: str) -> None:
    fmt = FORMATS[kind]
    check(f"add.{mode}.{kind} %d, %a, %b;", kind, 2, lambda a, b: exact.add(a, b, fmt, mode))
    check(f"sub.{mode}.{kind} %d, %a, %b;", kind, 2, lambda a, b: exact.add(a, -b, fmt, mode))
    check(f"mul.{mode}.{kind} %d, %a, %b;", kind, 2, lambda a, b: exact.multiply(a, b, fmt, mode))
    check(f"fma.{mode}.{kind} %d, %a, %b, %c;", kind, 3, lambda a, b, c: exact.fma(a, b, c, fmt, mode))


def test_default_rounding() -> None:
    check("add.f32 %d, %a, %b;", "f32", 2, exact.add)
    check("mul.f32 %d, %a, %b;", "f32", 2, exact.multiply)
    check("mad.rn.f32 %d, %a, %b, %c;", "f32", 3, exact.fma)


def flush_all(function: Callable[..., float]) -> Callable[..., float]:
    return lambda *values: flushed(function(*(flushed(value) for value in values)))


def saturated(value: float) -> float:
    return 0.0 if math.isnan(value) or value <= 0 else min(value, 1.0)


def test_flush_to_zero() -> None:
    check("add.rn.ftz.f32 %d, %a, %b;", "f32", 2, flush_all(exact.add))
    check("sub.ftz.f32 %d, %a, %b;", "f32", 2, flush_all(lambda a, b: exact.add(a, -b)))
    check("mul.rz.ftz.f32 %d, %a, %b;", "f32", 2, flush_all(lambda a, b: exact.multiply(a, b, mode="rz")))
    check("fma.rn.ftz.f32 %d, %a, %b, %c;", "f32", 3, flush_all(exact.fma))
    check("max.ftz.f32 %d, %a, %b;", "f32", 2, flush_all(exact.maximum))
    check("abs.ftz.f32 %d, %a;", "f32", 1, flush_all(abs))
    check("neg.ftz.f32 %d, %a;", "f32", 1, flush_all(lambda a: -a))


def test_saturation() -> None:
    check("add.sat.f32 %d, %a, %b;", "f32", 2, lambda a, b: saturated(exact.add(a, b)))
    check("mul.ftz.sat.f32 %d, %a, %b;", "f32", 2, lambda a, b: saturated(flush_all(exact.multiply)(a, b)))
    check("fma.rn.sat.f32 %d, %a, %b, %c;", "f32", 3, lambda a, b, c: saturated(exact.fma(a, b, c)))


def test_sign() -> None:
    check("abs.f32 %d, %a;", "f32", 1, abs)
    check("neg.f32 %d, %a;", "f32", 1, lambda a: -a)
    check(
        "copysign.f32 %d, %a, %b;", "f32", 2, lambda a, b: math.nan if math.isnan(b) else math.copysign(b, a)
    )


def test_copysign_of_nan() -> None:
    """copysign changes the sign bit only, of NaN as well."""
    sign, magnitude = float_samples("f32", COUNT, 2, 3)
    actual = map_elements("copysign.f32 %d, %a, %b;", "f32", ["f32", "f32"], [sign, magnitude])
    np.testing.assert_array_equal(actual, (sign & 0x80000000) | (magnitude & 0x7FFFFFFF))


def propagating(function: Callable[..., float]) -> Callable[..., float]:
    return lambda *values: math.nan if any(map(math.isnan, values)) else function(*values)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize(("name", "function"), [("min", exact.minimum), ("max", exact.maximum)])
def test_minimum_maximum(name: str, function: Callable[..., float], kind: str) -> None:
    """A number wins over NaN unless .NaN is given; two NaNs give the canonical NaN (PTX ISA "min")."""
    check(f"{name}.{kind} %d, %a, %b;", kind, 2, function)
    if kind != "f64":
        check(f"{name}.NaN.{kind} %d, %a, %b;", kind, 2, propagating(function))
    nan = FORMATS[kind].unsigned.type(-1 % (1 << FORMATS[kind].bits) - 5)
    both = np.full(32, nan)
    if kind != "f64":
        canonical = (1 << (FORMATS[kind].bits - 1)) - 1
        assert set(map_elements(f"{name}.{kind} %d, %a, %b;", kind, [kind, kind], [both, both])) == {
            canonical
        }


def test_minimum_of_three_magnitudes() -> None:
    def signed(a: float, b: float) -> float:
        sign = math.copysign(1, a) * math.copysign(1, b)
        return math.copysign(exact.maximum(abs(a), abs(b)), sign)

    columns = float_samples("f32", COUNT, 2, 4)
    finite = np.isfinite(decode(columns[0], exact.F32)) & np.isfinite(decode(columns[1], exact.F32))
    columns = [column[finite][: finite.sum() // 32 * 32] for column in columns]
    actual = map_elements("max.xorsign.abs.f32 %d, %a, %b;", "f32", ["f32", "f32"], columns)
    values = [decode(column, exact.F32).tolist() for column in columns]
    assert_floats(actual, [signed(a, b) for a, b in zip(*values, strict=True)], "f32", columns)


def test_divide() -> None:
    check("div.rn.f32 %d, %a, %b;", "f32", 2, exact.divide)
    check("div.rz.f32 %d, %a, %b;", "f32", 2, lambda a, b: exact.divide(a, b, mode="rz"))
    check("div.rn.f64 %d, %a, %b;", "f64", 2, lambda a, b: exact.divide(a, b, exact.F64))
    check("rcp.rn.f32 %d, %a;", "f32", 1, lambda a: exact.divide(1.0, a))


def test_square_root() -> None:
    def root(value: float) -> float:
        return math.nan if value < 0 else math.sqrt(value) if math.isfinite(value) else value

    check("sqrt.rn.f32 %d, %a;", "f32", 1, lambda a: float(np.float32(root(a))))
    check("sqrt.rn.f64 %d, %a;", "f64", 1, root)


HALF_OPERATIONS = [
    ("add", 2, lambda fmt: lambda a, b: exact.add(a, b, fmt)),
    ("sub", 2, lambda fmt: lambda a, b: exact.add(a, -b, fmt)),
    ("mul", 2, lambda fmt: lambda a, b: exact.multiply(a, b, fmt)),
    ("fma.rn", 3, lambda fmt: lambda a, b, c: exact.fma(a, b, c, fmt)),
    ("min", 2, lambda fmt: exact.minimum),
    ("max", 2, lambda fmt: exact.maximum),
    ("neg", 1, lambda fmt: lambda a: -a),
    ("abs", 1, lambda fmt: abs),
]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize(("name", "operands", "function"), HALF_OPERATIONS)
def test_half(name: str, operands: int, function: Callable[..., Callable[..., float]], kind: str) -> None:
    """Scalar and packed half precision; subnormals are kept."""
    expected = function(FORMATS[kind])
    arguments = ", ".join(["%d", "%a", "%b", "%c"][: operands + 1])
    check(f"{name}.{kind} {arguments};", kind, operands, expected)
    pairs = [column.view(np.uint32) for column in float_samples(kind, 2 * COUNT, operands, 1)]
    packed = map_elements(f"{name}.{kind}x2 {arguments};", "b32", ["b32"] * operands, pairs)
    values = [decode(pair.view(np.uint16), FORMATS[kind]).tolist() for pair in pairs]
    halves = [pair.view(np.uint16) for pair in pairs]
    assert_floats(packed.view(np.uint16), [expected(*row) for row in zip(*values, strict=True)], kind, halves)


def test_half_relu() -> None:
    def relu(a: float, b: float, c: float) -> float:
        result = exact.fma(a, b, c, exact.BF16)
        return math.nan if math.isnan(result) else max(result, 0.0) if result else 0.0

    check("fma.rn.relu.bf16 %d, %a, %b, %c;", "bf16", 3, relu)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "equ": lambda a, b: not (a < b or a > b),
    "neu": lambda a, b: a != b,
    "ltu": lambda a, b: not a >= b,
    "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b,
    "geu": lambda a, b: not a < b,
    "num": lambda a, b: not (math.isnan(a) or math.isnan(b)),
    "nan": lambda a, b: math.isnan(a) or math.isnan(b),
}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_setp(name: str, kind: str) -> None:
    """Ordered comparisons are false with NaN, unordered ones true (PTX ISA "Comparisons")."""
    columns = float_samples(kind, COUNT, 2, 7)
    text = f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %d, 1, 0, %p1;"
    actual = map_elements(text, "u32", [kind, kind], columns)
    values = [decode(column, FORMATS[kind]).tolist() for column in columns]
    np.testing.assert_array_equal(actual, [COMPARISONS[name](a, b) for a, b in zip(*values, strict=True)])


def test_setp_flushes() -> None:
    columns = [np.array([1, 0x80000001, 0, 0x00800000] * 8, np.uint32), np.zeros(32, np.uint32)]
    text = "setp.eq.ftz.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;"
    np.testing.assert_array_equal(map_elements(text, "u32", ["f32", "f32"], columns), [1, 1, 1, 0] * 8)


def test_testp() -> None:
    (column,) = float_samples("f32", COUNT, 1, 9)
    values = decode(column, exact.F32)
    subnormal = (np.abs(values) < exact.F32.min_normal) & (values != 0)
    for name, expected in {
        "finite": np.isfinite(values),
        "infinite": np.isinf(values),
        "number": ~np.isnan(values),
        "notanumber": np.isnan(values),
        "normal": np.isfinite(values) & ~subnormal,  # zero counts as normal
        "subnormal": subnormal,
    }.items():
        text = f"testp.{name}.f32 %p1, %a; selp.u32 %d, 1, 0, %p1;"
        np.testing.assert_array_equal(map_elements(text, "u32", ["f32"], [column]), expected, name)


def check_approximate(
    instruction: str,
    values: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    relative: float,
    absolute: float,
) -> None:
    """values float32; |result - function| <= relative * |function| + absolute, specials by exact class."""
    actual = (
        map_elements(instruction, "f32", ["f32"], [values.view(np.uint32)])
        .view(np.float32)
        .astype(np.float64)
    )
    with np.errstate(all="ignore"):
        expected = function(values.astype(np.float64))
        expected[np.abs(expected) > float(exact.F32.max_finite)] *= np.inf
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    error = np.abs(actual[finite] - expected[finite])
    bound = relative * np.abs(expected[finite]) + absolute
    worst = np.argmax(error - bound)
    assert (error <= bound).all(), f"{instruction} at {values[finite][worst]!r}: {actual[finite][worst]!r}"


def spread(low: float, high: float, extra: Sequence[float] = ()) -> np.ndarray:
    random = np.random.default_rng(0)
    values = np.concatenate([random.uniform(low, high, 512 - len(extra)), extra])
    return values.astype(np.float32)


ULP = 2.0**-23
SPECIALS = [0.0, -0.0, math.inf, -math.inf, math.nan]


def test_exponential() -> None:
    """Maximum relative error 2^-22 (PTX ISA "ex2"); subnormal results are kept without .ftz."""
    values = spread(-140, 128, [*SPECIALS, -149.0, -126.0, 127.5, 200.0, -200.0])
    check_approximate("ex2.approx.f32 %d, %a;", values, np.exp2, 2 * ULP, 2.0**-149)
    normal = spread(-125, 127, SPECIALS)
    check_approximate("ex2.approx.ftz.f32 %d, %a;", normal, np.exp2, 2 * ULP, 0.0)
    tiny = np.full(32, -130.0, np.float32).view(np.uint32)
    assert not map_elements("ex2.approx.ftz.f32 %d, %a;", "f32", ["f32"], [tiny]).any()


def test_logarithm() -> None:
    """Absolute error 2^-22 in (0.5, 2), relative 2^-22 elsewhere (PTX ISA "lg2")."""
    check_approximate("lg2.approx.f32 %d, %a;", spread(0.5, 2.0), np.log2, 2 * ULP, 2 * ULP)
    outside = np.concatenate([spread(2.0, 1e30), spread(1e-30, 0.5), spread(-5, -1, SPECIALS)])
    check_approximate("lg2.approx.f32 %d, %a;", outside, np.log2, 2 * ULP, 0.0)
    check_approximate("lg2.approx.ftz.f32 %d, %a;", outside, np.log2, 2 * ULP, 0.0)


def test_reciprocal() -> None:
    """rcp: 1 ulp; rsqrt: relative 2^-22.9; sqrt: relative 2^-23 (PTX ISA "rcp", "rsqrt", "sqrt")."""
    values = np.concatenate([spread(1e-30, 1e30, SPECIALS), spread(-4, -0.25)])
    check_approximate("rcp.approx.f32 %d, %a;", values, np.reciprocal, ULP, 0.0)
    check_approximate("rcp.approx.ftz.f32 %d, %a;", values, np.reciprocal, ULP, 0.0)
    check_approximate("rsqrt.approx.f32 %d, %a;", values, lambda x: 1 / np.sqrt(x), 1.1 * ULP, 0.0)
    check_approximate("sqrt.approx.f32 %d, %a;", values, np.sqrt, 1.1 * ULP, 0.0)
    check_approximate("sqrt.approx.ftz.f32 %d, %a;", values, np.sqrt, 1.1 * ULP, 0.0)


def test_hyperbolic_tangent() -> None:
    """tanh.approx: relative error 2^-11 (PTX ISA "tanh")."""
    check_approximate("tanh.approx.f32 %d, %a;", spread(-6, 6, SPECIALS), np.tanh, 2.0**-11, 0.0)


@pytest.mark.parametrize("form", ["approx", "full", "approx.ftz"])
def test_approximate_divide(form: str) -> None:
    """2 ulp for |divisor| in [2^-126, 2^126] (PTX ISA "div")."""
    dividend, divisor = spread(-50, 50), spread(0.01, 1000)
    columns = [dividend.view(np.uint32), divisor.view(np.uint32)]
    actual = map_elements(f"div.{form}.f32 %d, %a, %b;", "f32", ["f32", "f32"], columns).view(np.float32)
    np.testing.assert_allclose(actual, dividend.astype(np.float64) / divisor, rtol=2 * ULP)
