// PTX ISA 9.7.9.21 "cvt", 9.7.9.22 "cvt.pack".
#include <cfenv>
#include <limits>

#include "alu.h"
#include "half_type.h"

namespace sim {

namespace {

enum class Type : u8 { kU8, kU16, kU32, kU64, kS8, kS16, kS32, kS64, kF16, kBF16, kF32, kF64 };

constexpr const char* kTypeNames[] = {"u8",  "u16", "u32", "u64",  "s8",  "s16",
                                      "s32", "s64", "f16", "bf16", "f32", "f64"};

bool find_type(const std::string& name, Type& type) {
  for (int i = 0; i < 12; i++) {
    if (name == kTypeNames[i]) {
      type = static_cast<Type>(i);
      return true;
    }
  }
  return false;
}

bool is_float(Type type) { return type >= Type::kF16; }
bool is_signed(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
int bits_of(Type type) {
  if (is_float(type)) return type == Type::kF32 ? 32 : type == Type::kF64 ? 64 : 16;
  return 8 << (static_cast<int>(type) & 3);
}

struct Mode {
  Type to, from;
  Round round;
  bool integer_round, saturate, flush, relu, satfinite;
};

double to_integral(double value, Round mode) {
  switch (mode) {
    case Round::kZero:
      return std::trunc(value);
    case Round::kDown:
      return std::floor(value);
    case Round::kUp:
      return std::ceil(value);
    default:
      return std::nearbyint(value);
  }
}

u32 to_single(double value, const Mode& mode) {
  if (value != value) return 0x7fffffff;
  float nearest = static_cast<float>(value);
  if (mode.round != Round::kNearest && static_cast<double>(nearest) != value) {
    bool above = static_cast<double>(nearest) > value;
    bool want_below = mode.round == Round::kDown || (mode.round == Round::kZero && value > 0);
    if (above && want_below) nearest = std::nextafterf(nearest, -INFINITY);
    if (!above && !want_below) nearest = std::nextafterf(nearest, INFINITY);
  }
  u32 bits = bits_as<u32>(nearest);
  return mode.flush && !(bits & 0x7f800000) ? bits & 0x80000000 : bits;
}

// Rounding to odd keeps a 64-bit integer's lowest bits in view of the rounding that follows.
double integer_to_double(u64 bits, bool negative_type, bool exact_target) {
  bool negative = negative_type && static_cast<i64>(bits) < 0;
  u64 magnitude = negative ? -bits : bits;
  if (!exact_target && magnitude >> 53) {
    int shift = 64 - __builtin_clzll(magnitude) - 53;
    bool sticky = magnitude & ((u64{1} << shift) - 1);
    double value = std::ldexp(static_cast<double>(magnitude >> shift | sticky), shift);
    return negative ? -value : value;
  }
  double value = static_cast<double>(magnitude);
  return negative ? -value : value;
}

u64 float_to_integer(double value, const Mode& mode) {
  int bits = bits_of(mode.to);
  if (value != value) return bits == 64 && !mode.saturate ? u64{1} << 63 : 0;
  value = to_integral(value, mode.round);
  if (is_signed(mode.to)) {
    double limit = std::ldexp(1.0, bits - 1);
    i64 result = value >= limit ? (bits == 64 ? std::numeric_limits<i64>::max() : (i64{1} << (bits - 1)) - 1)
                 : value <= -limit ? (bits == 64 ? std::numeric_limits<i64>::min() : -(i64{1} << (bits - 1)))
                                   : static_cast<i64>(value);
    return static_cast<u64>(result);
  }
  double limit = std::ldexp(1.0, bits);
  if (value <= 0) return 0;
  if (value >= limit) return bits == 64 ? ~u64{0} : (u64{1} << bits) - 1;
  return static_cast<u64>(value);
}

u64 from_double(double value, const Mode& mode) {
  if (mode.integer_round) value = to_integral(value, mode.round);
  if (mode.saturate) value = value != value ? 0 : std::clamp(value, 0.0, 1.0) + 0.0;
  u64 result = 0, sign = 0;
  switch (mode.to) {
    case Type::kF16:
      result = narrow<10, 5>(value, mode.round, mode.satfinite), sign = 0x8000;
      break;
    case Type::kBF16:
      result = narrow<7, 8>(value, mode.round, mode.satfinite), sign = 0x8000;
      break;
    case Type::kF32:
      result = to_single(value, mode), sign = 0x80000000;
      break;
    default:
      return value != value ? 0x7ff8000000000000u : bits_as<u64>(value);
  }
  bool nan = value != value;
  return mode.relu && !nan && (result & sign) ? 0 : result;
}

u64 convert(u64 bits, const Mode& mode) {
  double value = 0;
  switch (mode.from) {
    case Type::kF16:
      value = widen_f16(static_cast<u16>(bits));
      break;
    case Type::kBF16:
      value = widen_bf16(static_cast<u16>(bits));
      break;
    case Type::kF32: {
      u32 single = static_cast<u32>(bits);
      if (mode.flush && !(single & 0x7f800000)) single &= 0x80000000;
      value = bits_as<float>(single);
      break;
    }
    case Type::kF64:
      value = bits_as<double>(bits);
      break;
    default: {
      int width = bits_of(mode.from);
      u64 extended = bits << (64 - width);
      extended = is_signed(mode.from) ? static_cast<u64>(static_cast<i64>(extended) >> (64 - width))
                                      : extended >> (64 - width);
      if (is_float(mode.to)) {
        return from_double(integer_to_double(extended, is_signed(mode.from), mode.to == Type::kF64), mode);
      }
      if (!mode.saturate) return extended;
      int to = bits_of(mode.to);
      __int128 exact = is_signed(mode.from) ? __int128{static_cast<i64>(extended)} : __int128{extended};
      __int128 low = is_signed(mode.to) ? -(__int128{1} << (to - 1)) : 0;
      __int128 high = is_signed(mode.to) ? (__int128{1} << (to - 1)) - 1 : (__int128{1} << to) - 1;
      return static_cast<u64>(exact < low ? low : exact > high ? high : exact);
    }
  }
  return is_float(mode.to) ? from_double(value, mode) : float_to_integer(value, mode);
}

// A destination wider than the type is sign- or zero-extended to its full width.
u64 extend(u64 bits, Type type, bool wide) {
  int width = bits_of(type);
  if (width == 64) return bits;
  u64 shifted = bits << (64 - width);
  u64 result =
      is_signed(type) ? static_cast<u64>(static_cast<i64>(shifted) >> (64 - width)) : shifted >> (64 - width);
  return wide ? result : result & 0xffffffff;
}

Mode unpack(const Op& op) {
  return {static_cast<Type>(op.imm & 0xff),
          static_cast<Type>(op.imm >> 8 & 0xff),
          static_cast<Round>(op.imm >> 16 & 0xff),
          (op.aux & 1) != 0,
          (op.aux & 2) != 0,
          (op.aux & 4) != 0,
          (op.aux & 8) != 0,
          (op.aux & 16) != 0};
}

template <bool kWideTo, bool kWideFrom>
Step cvt(Warp& warp, const Op& op) {
  using To = std::conditional_t<kWideTo, u64, u32>;
  using From = std::conditional_t<kWideFrom, u64, u32>;
  Mode mode = unpack(op);
  const From* a = warp.reg<From>(op.a);
  To result[kLanes];
  bool narrow_register = op.size == 2;
  for (int i = 0; i < kLanes; i++) {
    u64 value = extend(convert(a[i], mode), mode.to, kWideTo);
    result[i] = static_cast<To>(narrow_register ? value & 0xffff : value);
  }
  inherit(warp, op.d, warp.init[op.a]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

i32 single_to_s32(float a) {
  return a >= 0x1p31f   ? std::numeric_limits<i32>::max()
         : a > -0x1p31f ? static_cast<i32>(a)
         : a != a       ? 0
                        : std::numeric_limits<i32>::min();
}
u64 extend_u32(u32 a) { return a; }
i64 extend_s32(i32 a) { return a; }
u32 truncate(u64 a) { return static_cast<u32>(a); }
float s32_to_single(i32 a) { return static_cast<float>(a); }
float u32_to_single(u32 a) { return static_cast<float>(a); }
u16 single_to_bf16(float a) { return narrow_bf16(a); }
float bf16_to_single(u16 a) { return (a & 0x7fff) > 0x7f80 ? bits_as<float>(0x7fffffffu) : widen_bf16(a); }
float f16_to_single(u16 a) { return (a & 0x7fff) > 0x7c00 ? bits_as<float>(0x7fffffffu) : widen_f16(a); }
u32 pack_bf16(float high, float low) { return static_cast<u32>(narrow_bf16(high)) << 16 | narrow_bf16(low); }

// cvt.rn.bf16x2.f32 d, a, b: a in the upper half.
Step cvt_pair(Warp& warp, const Op& op) {
  Mode mode = unpack(op);
  u32 result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    result[i] =
        static_cast<u32>(convert(warp.reg<u32>(op.a)[i], mode) << 16 | convert(warp.reg<u32>(op.b)[i], mode));
  }
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

// cvt.pack.sat.{u16,s16,u8,s8,u4,..}.s32[.b32] d, a, b[, c]: b in the lowest bits, c shifted up behind a.
Step cvt_pack(Warp& warp, const Op& op) {
  int width = static_cast<int>(op.imm);
  i64 low = op.aux ? -(i64{1} << (width - 1)) : 0,
      high = op.aux ? (i64{1} << (width - 1)) - 1 : (i64{1} << width) - 1;
  u32 mask = static_cast<u32>((u64{1} << width) - 1), result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    u32 a = static_cast<u32>(std::clamp<i64>(static_cast<i32>(warp.reg<u32>(op.a)[i]), low, high)) & mask;
    u32 b = static_cast<u32>(std::clamp<i64>(static_cast<i32>(warp.reg<u32>(op.b)[i]), low, high)) & mask;
    result[i] = a << width | b | (op.c == kNone ? 0 : warp.reg<u32>(op.c)[i] << 2 * width);
  }
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b] & (op.c == kNone ? kAllLanes : warp.init[op.c]));
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

bool decode_pack(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& to = inst.parts.at(3);
  op.imm = static_cast<u64>(std::stoi(to.substr(1)));
  op.aux = to[0] == 's';
  op.d = decoder.def(inst.args.at(0));
  op.a = decoder.use(inst.args.at(1), 4);
  op.b = decoder.use(inst.args.at(2), 4);
  op.c = inst.args.size() > 3 ? decoder.use(inst.args[3], 4) : kNone;
  op.fn = cvt_pack;
  return inst.parts[2] == "sat" && op.imm <= 16;
}

// The pairs that kernels are full of, without the general machinery.
bool decode_common(const Inst& inst, Decoder& decoder, Op& op, const Mode& mode) {
  if (mode.saturate || mode.flush || mode.relu || mode.satfinite) return false;
  const Arg &d = inst.args.at(0), &a = inst.args.at(1);
  if (a.kind == ArgKind::kReg && decoder.is_wide(a) != (bits_of(mode.from) == 64)) return false;
  if (decoder.is_wide(d) != (bits_of(mode.to) == 64)) return false;
  Type to = mode.to, from = mode.from;
  if (to == Type::kU64 && from == Type::kU32) return bind_map<u64, extend_u32, u32>(inst, decoder, op);
  if (to == Type::kS64 && from == Type::kS32) return bind_map<i64, extend_s32, i32>(inst, decoder, op);
  if (to == Type::kU32 && from == Type::kU64) return bind_map<u32, truncate, u64>(inst, decoder, op);
  if (to == Type::kF32 && from == Type::kBF16 && !mode.integer_round) {
    return bind_map<float, bf16_to_single, u16>(inst, decoder, op);
  }
  if (to == Type::kF32 && from == Type::kF16 && !mode.integer_round) {
    return bind_map<float, f16_to_single, u16>(inst, decoder, op);
  }
  if (to == Type::kS32 && from == Type::kF32 && mode.round == Round::kZero) {
    return bind_map<i32, single_to_s32, float>(inst, decoder, op);
  }
  if (mode.round != Round::kNearest) return false;
  if (to == Type::kF32 && from == Type::kS32) return bind_map<float, s32_to_single, i32>(inst, decoder, op);
  if (to == Type::kF32 && from == Type::kU32) return bind_map<float, u32_to_single, u32>(inst, decoder, op);
  if (to == Type::kBF16 && from == Type::kF32) return bind_map<u16, single_to_bf16, float>(inst, decoder, op);
  return false;
}

}  // namespace

bool decode_convert(const Inst& inst, Decoder& decoder, Op& op) {
  if (inst.parts[0] != "cvt" || inst.parts.size() < 3) return false;
  if (inst.has("pack")) return decode_pack(inst, decoder, op);
  Mode mode{};
  std::string to = inst.parts[inst.parts.size() - 2];
  bool pair = to.ends_with("x2");
  if (pair) to.resize(to.size() - 2);
  if (!find_type(inst.type(), mode.from) || !find_type(to, mode.to)) return false;
  bool integer_target = !is_float(mode.to);
  mode.round = integer_target ? Round::kZero : Round::kNearest;
  for (const std::string& part : inst.parts) {
    if (part == "rn" || part == "rni") mode.round = Round::kNearest;
    if (part == "rz" || part == "rzi") mode.round = Round::kZero;
    if (part == "rm" || part == "rmi") mode.round = Round::kDown;
    if (part == "rp" || part == "rpi") mode.round = Round::kUp;
    if (part == "rna") mode.round = Round::kNearestAway;
    if (part == "tf32" || part == "rs") return false;
    mode.integer_round |= !integer_target && part.size() == 3 && part[0] == 'r' && part[2] == 'i';
  }
  mode.saturate = inst.has("sat");
  mode.flush = inst.has("ftz");
  mode.relu = inst.has("relu");
  mode.satfinite = inst.has("satfinite");
  if (pair) {
    bool plain = mode.to == Type::kBF16 && mode.round == Round::kNearest && !mode.relu && !mode.satfinite;
    if (plain && inst.args.size() == 3) return bind_map<u32, pack_bf16, float, float>(inst, decoder, op);
  } else if (decode_common(inst, decoder, op, mode)) {
    return true;
  }
  op.imm = static_cast<u64>(mode.to) | static_cast<u64>(mode.from) << 8 | static_cast<u64>(mode.round) << 16;
  op.aux = mode.integer_round | mode.saturate << 1 | mode.flush << 2 | mode.relu << 3 | mode.satfinite << 4;
  op.d = decoder.def(inst.args.at(0));
  if (pair) {
    if (inst.args.size() != 3) return false;
    op.a = decoder.use_f(inst.args[1], 4);
    op.b = decoder.use_f(inst.args[2], 4);
    op.fn = cvt_pair;
    return true;
  }
  const Arg& source = inst.args.at(1);
  bool wide_to = decoder.is_wide(inst.args[0]);
  bool wide_from = source.kind == ArgKind::kReg ? decoder.is_wide(source) : bits_of(mode.from) == 64;
  op.a =
      is_float(mode.from) ? decoder.use_f(source, wide_from ? 8 : 4) : decoder.use(source, wide_from ? 8 : 4);
  if (inst.args[0].kind == ArgKind::kReg &&
      decoder.program.entry->registers[inst.args[0].reg].cls == RegClass::k16) {
    op.size = 2;
  }
  op.fn = wide_to ? (wide_from ? cvt<true, true> : cvt<true, false>)
                  : (wide_from ? cvt<false, true> : cvt<false, false>);
  return true;
}

}  // namespace sim
