// PTX ISA 9.7.4 "Half Precision Floating Point Instructions": f16, f16x2, bf16, bf16x2.
#include "alu.h"
#include "half_type.h"

namespace sim {

namespace {

// Products of two 8- or 11-bit significands and their sums are exact in double, or rounded to odd: one
// rounding in all.
template <class H, bool kSat, bool kRelu, bool kFtz>
u16 finish(double value) {
  u16 bits = H::narrow_to(value);
  u16 magnitude = bits & 0x7fff;
  if (magnitude > H::kInfinity) return kSat ? 0 : 0x7fff;
  if (kFtz && magnitude < 0x400) bits &= 0x8000;
  if (kRelu && (bits & 0x8000)) return 0;
  if (kSat) return bits & 0x8000 ? 0 : std::min(bits, H::kOne);
  return bits;
}

template <class H, bool kFtz>
double operand(u16 bits) {
  if (kFtz && (bits & 0x7fff) < 0x400) bits &= 0x8000;
  return H::widen(bits);
}

template <class H, bool kSat, bool kRelu, bool kFtz>
struct Maths {
  static double in(u16 bits) { return operand<H, kFtz>(bits); }
  static u16 out(double value) { return finish<H, kSat, kRelu, kFtz>(value); }
  static u16 add(u16 a, u16 b) { return out(add_to_odd(in(a), in(b))); }
  static u16 sub(u16 a, u16 b) { return out(add_to_odd(in(a), -in(b))); }
  static u16 mul(u16 a, u16 b) { return out(in(a) * in(b)); }
  static u16 fma(u16 a, u16 b, u16 c) { return out(add_to_odd(in(a) * in(b), in(c))); }
};

template <class H, bool kMax, bool kNan>
u16 extreme(u16 a, u16 b) {
  bool a_nan = (a & 0x7fff) > H::kInfinity, b_nan = (b & 0x7fff) > H::kInfinity;
  if (a_nan || b_nan) {
    if (kNan || (a_nan && b_nan)) return 0x7fff;
    return a_nan ? b : a;
  }
  auto key = [](u16 bits) { return bits & 0x8000 ? -1 - (bits & 0x7fff) : int{bits}; };  // -0 before +0
  return (key(a) < key(b)) != kMax ? a : b;
}
template <class H>
u16 negate(u16 a) {
  return (a & 0x7fff) > H::kInfinity ? 0x7fff : a ^ 0x8000;
}
template <class H>
u16 absolute(u16 a) {
  return (a & 0x7fff) > H::kInfinity ? 0x7fff : a & 0x7fff;
}
template <class H>
u16 ex2(u16 a) {
  return finish<H, false, false, false>(std::exp2(H::widen(a)));
}
template <class H>
u16 tanh(u16 a) {
  return finish<H, false, false, false>(std::tanh(H::widen(a)));
}

template <auto kFunction, class... A>
u32 pairwise(A... values) {
  u32 low = kFunction(static_cast<u16>(values)...);
  return low | static_cast<u32>(kFunction(static_cast<u16>(values >> 16)...)) << 16;
}

template <auto kFunction>
bool bind1(const Inst& inst, Decoder& decoder, Op& op, bool two) {
  return two ? bind_map<u32, pairwise<kFunction, u32>, u32>(inst, decoder, op)
             : bind_map<u16, kFunction, u16>(inst, decoder, op);
}
template <auto kFunction>
bool bind2(const Inst& inst, Decoder& decoder, Op& op, bool two) {
  return two ? bind_map<u32, pairwise<kFunction, u32, u32>, u32, u32>(inst, decoder, op)
             : bind_map<u16, kFunction, u16, u16>(inst, decoder, op);
}
template <auto kFunction>
bool bind3(const Inst& inst, Decoder& decoder, Op& op, bool two) {
  return two ? bind_map<u32, pairwise<kFunction, u32, u32, u32>, u32, u32, u32>(inst, decoder, op)
             : bind_map<u16, kFunction, u16, u16, u16>(inst, decoder, op);
}

template <class H, bool kSat, bool kRelu, bool kFtz>
bool decode_maths(const Inst& inst, Decoder& decoder, Op& op, bool two) {
  using M = Maths<H, kSat, kRelu, kFtz>;
  const std::string& name = inst.parts[0];
  if (name == "add") return bind2<M::add>(inst, decoder, op, two);
  if (name == "sub") return bind2<M::sub>(inst, decoder, op, two);
  if (name == "mul") return bind2<M::mul>(inst, decoder, op, two);
  if (name == "fma") return bind3<M::fma>(inst, decoder, op, two);
  return false;
}

template <class H>
bool decode_type(const Inst& inst, Decoder& decoder, Op& op, bool two) {
  const std::string& name = inst.parts[0];
  if (name == "neg") return bind1<negate<H>>(inst, decoder, op, two);
  if (name == "abs") return bind1<absolute<H>>(inst, decoder, op, two);
  if (name == "ex2") return bind1<ex2<H>>(inst, decoder, op, two);
  if (name == "tanh") return bind1<tanh<H>>(inst, decoder, op, two);
  if (name == "min" || name == "max") {
    bool nan = inst.has("NaN");
    if (inst.has("xorsign") || inst.has("ftz")) return false;
    if (name == "max") {
      return nan ? bind2<extreme<H, true, true>>(inst, decoder, op, two)
                 : bind2<extreme<H, true, false>>(inst, decoder, op, two);
    }
    return nan ? bind2<extreme<H, false, true>>(inst, decoder, op, two)
               : bind2<extreme<H, false, false>>(inst, decoder, op, two);
  }
  if (inst.has("sat")) {
    return inst.has("ftz") ? decode_maths<H, true, false, true>(inst, decoder, op, two)
                           : decode_maths<H, true, false, false>(inst, decoder, op, two);
  }
  if (inst.has("relu")) return decode_maths<H, false, true, false>(inst, decoder, op, two);
  return inst.has("ftz") ? decode_maths<H, false, false, true>(inst, decoder, op, two)
                         : decode_maths<H, false, false, false>(inst, decoder, op, two);
}

}  // namespace

bool decode_half(const Inst& inst, Decoder& decoder, Op& op) {
  static const char* names[] = {"add", "sub", "mul", "fma", "neg", "abs", "min", "max", "ex2", "tanh"};
  if (std::find(std::begin(names), std::end(names), inst.parts[0]) == std::end(names)) return false;
  const std::string& type = inst.type();
  if (type == "f16" || type == "f16x2") return decode_type<Half>(inst, decoder, op, type == "f16x2");
  if (type == "bf16" || type == "bf16x2") return decode_type<Bfloat>(inst, decoder, op, type == "bf16x2");
  return false;
}

}  // namespace sim
