#include "kernels/delta.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kDeltaThreads)
    delta_d128_bf16(const __grid_constant__ DeltaMaps maps, const __grid_constant__ DeltaParams params) {
  delta<128, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kDeltaThreads)
    delta_d128_fp16(const __grid_constant__ DeltaMaps maps, const __grid_constant__ DeltaParams params) {
  delta<128, fp16>(maps, params);
}

}  // namespace vsa
