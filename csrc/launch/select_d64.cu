#include "kernels/select.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(select_threads(1), 1)
    select_d64_bf16(const __grid_constant__ SelectMaps maps, const __grid_constant__ SelectParams params) {
  select<1, 64, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(select_threads(1), 1)
    select_d64_fp16(const __grid_constant__ SelectMaps maps, const __grid_constant__ SelectParams params) {
  select<1, 64, fp16>(maps, params);
}

}  // namespace vsa
