// PTX ISA 9.7.3 "Floating Point Instructions", single and double precision. The host rounds to nearest even;
// other modes are set for the few instructions that ask for them (this file is compiled with
// -frounding-math).
#include <cfenv>
#include <cmath>

#include "alu.h"

namespace sim {

namespace {

template <class T>
T canonical_nan() {
  if constexpr (sizeof(T) == 4) return bits_as<float>(0x7fffffffu);
  return bits_as<T>(static_cast<std::conditional_t<sizeof(T) == 8, u64, u32>>(
      sizeof(T) == 8 ? 0x7ff8000000000000u : 0x7fffffffu));
}

template <bool kFlush, class T>
T flush(T value) {
  if constexpr (kFlush && sizeof(T) == 4) {
    u32 bits = bits_as<u32>(value);
    return bits & 0x7f800000 ? value : bits_as<T>(bits & 0x80000000);
  }
  return value;
}

template <bool kFtz, bool kSat, class T>
T finish(T value) {
  if (value != value) return kSat ? T{0} : canonical_nan<T>();
  value = flush<kFtz>(value);
  if (kSat) value = value > T{0} ? std::min(value, T{1}) : T{0};
  return value;
}

template <class T, bool kFtz, bool kSat>
struct Arithmetic {
  static T add(T a, T b) { return finish<kFtz, kSat>(flush<kFtz>(a) + flush<kFtz>(b)); }
  static T sub(T a, T b) { return finish<kFtz, kSat>(flush<kFtz>(a) - flush<kFtz>(b)); }
  static T mul(T a, T b) { return finish<kFtz, kSat>(flush<kFtz>(a) * flush<kFtz>(b)); }
  static T fma(T a, T b, T c) {
    if constexpr (sizeof(T) == 4) {
      return finish<kFtz, kSat>(__builtin_fmaf(flush<kFtz>(a), flush<kFtz>(b), flush<kFtz>(c)));
    } else {
      return finish<kFtz, kSat>(__builtin_fma(a, b, c));
    }
  }
  static T div(T a, T b) { return finish<kFtz, kSat>(flush<kFtz>(a) / flush<kFtz>(b)); }
  static T reciprocal(T a) { return finish<kFtz, kSat>(T{1} / flush<kFtz>(a)); }
  static T root(T a) { return finish<kFtz, kSat>(std::sqrt(flush<kFtz>(a))); }
};

// Approximations: the exact value rounded, which lies within every documented error.
template <bool kFtz>
struct Approximate {
  static float apply(double (*function)(double), float a) {
    return finish<kFtz, false>(static_cast<float>(function(flush<kFtz>(a))));
  }
  static float ex2(float a) {
    return apply([](double x) { return std::exp2(x); }, a);
  }
  static float lg2(float a) {
    return apply([](double x) { return std::log2(x); }, a);
  }
  static float rsqrt(float a) {
    return apply([](double x) { return 1 / std::sqrt(x); }, a);
  }
  static float sin(float a) {
    return apply([](double x) { return std::sin(x); }, a);
  }
  static float cos(float a) {
    return apply([](double x) { return std::cos(x); }, a);
  }
  static float tanh(float a) {
    return apply([](double x) { return std::tanh(x); }, a);
  }
};
double rsqrt64(double a) { return finish<false, false>(1 / std::sqrt(a)); }

// min and max: a NaN operand loses, unless .NaN is given; -0 is less than +0.
template <class T, bool kFtz, bool kNan, bool kMax>
T extreme(T a, T b) {
  a = flush<kFtz>(a);
  b = flush<kFtz>(b);
  if (a != a || b != b) {
    if (kNan || (a != a && b != b)) return canonical_nan<T>();
    return a != a ? b : a;
  }
  if (a == b) return std::signbit(a) == kMax ? b : a;
  return (a < b) != kMax ? a : b;
}
template <class T, bool kFtz, bool kNan, bool kMax>
T extreme3(T a, T b, T c) {
  return extreme<T, kFtz, kNan, kMax>(extreme<T, kFtz, kNan, kMax>(a, b), c);
}
template <class T, bool kMax>
T xor_sign(T a, T b) {
  T result = extreme<T, false, false, kMax>(std::fabs(a), std::fabs(b));
  return std::signbit(a) != std::signbit(b) ? -result : result;
}
template <class T, bool kFtz>
T negate(T a) {
  a = flush<kFtz>(a);
  return -a;
}
template <class T, bool kFtz>
T absolute(T a) {
  return std::fabs(flush<kFtz>(a));
}
template <class T>
T copy_sign(T a, T b) {
  return std::copysign(b, a);
}

template <Fn kInner, int kMode>
Step rounded(Warp& warp, const Op& op) {
  std::fesetround(kMode);
  Step step = kInner(warp, op);
  std::fesetround(FE_TONEAREST);
  return step;
}

// The same instruction in another rounding mode: the mode is set around the lanes' loop.
template <class D, auto kFunction, class... A>
bool bind_rounded(const Inst& inst, Decoder& decoder, Op& op) {
  bind_map<D, kFunction, A...>(inst, decoder, op);
  constexpr Fn inner = Map<D, kFunction, A...>::run;
  if (inst.has("rz")) op.fn = rounded<inner, FE_TOWARDZERO>;
  if (inst.has("rm")) op.fn = rounded<inner, FE_DOWNWARD>;
  if (inst.has("rp")) op.fn = rounded<inner, FE_UPWARD>;
  return true;
}

template <class T, bool kFtz, bool kSat>
bool decode_arithmetic(const Inst& inst, Decoder& decoder, Op& op) {
  using Maths = Arithmetic<T, kFtz, kSat>;
  const std::string& name = inst.parts[0];
  if (name == "add") return bind_rounded<T, Maths::add, T, T>(inst, decoder, op);
  if (name == "sub") return bind_rounded<T, Maths::sub, T, T>(inst, decoder, op);
  if (name == "mul") return bind_rounded<T, Maths::mul, T, T>(inst, decoder, op);
  if (name == "fma" || name == "mad") return bind_rounded<T, Maths::fma, T, T, T>(inst, decoder, op);
  if (name == "div") return bind_rounded<T, Maths::div, T, T>(inst, decoder, op);
  if (name == "rcp") return bind_rounded<T, Maths::reciprocal, T>(inst, decoder, op);
  if (name == "sqrt") return bind_rounded<T, Maths::root, T>(inst, decoder, op);
  return false;
}

template <class T, bool kFtz, bool kNan>
bool decode_extreme(const Inst& inst, Decoder& decoder, Op& op) {
  bool max = inst.parts[0] == "max";
  if (inst.has("xorsign")) {
    return max ? bind_map<T, xor_sign<T, true>, T, T>(inst, decoder, op)
               : bind_map<T, xor_sign<T, false>, T, T>(inst, decoder, op);
  }
  if (inst.args.size() == 4) {
    return max ? bind_map<T, extreme3<T, kFtz, kNan, true>, T, T, T>(inst, decoder, op)
               : bind_map<T, extreme3<T, kFtz, kNan, false>, T, T, T>(inst, decoder, op);
  }
  return max ? bind_map<T, extreme<T, kFtz, kNan, true>, T, T>(inst, decoder, op)
             : bind_map<T, extreme<T, kFtz, kNan, false>, T, T>(inst, decoder, op);
}

template <bool kFtz>
bool decode_single(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  using Rough = Approximate<kFtz>;
  if (name == "ex2") return bind_map<float, Rough::ex2, float>(inst, decoder, op);
  if (name == "lg2") return bind_map<float, Rough::lg2, float>(inst, decoder, op);
  if (name == "rsqrt") return bind_map<float, Rough::rsqrt, float>(inst, decoder, op);
  if (name == "sin") return bind_map<float, Rough::sin, float>(inst, decoder, op);
  if (name == "cos") return bind_map<float, Rough::cos, float>(inst, decoder, op);
  if (name == "tanh") return bind_map<float, Rough::tanh, float>(inst, decoder, op);
  if (name == "neg") return bind_map<float, negate<float, kFtz>, float>(inst, decoder, op);
  if (name == "abs") return bind_map<float, absolute<float, kFtz>, float>(inst, decoder, op);
  if (name == "copysign") return bind_map<float, copy_sign<float>, float, float>(inst, decoder, op);
  if (name == "min" || name == "max") {
    return inst.has("NaN") ? decode_extreme<float, kFtz, true>(inst, decoder, op)
                           : decode_extreme<float, kFtz, false>(inst, decoder, op);
  }
  return inst.has("sat") ? decode_arithmetic<float, kFtz, true>(inst, decoder, op)
                         : decode_arithmetic<float, kFtz, false>(inst, decoder, op);
}

bool decode_double(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "neg") return bind_map<double, negate<double, false>, double>(inst, decoder, op);
  if (name == "abs") return bind_map<double, absolute<double, false>, double>(inst, decoder, op);
  if (name == "copysign") return bind_map<double, copy_sign<double>, double, double>(inst, decoder, op);
  if (name == "rsqrt") return bind_map<double, rsqrt64, double>(inst, decoder, op);
  if (name == "min" || name == "max") return decode_extreme<double, false, false>(inst, decoder, op);
  return decode_arithmetic<double, false, false>(inst, decoder, op);
}

template <class T, int kTest>
Step test_property(Warp& warp, const Op& op) {
  using Store = typename Lane<T>::Store;
  u32 lanes = 0;
  for (int i = 0; i < kLanes; i++) {
    int kind = std::fpclassify(Lane<T>::get(warp.reg<Store>(op.a)[i]));
    bool result = false;
    if (kTest == 0) result = kind != FP_NAN && kind != FP_INFINITE;
    if (kTest == 1) result = kind == FP_INFINITE;
    if (kTest == 2) result = kind != FP_NAN;
    if (kTest == 3) result = kind == FP_NAN;
    if (kTest == 4) result = kind == FP_NORMAL || kind == FP_ZERO;
    if (kTest == 5) result = kind == FP_SUBNORMAL;
    lanes |= static_cast<u32>(result) << i;
  }
  warp.set_pred(op.d, lanes);
  return Step::kNext;
}

template <class T>
bool decode_test(const Inst& inst, Decoder& decoder, Op& op) {
  constexpr Fn functions[] = {test_property<T, 0>, test_property<T, 1>, test_property<T, 2>,
                              test_property<T, 3>, test_property<T, 4>, test_property<T, 5>};
  const char* names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  op.d = decoder.pred_def(inst.args.at(0));
  op.a = decoder.use_f(inst.args.at(1), sizeof(T));
  for (int i = 0; i < 6; i++) {
    if (inst.has(names[i])) op.fn = functions[i];
  }
  return op.fn != nullptr;
}

}  // namespace

bool decode_float(const Inst& inst, Decoder& decoder, Op& op) {
  static const char* names[] = {"add",  "sub",   "mul", "fma", "mad",      "div",  "rcp",
                                "sqrt", "rsqrt", "ex2", "lg2", "sin",      "cos",  "tanh",
                                "min",  "max",   "neg", "abs", "copysign", "testp"};
  if (std::find(std::begin(names), std::end(names), inst.parts[0]) == std::end(names)) return false;
  const std::string& type = inst.type();
  if (inst.parts[0] == "testp") {
    return type == "f64" ? decode_test<double>(inst, decoder, op) : decode_test<float>(inst, decoder, op);
  }
  if (type == "f64") return decode_double(inst, decoder, op);
  if (type != "f32") return false;
  return inst.has("ftz") ? decode_single<true>(inst, decoder, op) : decode_single<false>(inst, decoder, op);
}

}  // namespace sim
