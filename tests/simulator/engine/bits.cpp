// PTX ISA 9.7.8 "Logic and Shift Instructions" and the bit fields of 9.7.1.
#include "alu.h"

namespace sim {

namespace {

template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return static_cast<T>(~a);
}
template <class T>
T logical_not(T a) {
  return a == 0;
}
template <class T>
T shift_left(T a, u32 b) {
  return b >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << b);
}
template <class T>
T shift_right(T a, u32 b) {
  u32 bits = 8 * sizeof(T);
  if (b >= bits) return std::is_signed_v<T> ? static_cast<T>(a >> (bits - 1)) : T{0};
  return static_cast<T>(a >> b);
}
template <bool kLeft, bool kWrap>
u32 funnel(u32 a, u32 b, u32 c) {
  u32 n = kWrap ? c & 31 : std::min(c, 32u);
  u64 both = u64{b} << 32 | a;
  return static_cast<u32>(kLeft ? (both << n) >> 32 : both >> n);
}
template <class T>
u32 population(T a) {
  return static_cast<u32>(__builtin_popcountll(a));
}
template <class T>
u32 leading_zeros(T a) {
  return a == 0 ? 8 * sizeof(T) : static_cast<u32>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
template <class T>
T reverse(T a) {
  T result = 0;
  for (u32 i = 0; i < 8 * sizeof(T); i++) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
template <class T>
u32 find_bit(T a) {
  std::make_unsigned_t<T> bits = static_cast<std::make_unsigned_t<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
  return bits ? static_cast<u32>(63 - __builtin_clzll(bits)) : kNone;
}
template <class T>
u32 find_bit_shift(T a) {
  u32 bit = find_bit(a);
  return bit == kNone ? kNone : static_cast<u32>(8 * sizeof(T) - 1) - bit;
}
template <class T>
T extract(T a, u32 b, u32 c) {
  u32 position = b & 0xff, length = c & 0xff, top = 8 * sizeof(T) - 1;
  using U = std::make_unsigned_t<T>;
  bool sign =
      std::is_signed_v<T> && length && (static_cast<U>(a) >> std::min(position + length - 1, top) & 1);
  U result = 0;
  for (u32 i = 0; i <= top; i++) {
    bool bit = i < length && position + i <= top ? static_cast<U>(a) >> (position + i) & 1 : sign;
    result |= static_cast<U>(bit) << i;
  }
  return static_cast<T>(result);
}
template <class T>
T insert(T a, T b, u32 c, u32 d) {
  u32 position = c & 0xff, length = d & 0xff;
  for (u32 i = 0; i < length && position + i < 8 * sizeof(T); i++) {
    T bit = T{1} << (position + i);
    b = (b & ~bit) | ((a >> i & 1) ? bit : 0);
  }
  return b;
}
template <bool kWrap>
u32 bit_mask(u32 a, u32 b) {
  if (kWrap) a &= 31, b &= 31;
  if (a >= 32 || b == 0) return 0;
  return static_cast<u32>(((u64{1} << std::min(b, 32u)) - 1) << a);
}
template <class T, bool kWrap>
T sign_extend(T a, u32 b) {
  u32 n = kWrap ? b & 31 : std::min(b, 32u);
  if (n == 0) return 0;
  u32 shifted = static_cast<u32>(a) << (32 - n);
  return std::is_signed_v<T> ? static_cast<T>(static_cast<i32>(shifted) >> (32 - n))
                             : static_cast<T>(shifted >> (32 - n));
}
// The n-th set bit from `base`, upwards for positive n, downwards for negative, base itself for 0.
u32 find_nth(u32 mask, u32 base, i32 offset) {
  if (offset == 0) return base < 32 && (mask >> base & 1) ? base : kNone;
  i32 step = offset > 0 ? 1 : -1, left = std::abs(offset);
  for (i32 i = static_cast<i32>(base); i >= 0 && i < 32; i += step) {
    if ((mask >> i & 1) && --left == 0) return static_cast<u32>(i);
  }
  return kNone;
}
u32 byte_of(u32 a, u32 b, u32 selector) {
  u64 both = u64{b} << 32 | a;
  u32 byte = static_cast<u32>(both >> 8 * (selector & 7)) & 0xff;
  return selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
}
u32 permute(u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (u32 i = 0; i < 4; i++) result |= byte_of(a, b, c >> 4 * i & 15) << 8 * i;
  return result;
}
template <int kMode>
u32 permute_mode(u32 a, u32 b, u32 c) {
  u32 n = c & 3, result = 0;
  for (u32 i = 0; i < 4; i++) {
    u32 from = 0;
    if (kMode == 0) from = i + n;                  // f4e
    if (kMode == 1) from = (n + 8 - i) & 7;        // b4e
    if (kMode == 2) from = n;                      // rc8
    if (kMode == 3) from = std::max(i, n);         // ecl
    if (kMode == 4) from = std::min(i, n);         // ecr
    if (kMode == 5) from = (n & 1) * 2 + (i & 1);  // rc16
    result |= byte_of(a, b, from) << 8 * i;
  }
  return result;
}

Step lop3(Warp& warp, const Op& op) {
  const u32 *a = warp.reg<u32>(op.a), *b = warp.reg<u32>(op.b), *c = warp.reg<u32>(op.c);
  u32 result[kLanes] = {};
  for (u32 term = 0; term < 8; term++) {
    if (!(op.imm >> term & 1)) continue;
    u32 na = term & 4 ? 0 : kAllLanes, nb = term & 2 ? 0 : kAllLanes, nc = term & 1 ? 0 : kAllLanes;
    for (int i = 0; i < kLanes; i++) result[i] |= (a[i] ^ na) & (b[i] ^ nb) & (c[i] ^ nc);
  }
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b] & warp.init[op.c]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

u32 pred_value(Warp& warp, u32 index) {
  u32 unknown = warp.exec & ~warp.pred_init[index];
  if (unknown) fail("uninitialised", "predicate was never written", first_lane(unknown));
  return warp.preds[index];
}

template <int kKind>
Step pred_logic(Warp& warp, const Op& op) {
  u32 a = pred_value(warp, op.a), b = kKind == 3 ? 0 : pred_value(warp, op.b);
  warp.set_pred(op.d, kKind == 0 ? a & b : kKind == 1 ? a | b : kKind == 2 ? a ^ b : ~a);
  return Step::kNext;
}

bool decode_pred(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  op.d = decoder.pred_def(inst.args.at(0));
  op.a = decoder.pred(inst.args.at(1));
  if (name != "not") op.b = decoder.pred(inst.args.at(2));
  op.fn = name == "and"   ? pred_logic<0>
          : name == "or"  ? pred_logic<1>
          : name == "xor" ? pred_logic<2>
                          : pred_logic<3>;
  return true;
}

template <class T>
bool decode_logic(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "and") return bind_map<T, bit_and<T>, T, T>(inst, decoder, op);
  if (name == "or") return bind_map<T, bit_or<T>, T, T>(inst, decoder, op);
  if (name == "xor") return bind_map<T, bit_xor<T>, T, T>(inst, decoder, op);
  if (name == "not") return bind_map<T, bit_not<T>, T>(inst, decoder, op);
  if (name == "cnot") return bind_map<T, logical_not<T>, T>(inst, decoder, op);
  if (name == "shl") return bind_map<T, shift_left<T>, T, u32>(inst, decoder, op);
  if (name == "shr" && inst.type()[0] == 's') {
    using S = std::make_signed_t<T>;
    return bind_map<S, shift_right<S>, S, u32>(inst, decoder, op);
  }
  if (name == "shr") return bind_map<T, shift_right<T>, T, u32>(inst, decoder, op);
  return false;
}

template <class T>
bool decode_field(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  using U = std::make_unsigned_t<T>;
  if (name == "bfe") return bind_map<T, extract<T>, T, u32, u32>(inst, decoder, op);
  if (name == "bfi") return bind_map<U, insert<U>, U, U, u32, u32>(inst, decoder, op);
  if (name == "popc") return bind_map<u32, population<U>, U>(inst, decoder, op);
  if (name == "clz") return bind_map<u32, leading_zeros<U>, U>(inst, decoder, op);
  if (name == "brev") return bind_map<U, reverse<U>, U>(inst, decoder, op);
  if (name == "bfind") {
    return inst.has("shiftamt") ? bind_map<u32, find_bit_shift<T>, T>(inst, decoder, op)
                                : bind_map<u32, find_bit<T>, T>(inst, decoder, op);
  }
  return false;
}

bool decode_permute(const Inst& inst, Decoder& decoder, Op& op) {
  if (inst.parts.size() == 2) return bind_map<u32, permute, u32, u32, u32>(inst, decoder, op);
  const std::string& mode = inst.parts[2];
  if (mode == "f4e") return bind_map<u32, permute_mode<0>, u32, u32, u32>(inst, decoder, op);
  if (mode == "b4e") return bind_map<u32, permute_mode<1>, u32, u32, u32>(inst, decoder, op);
  if (mode == "rc8") return bind_map<u32, permute_mode<2>, u32, u32, u32>(inst, decoder, op);
  if (mode == "ecl") return bind_map<u32, permute_mode<3>, u32, u32, u32>(inst, decoder, op);
  if (mode == "ecr") return bind_map<u32, permute_mode<4>, u32, u32, u32>(inst, decoder, op);
  if (mode == "rc16") return bind_map<u32, permute_mode<5>, u32, u32, u32>(inst, decoder, op);
  return false;
}

}  // namespace

bool decode_bits(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string &name = inst.parts[0], &type = inst.type();
  if (name == "and" || name == "or" || name == "xor" || name == "not" || name == "cnot" || name == "shl" ||
      name == "shr") {
    if (type == "pred") return decode_pred(inst, decoder, op);
    if (type.ends_with("16")) return decode_logic<u16>(inst, decoder, op);
    if (type.ends_with("32")) return decode_logic<u32>(inst, decoder, op);
    if (type.ends_with("64")) return decode_logic<u64>(inst, decoder, op);
  } else if (name == "shf") {
    bool wrap = inst.has("wrap");
    if (inst.has("l")) {
      return wrap ? bind_map<u32, funnel<true, true>, u32, u32, u32>(inst, decoder, op)
                  : bind_map<u32, funnel<true, false>, u32, u32, u32>(inst, decoder, op);
    }
    return wrap ? bind_map<u32, funnel<false, true>, u32, u32, u32>(inst, decoder, op)
                : bind_map<u32, funnel<false, false>, u32, u32, u32>(inst, decoder, op);
  } else if (name == "prmt") {
    return decode_permute(inst, decoder, op);
  } else if (name == "lop3" && type == "b32" && inst.args.size() == 5) {
    op.d = decoder.def(inst.args[0]);
    op.a = decoder.use(inst.args[1], 4);
    op.b = decoder.use(inst.args[2], 4);
    op.c = decoder.use(inst.args[3], 4);
    op.imm = inst.args[4].value;
    op.fn = lop3;
    return true;
  } else if (name == "fns") {
    return bind_map<u32, find_nth, u32, u32, i32>(inst, decoder, op);
  } else if (name == "bmsk") {
    return inst.has("wrap") ? bind_map<u32, bit_mask<true>, u32, u32>(inst, decoder, op)
                            : bind_map<u32, bit_mask<false>, u32, u32>(inst, decoder, op);
  } else if (name == "szext") {
    bool wrap = inst.has("wrap");
    if (type == "s32") {
      return wrap ? bind_map<i32, sign_extend<i32, true>, i32, u32>(inst, decoder, op)
                  : bind_map<i32, sign_extend<i32, false>, i32, u32>(inst, decoder, op);
    }
    return wrap ? bind_map<u32, sign_extend<u32, true>, u32, u32>(inst, decoder, op)
                : bind_map<u32, sign_extend<u32, false>, u32, u32>(inst, decoder, op);
  } else if (name == "bfe" || name == "bfi" || name == "popc" || name == "clz" || name == "brev" ||
             name == "bfind") {
    if (type == "s32") return decode_field<i32>(inst, decoder, op);
    if (type == "s64") return decode_field<i64>(inst, decoder, op);
    if (type.ends_with("32")) return decode_field<u32>(inst, decoder, op);
    if (type.ends_with("64")) return decode_field<u64>(inst, decoder, op);
  }
  return false;
}

}  // namespace sim
