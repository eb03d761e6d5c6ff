// binary16 and bfloat16: widening is exact; narrowing rounds once from single or double precision.
#pragma once

#include <cmath>

#include "common.h"

namespace sim {

enum class Round : u8 { kNearest, kZero, kDown, kUp, kNearestAway };

// Rounds a finite double to `kFraction` stored bits and `kExponent` exponent bits: the bit pattern.
template <int kFraction, int kExponent>
u16 narrow(double value, Round mode, bool satfinite = false) {
  constexpr u16 kInfinity = ((1 << kExponent) - 1) << kFraction;
  u64 bits = bits_as<u64>(value);
  u16 sign = static_cast<u16>(bits >> 63 << 15);
  if (value != value) return 0x7fff;
  if (std::isinf(value)) return satfinite ? sign | (kInfinity - 1) : sign | kInfinity;
  if (value == 0) return sign;
  bool negative = sign != 0;
  int exponent = std::max(static_cast<int>(bits >> 52 & 0x7ff) - 1023, 2 - (1 << (kExponent - 1)));
  double unit = std::ldexp(1.0, exponent - kFraction),
         scaled = std::fabs(value) / unit;  // exact: a power of two
  double whole = std::floor(scaled), rest = scaled - whole;
  bool up = false;
  switch (mode) {
    case Round::kNearest:
      up = rest > 0.5 || (rest == 0.5 && std::fmod(whole, 2.0) == 1.0);
      break;
    case Round::kNearestAway:
      up = rest >= 0.5;
      break;
    case Round::kZero:
      break;
    case Round::kDown:
      up = negative && rest > 0;
      break;
    case Round::kUp:
      up = !negative && rest > 0;
      break;
  }
  u32 mantissa = static_cast<u32>(whole) + up;
  u32 biased = static_cast<u32>(exponent + (1 << (kExponent - 1)) -
                                2);  // exponent field of mantissa 2^kFraction, less 1
  u32 result = (biased << kFraction) + mantissa;
  if (result >= kInfinity) {
    bool toward = mode == Round::kNearest || mode == Round::kNearestAway ||
                  (mode == Round::kUp && !negative) || (mode == Round::kDown && negative);
    result = satfinite || !toward ? kInfinity - 1 : kInfinity;
  }
  return static_cast<u16>(sign | result);
}

inline float widen_bf16(u16 bits) { return bits_as<float>(static_cast<u32>(bits) << 16); }

inline float widen_f16(u16 bits) {
  u32 magnitude = bits & 0x7fff;
  float value = magnitude >= 0x7c00 ? bits_as<float>(0x7f800000u | (magnitude & 0x3ff) << 13)
                                    : bits_as<float>(magnitude << 13) * 0x1p112f;
  return bits & 0x8000 ? -value : value;
}

inline u16 narrow_bf16(float value) {
  u32 bits = bits_as<u32>(value);
  if (value != value) return 0x7fff;
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Half {
  u16 bits;
  static double widen(u16 value) { return widen_f16(value); }
  static u16 narrow_to(double value, Round mode = Round::kNearest) { return narrow<10, 5>(value, mode); }
  static constexpr u16 kOne = 0x3c00, kInfinity = 0x7c00;
};

struct Bfloat {
  u16 bits;
  static double widen(u16 value) { return widen_bf16(value); }
  static u16 narrow_to(double value, Round mode = Round::kNearest) { return narrow<7, 8>(value, mode); }
  static constexpr u16 kOne = 0x3f80, kInfinity = 0x7f80;
};

// round_to_odd(a * b + c): adding in double with the last bit kept sticky, so that rounding again is rounding
// once.
inline double add_to_odd(double x, double y) {
  double sum = x + y, other = sum - x;
  double error = (x - (sum - other)) + (y - other);
  if (error != 0 && !(bits_as<u64>(sum) & 1) && std::isfinite(sum)) {
    sum = std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
  }
  return sum;
}

}  // namespace sim
