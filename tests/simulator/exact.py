"""Correctly rounded arithmetic on exact rationals: the reference of the floating-point tests.

Values are Python floats (doubles hold every binary16, bfloat16 and binary32 value); a result is rounded once,
from its exact rational value, to the destination format (PTX ISA "Rounding Modifiers").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    """Binary floating-point format of `fraction` stored significand bits and `exponent` bits."""

    bits: int
    fraction: int
    exponent: int

    @property
    def min_exponent(self) -> int:
        return 2 - (1 << (self.exponent - 1))

    @property
    def max_finite(self) -> Fraction:
        return (2 - Fraction(1, 1 << self.fraction)) * Fraction(2) ** ((1 << (self.exponent - 1)) - 1)

    @property
    def min_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def unsigned(self) -> np.dtype:
        return np.dtype(f"u{self.bits // 8}")


F16 = Format(16, 10, 5)
BF16 = Format(16, 7, 8)
F32 = Format(32, 23, 8)
F64 = Format(64, 52, 11)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64}


def decode(bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Bit patterns as float64 values."""
    bits = np.asarray(bits).astype(fmt.unsigned)
    with np.errstate(invalid="ignore"):
        if fmt == BF16:
            return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return bits.view(f"f{fmt.bits // 8}").astype(np.float64)


def encode(value: float, fmt: Format) -> int:
    """Bit pattern of a value representable in fmt; NaN encodes as PTX's canonical NaN."""
    if math.isnan(value):
        return (1 << (fmt.bits - 1)) - 1
    if fmt == BF16:
        return int(np.float32(value).view(np.uint32)) >> 16
    with np.errstate(over="ignore"):
        return int(np.dtype(f"f{fmt.bits // 8}").type(value).view(fmt.unsigned))


def integral(value: Fraction, mode: str) -> int:
    """Round to an integer: rn (ties to even), rz, rm, rp, rna (ties away from zero)."""
    floor = math.floor(value)
    if mode == "rm":
        return floor
    if mode == "rp":
        return math.ceil(value)
    if mode == "rz":
        return math.trunc(value)
    rest = value - floor
    half = Fraction(1, 2)
    if rest != half:
        return floor + (rest > half)
    if mode == "rna":
        return floor + (value > 0)
    return floor + (floor & 1)


def rounded(value: Fraction, fmt: Format, mode: str = "rn", zero_sign: float = 1.0) -> float:
    """Round an exact value to fmt; a zero result from a zero value takes zero_sign."""
    if value == 0:
        return math.copysign(0.0, zero_sign)
    sign = -1.0 if value < 0 else 1.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, fmt.min_exponent) - fmt.fraction)
    result = integral(value / quantum, mode) * quantum
    if abs(result) > fmt.max_finite:
        towards_zero = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (float(fmt.max_finite) if towards_zero else math.inf)
    return math.copysign(float(result), sign)


def flushed(value: float, fmt: Format = F32) -> float:
    """.ftz: a subnormal becomes zero of the same sign."""
    return math.copysign(0.0, value) if abs(value) < fmt.min_normal else value


def add(a: float, b: float, fmt: Format = F32, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    total = Fraction(a) + Fraction(b)
    if total == 0:
        same_sign = math.copysign(1, a) == math.copysign(1, b)
        zero_sign = math.copysign(1, a) if a == 0 and same_sign else (-1.0 if mode == "rm" else 1.0)
        return math.copysign(0.0, zero_sign)
    return rounded(total, fmt, mode)


def multiply(a: float, b: float, fmt: Format = F32, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    return rounded(Fraction(a) * Fraction(b), fmt, mode, math.copysign(1, a) * math.copysign(1, b))


def fma(a: float, b: float, c: float, fmt: Format = F32, mode: str = "rn") -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b + c
    if not math.isfinite(c):
        return c
    product = Fraction(a) * Fraction(b)
    if product == 0:
        return add(math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b)), c, fmt, mode)
    total = product + Fraction(c)
    return rounded(total, fmt, mode, -1.0 if mode == "rm" else 1.0)


def divide(a: float, b: float, fmt: Format = F32, mode: str = "rn") -> float:
    sign = math.copysign(1, a) * math.copysign(1, b)
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    if math.isinf(a) or b == 0:
        return sign * math.inf
    if math.isinf(b):
        return sign * 0.0
    return rounded(Fraction(a) / Fraction(b), fmt, mode, sign)


def minimum(a: float, b: float) -> float:
    """min without .NaN: a number wins over NaN and -0 < +0 (PTX ISA "min")."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b == 0:
        return a if math.copysign(1, a) < 0 else b
    return min(a, b)


def maximum(a: float, b: float) -> float:
    return -minimum(-a, -b)


def convert(value: float, fmt: Format, mode: str = "rn") -> float:
    """Convert a value to a floating-point format."""
    if not math.isfinite(value):
        return value
    return rounded(Fraction(value), fmt, mode, math.copysign(1, value))


def to_integer(value: float, bits: int, signed: bool, mode: str) -> int:
    """cvt to an integer type: saturates; NaN gives 0 (PTX ISA "cvt")."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if math.isnan(value):
        return 0
    if math.isinf(value):
        return high if value > 0 else low
    return min(max(integral(Fraction(value), mode), low), high)
