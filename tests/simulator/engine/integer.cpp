// PTX ISA 9.7.1 "Integer Arithmetic Instructions", 9.7.2 "Extended-Precision Integer Arithmetic Instructions"
// (no carry).
#include <limits>

#include "alu.h"

namespace sim {

namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
T add(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}
template <class T>
T sub(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
}
template <class T>
T mul_lo(T a, T b) {
  return static_cast<T>(static_cast<u64>(a) * static_cast<u64>(b));
}
template <class T>
T mul_hi(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 64);
  } else {
    using Wide = std::conditional_t<std::is_signed_v<T>, i64, u64>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> 8 * sizeof(T));
  }
}
template <class T, class Wide>
Wide mul_wide(T a, T b) {
  return static_cast<Wide>(a) * static_cast<Wide>(b);
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add(mul_lo(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add(mul_hi(a, b), c);
}
template <class T, class Wide>
Wide mad_wide(T a, T b, Wide c) {
  return add(mul_wide<T, Wide>(a, b), c);
}
template <class T>
T clamp_to_s32(i64 value) {
  return static_cast<T>(std::clamp<i64>(value, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
i32 add_sat(i32 a, i32 b) { return clamp_to_s32<i32>(i64{a} + b); }
i32 sub_sat(i32 a, i32 b) { return clamp_to_s32<i32>(i64{a} - b); }
i32 mad_hi_sat(i32 a, i32 b, i32 c) { return clamp_to_s32<i32>(i64{mul_hi(a, b)} + c); }
template <class T>
i32 mul24_lo(T a, T b) {
  auto low = [](T x) {
    return std::is_signed_v<T> ? i64(static_cast<i32>(u32(x) << 8) >> 8) : i64(u32(x) & 0xffffff);
  };
  return static_cast<i32>(low(a) * low(b));
}
template <class T>
i32 mad24_lo(T a, T b, T c) {
  return add<i32>(mul24_lo(a, b), static_cast<i32>(c));
}
// Division by zero is undefined in PTX; Hopper gives all ones, and the dividend as the remainder.
template <class T>
T divide(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return sub<T>(0, a);
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T negate(T a) {
  return sub<T>(0, a);
}
template <class T>
T absolute(T a) {
  return a < 0 ? sub<T>(0, a) : a;
}
template <class T>
u32 sad(T a, T b, T c) {
  return static_cast<u32>(c) + static_cast<u32>(a < b ? sub(b, a) : sub(a, b));
}
template <u16 (*kFunction)(u16, u16)>
u32 pair(u32 a, u32 b) {
  return kFunction(static_cast<u16>(a), static_cast<u16>(b)) |
         static_cast<u32>(kFunction(static_cast<u16>(a >> 16), static_cast<u16>(b >> 16))) << 16;
}
u16 smaller_s16(u16 a, u16 b) { return static_cast<i16>(a) < static_cast<i16>(b) ? a : b; }
u16 larger_s16(u16 a, u16 b) { return static_cast<i16>(a) > static_cast<i16>(b) ? a : b; }

template <class T>
struct Wider;
template <>
struct Wider<u16> {
  using Type = u32;
};
template <>
struct Wider<i16> {
  using Type = i32;
};
template <>
struct Wider<u32> {
  using Type = u64;
};
template <>
struct Wider<i32> {
  using Type = i64;
};

template <class T>
bool decode_typed(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  bool saturate = inst.has("sat");
  if (saturate) {
    if constexpr (std::is_same_v<T, i32>) {
      if (name == "add") return bind_map<T, add_sat, T, T>(inst, decoder, op);
      if (name == "sub") return bind_map<T, sub_sat, T, T>(inst, decoder, op);
      if (name == "mad" && inst.has("hi")) return bind_map<T, mad_hi_sat, T, T, T>(inst, decoder, op);
    }
    return false;
  }
  if (name == "add") return bind_map<T, add<T>, T, T>(inst, decoder, op);
  if (name == "sub") return bind_map<T, sub<T>, T, T>(inst, decoder, op);
  if (name == "div") return bind_map<T, divide<T>, T, T>(inst, decoder, op);
  if (name == "rem") return bind_map<T, remainder<T>, T, T>(inst, decoder, op);
  if (name == "min") return bind_map<T, smaller<T>, T, T>(inst, decoder, op);
  if (name == "max") return bind_map<T, larger<T>, T, T>(inst, decoder, op);
  if (name == "neg") return bind_map<T, negate<T>, T>(inst, decoder, op);
  if (name == "abs") return bind_map<T, absolute<T>, T>(inst, decoder, op);
  if constexpr (sizeof(T) == 4) {
    if (name == "sad") return bind_map<u32, sad<T>, T, T, T>(inst, decoder, op);
    if (name == "mul24" && inst.has("lo")) return bind_map<i32, mul24_lo<T>, T, T>(inst, decoder, op);
    if (name == "mad24" && inst.has("lo")) return bind_map<i32, mad24_lo<T>, T, T, T>(inst, decoder, op);
  }
  if (name != "mul" && name != "mad") return false;
  bool mad = name == "mad";
  if (inst.has("lo")) {
    return mad ? bind_map<T, mad_lo<T>, T, T, T>(inst, decoder, op)
               : bind_map<T, mul_lo<T>, T, T>(inst, decoder, op);
  }
  if (inst.has("hi")) {
    return mad ? bind_map<T, mad_hi<T>, T, T, T>(inst, decoder, op)
               : bind_map<T, mul_hi<T>, T, T>(inst, decoder, op);
  }
  if constexpr (sizeof(T) < 8) {
    using Wide = typename Wider<T>::Type;
    if (inst.has("wide")) {
      return mad ? bind_map<Wide, mad_wide<T, Wide>, T, T, Wide>(inst, decoder, op)
                 : bind_map<Wide, mul_wide<T, Wide>, T, T>(inst, decoder, op);
    }
  }
  return false;
}

// add.cc, addc, sub.cc, subc, mad.cc, madc: the carry is a predicate of the warp's own.
u32 carry_predicate(Decoder& decoder) {
  auto [found, inserted] = decoder.program.symbols.try_emplace("%carry", decoder.program.preds);
  if (inserted) decoder.program.preds++;
  return static_cast<u32>(found->second);
}

template <class T>
Step carry(Warp& warp, const Op& op) {
  constexpr int kSubtract = 1, kUses = 2, kSets = 4, kMultiply = 8, kHigh = 16;
  const T* a = warp.reg<T>(op.a);
  const T* b = warp.reg<T>(op.b);
  const T* c = warp.reg<T>(op.c);
  T result[kLanes];
  u32 out = 0, in = op.aux & kUses ? warp.preds[op.e] : 0;
  for (int i = 0; i < kLanes; i++) {
    unsigned __int128 x = a[i], y = b[i];
    if (op.aux & kMultiply) {
      x = x * y >> (op.aux & kHigh ? 8 * sizeof(T) : 0);
      x = static_cast<T>(x);
      y = c[i];
    }
    unsigned __int128 sum = op.aux & kSubtract ? x - y - (in >> i & 1) : x + y + (in >> i & 1);
    result[i] = static_cast<T>(sum);
    out |= static_cast<u32>(sum >> 8 * sizeof(T) & 1) << i;
  }
  if (op.aux & kSets) warp.set_pred(op.e, out);
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

bool decode_carry(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  bool uses = name == "addc" || name == "subc" || name == "madc";
  bool sets = inst.has("cc");
  if (!uses && !sets) return false;
  bool subtract = name.starts_with("sub"), multiply = name.starts_with("mad"), wide = inst.type()[1] == '6';
  if (multiply && inst.type()[0] == 's' && inst.has("hi")) fail("unknown-instruction", inst.text);
  op.aux = subtract | uses << 1 | sets << 2 | multiply << 3 | inst.has("hi") << 4;
  op.d = decoder.def(inst.args.at(0));
  op.a = decoder.use(inst.args.at(1), wide ? 8 : 4);
  op.b = decoder.use(inst.args.at(2), wide ? 8 : 4);
  op.c = multiply ? decoder.use(inst.args.at(3), wide ? 8 : 4) : op.b;
  op.e = carry_predicate(decoder);
  op.fn = wide ? carry<u64> : carry<u32>;
  return true;
}

}  // namespace

bool decode_integer(const Inst& inst, Decoder& decoder, Op& op) {
  static const char* names[] = {"add", "sub", "mul", "mad",   "div",   "rem",  "min",  "max",
                                "neg", "abs", "sad", "mul24", "mad24", "addc", "subc", "madc"};
  if (std::find(std::begin(names), std::end(names), inst.parts[0]) == std::end(names)) return false;
  if (decode_carry(inst, decoder, op)) return true;
  const std::string& type = inst.type();
  if (type == "u16") return decode_typed<u16>(inst, decoder, op);
  if (type == "s16") return decode_typed<i16>(inst, decoder, op);
  if (type == "u32") return decode_typed<u32>(inst, decoder, op);
  if (type == "s32") return decode_typed<i32>(inst, decoder, op);
  if (type == "u64") return decode_typed<u64>(inst, decoder, op);
  if (type == "s64") return decode_typed<i64>(inst, decoder, op);
  const std::string& name = inst.parts[0];
  if (type == "u16x2" || type == "s16x2") {
    bool is_signed = type[0] == 's';
    if (name == "add") return bind_map<u32, pair<add<u16>>, u32, u32>(inst, decoder, op);
    if (name == "min" && is_signed) return bind_map<u32, pair<smaller_s16>, u32, u32>(inst, decoder, op);
    if (name == "max" && is_signed) return bind_map<u32, pair<larger_s16>, u32, u32>(inst, decoder, op);
    if (name == "min") return bind_map<u32, pair<smaller<u16>>, u32, u32>(inst, decoder, op);
    if (name == "max") return bind_map<u32, pair<larger<u16>>, u32, u32>(inst, decoder, op);
  }
  return false;
}

}  // namespace sim
