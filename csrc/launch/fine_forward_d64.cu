#include "kernels/fine_forward.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(fine_forward_threads(64), 1)
    fine_forward_d64_bf16(const __grid_constant__ FineForwardMaps maps,
                          const __grid_constant__ FineForwardParams params) {
  fine_forward<64, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(fine_forward_threads(64), 1)
    fine_forward_d64_fp16(const __grid_constant__ FineForwardMaps maps,
                          const __grid_constant__ FineForwardParams params) {
  fine_forward<64, fp16>(maps, params);
}

}  // namespace vsa
