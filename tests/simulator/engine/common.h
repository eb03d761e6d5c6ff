// Words every part of the engine shares: integer names, faults, reading bits as another type.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kLanes = 32;
constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kNone = 0xffffffffu;

// A fault of the simulated program. The machine adds kernel, CTA, warp and line before it reaches Python.
struct Fault : std::runtime_error {
  Fault(std::string kind, const std::string& message, int lane = -1)
      : std::runtime_error(message), kind(std::move(kind)), lane(lane) {}
  std::string kind, kernel, source_line;
  int cta = -1, warp = -1, lane = -1, ptx_line = -1;
};

[[noreturn]] inline void fail(const char* kind, const std::string& message, int lane = -1) {
  throw Fault(kind, message, lane);
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int first_lane(u32 mask) { return __builtin_ctz(mask); }
inline int lane_count(u32 mask) { return __builtin_popcount(mask); }

std::string hex(u64 value);

// xorshift generator of the adversary: the same decisions for the same seed on every machine.
struct Random {
  u64 state;
  explicit Random(u64 seed) : state(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  u64 next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1du >> 16;
  }
  u32 below(u32 bound) { return bound ? static_cast<u32>(next() % bound) : 0; }
  bool chance(u32 numerator, u32 denominator) { return below(denominator) < numerator; }
};

}  // namespace sim
