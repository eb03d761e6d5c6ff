// Lane-wise instructions from a scalar function: one loop over 32 lanes, the idle lanes' results thrown away.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "world.h"

namespace sim {

// Types are carried in lanes of 32 or 64 bits, narrow ones zero-extended.
template <class T>
struct Lane {
  using Store = std::conditional_t<sizeof(T) == 8, u64, u32>;
  static T get(Store value) {
    if constexpr (sizeof(T) < 4) {
      return static_cast<T>(value);
    } else {
      return bits_as<T>(value);
    }
  }
  static Store put(T value) {
    if constexpr (sizeof(T) < 4) {
      return static_cast<std::make_unsigned_t<T>>(value);
    } else {
      return bits_as<Store>(value);
    }
  }
};

template <class Store>
void store_lanes(Warp& warp, u32 slot, const Store* values) {
  Store* d = warp.reg<Store>(slot);
  if (warp.exec == kAllLanes) {
    std::memcpy(d, values, sizeof(Store) * kLanes);
  } else {
    for (int i = 0; i < kLanes; i++) d[i] = warp.exec >> i & 1 ? values[i] : d[i];
  }
}

inline void inherit(Warp& warp, u32 slot, u32 defined) {
  warp.init[slot] = (warp.init[slot] & ~warp.exec) | (defined & warp.exec);
}

inline u32 op_slot(const Op& op, int index) {
  return index == 0 ? op.a : index == 1 ? op.b : index == 2 ? op.c : op.f;
}

template <class D, auto kFunction, class... A>
struct Map {
  static Step run(Warp& warp, const Op& op) { return run_at(warp, op, std::index_sequence_for<A...>{}); }
  template <size_t... kIndex>
  static Step run_at(Warp& warp, const Op& op, std::index_sequence<kIndex...>) {
    using Store = typename Lane<D>::Store;
    alignas(64) Store result[kLanes];
    auto pointers = std::make_tuple(warp.reg<typename Lane<A>::Store>(op_slot(op, kIndex))...);
    for (int i = 0; i < kLanes; i++) {
      result[i] = Lane<D>::put(kFunction(Lane<A>::get(std::get<kIndex>(pointers)[i])...));
    }
    u32 defined = (warp.init[op_slot(op, kIndex)] & ...);
    inherit(warp, op.d, defined);
    store_lanes(warp, op.d, result);
    return Step::kNext;
  }
};

// Binds `inst`'s operands after the first to a, b, c, f with the sizes of the types.
template <class D, auto kFunction, class... A>
bool bind_map(const Inst& inst, Decoder& decoder, Op& op) {
  constexpr int sizes[] = {sizeof(A)...};
  constexpr bool floats[] = {std::is_floating_point_v<A>...};
  u32* slots[] = {&op.a, &op.b, &op.c, &op.f};
  for (size_t i = 0; i < sizeof...(A); i++) {
    const Arg& arg = inst.args.at(i + 1);
    *slots[i] = floats[i] ? decoder.use_f(arg, sizes[i]) : decoder.use(arg, sizes[i]);
  }
  op.d = decoder.def(inst.args.at(0));
  op.fn = Map<D, kFunction, A...>::run;
  return true;
}

}  // namespace sim
