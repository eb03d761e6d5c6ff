"""Conversions between floating-point and integer types (PTX ISA "cvt")."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from simulator import exact
from simulator.exact import FORMATS, decode, flushed
from simulator.helpers import assert_floats, float_samples, map_elements
from simulator.test_integer import samples, value

pytestmark = pytest.mark.simulator
COUNT = 512


def wide_samples(kind: str, target: exact.Format, seed: int = 0) -> np.ndarray:
    """Samples that reach the target's overflow, subnormal range and ties."""
    (column,) = float_samples(kind, COUNT, 1, seed)
    random = np.random.default_rng(seed)
    exponent = random.integers(target.min_exponent - target.fraction - 2, 1 - target.min_exponent + 2, COUNT)
    ties = np.ldexp(
        random.integers(0, 1 << (target.fraction + 2), COUNT) / (1 << (target.fraction + 1)), exponent
    )
    with np.errstate(over="ignore"):
        ties = (ties * random.choice([-1, 1], COUNT)).astype(np.float32)
    return np.concatenate([column, ties.view(np.uint32)])


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_narrow(target: str, mode: str) -> None:
    """Ties, overflow, subnormal results, NaN; the packed form puts its first operand in the upper half."""
    fmt = FORMATS[target]
    high, low = wide_samples("f32", fmt, 0), wide_samples("f32", fmt, 1)
    expected = [
        [exact.convert(item, fmt, mode) for item in decode(column, exact.F32).tolist()]
        for column in (high, low)
    ]
    actual = map_elements(f"cvt.{mode}.{target}.f32 %d, %a;", target, ["f32"], [high])
    assert_floats(actual, expected[0], target, [high])
    packed = map_elements(f"cvt.{mode}.{target}x2.f32 %d, %a, %b;", "b32", ["f32", "f32"], [high, low])
    assert_floats((packed >> 16).astype(np.uint16), expected[0], target, [high])
    assert_floats((packed & 0xFFFF).astype(np.uint16), expected[1], target, [low])


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_narrow_nan_is_canonical(target: str) -> None:
    nan = np.full(32, 0xFFC12345, np.uint32)
    packed = map_elements(f"cvt.rn.{target}x2.f32 %d, %a, %b;", "b32", ["f32", "f32"], [nan, nan])
    assert set(packed) == {0x7FFF7FFF}


@pytest.mark.parametrize("target", ["f16", "bf16"])
def test_narrow_relu(target: str) -> None:
    fmt = FORMATS[target]
    column = wide_samples("f32", fmt)
    actual = map_elements(f"cvt.rn.relu.{target}.f32 %d, %a;", target, ["f32"], [column])
    values = [exact.convert(item, fmt) for item in decode(column, exact.F32).tolist()]
    assert_floats(
        actual, [item if item > 0 or math.isnan(item) else 0.0 for item in values], target, [column]
    )


@pytest.mark.parametrize("source", ["f16", "bf16"])
def test_widen(source: str) -> None:
    (column,) = float_samples(source, COUNT, 1, 2)
    actual = map_elements(f"cvt.f32.{source} %d, %a;", "f32", [source], [column])
    assert_floats(actual, decode(column, FORMATS[source]).tolist(), "f32", [column])


def test_double() -> None:
    (single,) = float_samples("f32", COUNT, 1, 3)
    assert_floats(
        map_elements("cvt.f64.f32 %d, %a;", "f64", ["f32"], [single]), decode(single, exact.F32), "f64"
    )
    (double,) = float_samples("f64", COUNT, 1, 3)
    values = np.concatenate([decode(double, exact.F64), decode(single, exact.F32) * (1 + 2.0**-30)])
    for mode in ("rn", "rz"):
        actual = map_elements(f"cvt.{mode}.f32.f64 %d, %a;", "f32", ["f64"], [values.view(np.uint64)])
        assert_floats(actual, [exact.convert(item, exact.F32, mode) for item in values.tolist()], "f32")


def test_flush_and_saturate() -> None:
    (column,) = float_samples("f32", COUNT, 1, 4)
    values = decode(column, exact.F32).tolist()
    actual = map_elements("cvt.ftz.f32.f32 %d, %a;", "f32", ["f32"], [column])
    assert_floats(actual, [flushed(item) for item in values], "f32", [column])
    actual = map_elements("cvt.sat.f32.f32 %d, %a;", "f32", ["f32"], [column])
    assert_floats(actual, [min(item, 1.0) if item > 0 else 0.0 for item in values], "f32", [column])


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_round_to_integral(mode: str) -> None:
    columns = float_samples("f32", COUNT, 1, 5)
    columns[0][:64] = (np.arange(-32, 32) / 2 + 0.25 * (np.arange(64) % 3)).astype(np.float32).view(np.uint32)
    actual = map_elements(f"cvt.{mode}.f32.f32 %d, %a;", "f32", ["f32"], columns)
    expected = [
        math.copysign(float(exact.integral(Fraction(item), mode[:2])), item) if math.isfinite(item) else item
        for item in decode(columns[0], exact.F32).tolist()
    ]
    assert_floats(actual, expected, "f32", columns)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("target", ["s32", "u32", "s16", "u16", "s8", "u8", "s64", "u64"])
def test_float_to_integer(target: str, mode: str) -> None:
    """Out-of-range values clamp; NaN gives 0 for integers of at most 32 bits."""
    (column,) = float_samples("f32", COUNT, 1, 6)
    column[:128] = ((np.arange(128) - 64) / 4).astype(np.float32).view(np.uint32)
    edges = [
        -129.0,
        -128.5,
        127.5,
        255.5,
        256.0,
        32767.5,
        65535.5,
        2.0**31,
        -(2.0**31),
        2.0**32,
        2.0**63,
        2.0**64,
    ]
    column[128 : 128 + len(edges)] = np.array(edges, np.float32).view(np.uint32)
    if target[1:] == "64":
        column[np.isnan(decode(column, exact.F32))] = 0
    actual = map_elements(f"cvt.{mode}.{target}.f32 %d, %a;", target, ["f32"], [column])
    bits = int(target[1:])
    for item, result in zip(decode(column, exact.F32).tolist(), actual.tolist(), strict=True):
        wanted = exact.to_integer(item, bits, target[0] == "s", mode[:2])
        assert result == wanted & ((1 << bits) - 1), (
            f"cvt.{mode}.{target}.f32 of {item!r}: {result:#x}, {wanted}"
        )


def test_float_to_integer_flush() -> None:
    column = np.full(32, 1, np.uint32)
    assert set(map_elements("cvt.rpi.ftz.s32.f32 %d, %a;", "s32", ["f32"], [column])) == {0}
    assert set(map_elements("cvt.rpi.s32.f32 %d, %a;", "s32", ["f32"], [column])) == {1}


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_integer_to_float(source: str, mode: str) -> None:
    column = samples(source, 8)
    actual = map_elements(f"cvt.{mode}.f32.{source} %d, %a;", "f32", [source], [column])
    expected = [exact.rounded(Fraction(value(int(item), source)), exact.F32, mode) for item in column]
    assert_floats(actual, expected, "f32", [column])


@pytest.mark.parametrize(
    ("target", "source"), [("f16", "s32"), ("f16", "u16"), ("bf16", "s32"), ("f64", "s64")]
)
def test_integer_to_other_floats(target: str, source: str) -> None:
    column = samples(source, 9)
    actual = map_elements(f"cvt.rn.{target}.{source} %d, %a;", target, [source], [column])
    expected = [exact.rounded(Fraction(value(int(item), source)), FORMATS[target]) for item in column]
    assert_floats(actual, expected, target, [column])
