#include "kernels/select_small.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kSelectSmallThreads, 1)
    select_small_d64_bf16(const __grid_constant__ SelectMaps maps,
                          const __grid_constant__ SelectParams params) {
  select_small<64, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kSelectSmallThreads, 1)
    select_small_d64_fp16(const __grid_constant__ SelectMaps maps,
                          const __grid_constant__ SelectParams params) {
  select_small<64, fp16>(maps, params);
}

}  // namespace vsa
