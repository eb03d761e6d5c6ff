// Words that every tile header shares: thread roles, register reallocation, 16-bit element helpers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cuda/ptx>
#include <type_traits>

#define VSA_DEVICE __device__ __forceinline__

namespace vsa {

namespace ptx = cuda::ptx;

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;

template <class T>
constexpr bool is_half_type = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;

VSA_DEVICE int lane_id() { return threadIdx.x % kWarpThreads; }

// Broadcast from lane 0, so that the compiler knows the value is the same in the whole warp.
VSA_DEVICE int warp_id() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpThreads, 0); }
VSA_DEVICE int warpgroup_id() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads, 0); }

// One lane of a converged warp (elect.sync; PTX ISA 9.7.13.x). cuda::ptx has no wrapper before CCCL 3.1.
VSA_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// The compiler forgets what it knows of `x`, and computes anew what depends on it.
VSA_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }

// setmaxnreg: a warpgroup gives registers back, or takes what others gave back. Every warp of the warpgroup
// calls it.
template <int kRegisters>
VSA_DEVICE void register_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
VSA_DEVICE void register_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <class T>
VSA_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

template <class T>
VSA_DEVICE float to_float(T x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat162float(x);
  } else {
    return __half2float(x);
  }
}

// Two floats rounded to nearest even in one 32-bit register; `low` in bits 0 to 15.
template <class T>
VSA_DEVICE uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <class T>
VSA_DEVICE float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair));
  } else {
    return __half22float2(reinterpret_cast<__half2&>(pair));
  }
}

}  // namespace vsa
