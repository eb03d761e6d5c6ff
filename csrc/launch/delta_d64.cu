#include "kernels/delta.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kDeltaThreads)
    delta_d64_bf16(const __grid_constant__ DeltaMaps maps, const __grid_constant__ DeltaParams params) {
  delta<64, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kDeltaThreads)
    delta_d64_fp16(const __grid_constant__ DeltaMaps maps, const __grid_constant__ DeltaParams params) {
  delta<64, fp16>(maps, params);
}

}  // namespace vsa
