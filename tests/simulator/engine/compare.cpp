// PTX ISA 9.7.6 "Comparison and Selection Instructions", 9.7.7 "Half Precision Comparison Instructions".
#include <cmath>

#include "alu.h"
#include "half_type.h"

namespace sim {

namespace {

enum class Compare : u8 { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

constexpr const char* kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                  "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <Compare kCompare, class T>
bool compare(T a, T b) {
  bool unordered = a != a || b != b;
  switch (kCompare) {
    case Compare::kEq:
      return a == b;
    case Compare::kNe:
      return a != b && !unordered;
    case Compare::kLt:
      return a < b;
    case Compare::kLe:
      return a <= b;
    case Compare::kGt:
      return a > b;
    case Compare::kGe:
      return a >= b;
    case Compare::kEqu:
      return a == b || unordered;
    case Compare::kNeu:
      return a != b;
    case Compare::kLtu:
      return !(a >= b);
    case Compare::kLeu:
      return !(a > b);
    case Compare::kGtu:
      return !(a <= b);
    case Compare::kGeu:
      return !(a < b);
    case Compare::kNum:
      return !unordered;
    case Compare::kNan:
      return unordered;
  }
  return false;
}

// How lanes become values to compare: integers as they are, floats flushed or widened.
template <class T, bool kFtz = false>
struct Plain {
  using Value = T;
  using Store = typename Lane<T>::Store;
  static T get(Store bits) {
    if constexpr (kFtz) {
      if (!(bits & 0x7f800000)) bits &= 0x80000000;
    }
    return Lane<T>::get(bits);
  }
};
template <class H, int kShift>
struct Packed {
  using Value = float;
  using Store = u32;
  static float get(u32 bits) { return static_cast<float>(H::widen(static_cast<u16>(bits >> kShift))); }
};

template <Compare kCompare, class Source>
u32 lanes_of(Warp& warp, const Op& op) {
  const auto* a = warp.reg<typename Source::Store>(op.a);
  const auto* b = warp.reg<typename Source::Store>(op.b);
  u8 results[kLanes];
  for (int i = 0; i < kLanes; i++) results[i] = compare<kCompare>(Source::get(a[i]), Source::get(b[i]));
  u32 lanes = 0;
  for (u32 i = 0; i < kLanes; i++) lanes |= static_cast<u32>(results[i]) << i;
  return lanes;
}

template <class Source>
u32 (*choose(Compare kind))(Warp&, const Op&) {
  switch (kind) {
    case Compare::kEq:
      return lanes_of<Compare::kEq, Source>;
    case Compare::kNe:
      return lanes_of<Compare::kNe, Source>;
    case Compare::kLt:
      return lanes_of<Compare::kLt, Source>;
    case Compare::kLe:
      return lanes_of<Compare::kLe, Source>;
    case Compare::kGt:
      return lanes_of<Compare::kGt, Source>;
    case Compare::kGe:
      return lanes_of<Compare::kGe, Source>;
    default:
      break;
  }
  if constexpr (std::is_floating_point_v<typename Source::Value>) {
    switch (kind) {
      case Compare::kEqu:
        return lanes_of<Compare::kEqu, Source>;
      case Compare::kNeu:
        return lanes_of<Compare::kNeu, Source>;
      case Compare::kLtu:
        return lanes_of<Compare::kLtu, Source>;
      case Compare::kLeu:
        return lanes_of<Compare::kLeu, Source>;
      case Compare::kGtu:
        return lanes_of<Compare::kGtu, Source>;
      case Compare::kGeu:
        return lanes_of<Compare::kGeu, Source>;
      case Compare::kNum:
        return lanes_of<Compare::kNum, Source>;
      case Compare::kNan:
        return lanes_of<Compare::kNan, Source>;
      default:
        break;
    }
  }
  return nullptr;
}

using Lanes = u32 (*)(Warp&, const Op&);

Lanes find_compare(const std::string& type, Compare kind, bool ftz, int half) {
  if (type == "f32") return ftz ? choose<Plain<float, true>>(kind) : choose<Plain<float>>(kind);
  if (type == "f64") return choose<Plain<double>>(kind);
  if (type == "f16" || (type == "f16x2" && half == 0)) return choose<Packed<Half, 0>>(kind);
  if (type == "f16x2") return choose<Packed<Half, 16>>(kind);
  if (type == "bf16" || (type == "bf16x2" && half == 0)) return choose<Packed<Bfloat, 0>>(kind);
  if (type == "bf16x2") return choose<Packed<Bfloat, 16>>(kind);
  if (type == "u16" || type == "b16") return choose<Plain<u16>>(kind);
  if (type == "s16") return choose<Plain<i16>>(kind);
  if (type == "u32" || type == "b32") return choose<Plain<u32>>(kind);
  if (type == "s32") return choose<Plain<i32>>(kind);
  if (type == "u64" || type == "b64") return choose<Plain<u64>>(kind);
  if (type == "s64") return choose<Plain<i64>>(kind);
  return nullptr;
}

// lo, ls, hi, hs are the unsigned spellings.
bool parse_compare(const Inst& inst, Compare& kind) {
  for (size_t k = 1; k < inst.parts.size(); k++) {
    const std::string& part = inst.parts[k];
    for (int i = 0; i < 14; i++) {
      if (part == kNames[i]) return kind = static_cast<Compare>(i), true;
    }
    if (part == "lo") return kind = Compare::kLt, true;
    if (part == "ls") return kind = Compare::kLe, true;
    if (part == "hi") return kind = Compare::kGt, true;
    if (part == "hs") return kind = Compare::kGe, true;
  }
  return false;
}

int type_bytes(const std::string& type) { return type.ends_with("64") ? 8 : 4; }

u32 known_pred(Warp& warp, u32 index) {
  u32 unknown = warp.exec & ~warp.pred_init[index];
  if (unknown) fail("uninitialised", "predicate was never written", first_lane(unknown));
  return warp.preds[index];
}

// aux: 0 none, 1 and, 2 or, 3 xor with predicate c; e: the second result.
u32 combine(Warp& warp, const Op& op, u32 lanes) {
  if (!op.aux) return lanes;
  u32 other = known_pred(warp, op.c);
  if (op.negate_a) other = ~other;
  return op.aux == 1 ? lanes & other : op.aux == 2 ? lanes | other : lanes ^ other;
}

Step setp(Warp& warp, const Op& op) {
  u32 lanes = bits_as<Lanes>(op.imm)(warp, op);
  u32 first = combine(warp, op, lanes), second = op.aux2 & 1 ? combine(warp, op, ~lanes) : 0;
  warp.set_pred(op.d, first);
  if (op.aux2 & 1) warp.set_pred(op.e, second);
  // A result of undefined values is undefined: nobody may branch on it.
  u32 defined = warp.init[op.a] & warp.init[op.b];
  warp.pred_init[op.d] &= defined | ~warp.exec;
  return Step::kNext;
}

// setp.f16x2 p|q: a predicate for each half.
Step setp_pair(Warp& warp, const Op& op) {
  u32 low = combine(warp, op, bits_as<Lanes>(op.imm)(warp, op));
  u32 high = combine(warp, op, bits_as<Lanes>(u64{op.list[0]} | u64{op.list[1]} << 32)(warp, op));
  warp.set_pred(op.d, low);
  warp.set_pred(op.e, high);
  return Step::kNext;
}

// set: all ones (integers), 1.0 (floats); aux2 >> 8 is the value, for 16-bit pairs both halves.
Step set(Warp& warp, const Op& op) {
  u32 lanes = combine(warp, op, bits_as<Lanes>(op.imm)(warp, op));
  u32 high = op.list.empty()
                 ? 0
                 : combine(warp, op, bits_as<Lanes>(u64{op.list[0]} | u64{op.list[1]} << 32)(warp, op));
  u32 result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    result[i] = lanes >> i & 1 ? op.aux2 : 0;
    if (!op.list.empty()) result[i] |= high >> i & 1 ? op.aux2 << 16 : 0;
  }
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

template <class Store>
Step selp(Warp& warp, const Op& op) {
  u32 choice = known_pred(warp, op.c);
  const Store *a = warp.reg<Store>(op.a), *b = warp.reg<Store>(op.b);
  Store result[kLanes];
  for (int i = 0; i < kLanes; i++) result[i] = choice >> i & 1 ? a[i] : b[i];
  inherit(warp, op.d, (warp.init[op.a] & choice) | (warp.init[op.b] & ~choice));
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

template <class Store, class Control>
Step slct(Warp& warp, const Op& op) {
  const Store *a = warp.reg<Store>(op.a), *b = warp.reg<Store>(op.b);
  Store result[kLanes];
  for (int i = 0; i < kLanes; i++) result[i] = Lane<Control>::get(warp.reg<u32>(op.c)[i]) >= 0 ? a[i] : b[i];
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b] & warp.init[op.c]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

void bind_combine(const Inst& inst, Decoder& decoder, Op& op, size_t index) {
  if (inst.args.size() <= index) return;
  op.aux = inst.has("and") ? 1 : inst.has("or") ? 2 : 3;
  op.c = decoder.pred(inst.args[index]);
  op.negate_a = inst.args[index].negated;
}

}  // namespace

bool decode_compare(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  const std::string& type = inst.type();
  if (name == "selp") {
    int bytes = type_bytes(type);
    op.d = decoder.def(inst.args.at(0));
    op.a = decoder.use_f(inst.args.at(1), bytes);
    op.b = decoder.use_f(inst.args.at(2), bytes);
    op.c = decoder.pred(inst.args.at(3));
    op.fn = bytes == 8 ? selp<u64> : selp<u32>;
    return true;
  }
  if (name == "slct") {
    int bytes = type_bytes(inst.parts[inst.parts.size() - 2]);
    op.d = decoder.def(inst.args.at(0));
    op.a = decoder.use_f(inst.args.at(1), bytes);
    op.b = decoder.use_f(inst.args.at(2), bytes);
    op.c = decoder.use_f(inst.args.at(3), 4);
    if (type == "f32") {
      op.fn = bytes == 8 ? slct<u64, float> : slct<u32, float>;
    } else {
      op.fn = bytes == 8 ? slct<u64, i32> : slct<u32, i32>;
    }
    return true;
  }
  Compare kind;
  if ((name != "setp" && name != "set") || !parse_compare(inst, kind)) return false;
  bool pair = type.ends_with("x2"), ftz = inst.has("ftz");
  Lanes lanes = find_compare(type, kind, ftz, 0);
  if (!lanes) return false;
  op.imm = bits_as<u64>(lanes);
  if (pair) {
    u64 high = bits_as<u64>(find_compare(type, kind, ftz, 1));
    op.list = {static_cast<u32>(high), static_cast<u32>(high >> 32)};
  }
  size_t next = 1;
  bool boolean = inst.has("and") || inst.has("or") || inst.has("xor");
  if (name == "setp") {
    op.d = decoder.pred_def(inst.args.at(0));
    if (inst.args.size() == 4u + boolean) {
      op.e = decoder.pred_def(inst.args[1]);
      op.aux2 = 1;
      next = 2;
    }
    if (pair && next == 1) op.e = decoder.sink_pred();
    op.fn = pair ? setp_pair : setp;
  } else {
    const std::string& to = inst.parts[inst.parts.size() - 2];
    op.d = decoder.def(inst.args.at(0));
    op.aux2 = to == "f32"                  ? 0x3f800000
              : to.starts_with("f16")      ? 0x3c00
              : to.starts_with("bf16")     ? 0x3f80
              : to.ends_with("16") || pair ? 0xffff
                                           : kNone;
    op.fn = set;
  }
  int bytes = type_bytes(type);
  op.a = decoder.use_f(inst.args.at(next), bytes);
  op.b = decoder.use_f(inst.args.at(next + 1), bytes);
  bind_combine(inst, decoder, op, next + 2);
  return true;
}

}  // namespace sim
