#include "kernels/fine_forward.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(fine_forward_threads(128), 1)
    fine_forward_dense_d128_bf16(const __grid_constant__ FineForwardMaps maps,
                                 const __grid_constant__ FineForwardParams params) {
  fine_forward<128, bf16, true>(maps, params);
}

extern "C" __global__ void __launch_bounds__(fine_forward_threads(128), 1)
    fine_forward_dense_d128_fp16(const __grid_constant__ FineForwardMaps maps,
                                 const __grid_constant__ FineForwardParams params) {
  fine_forward<128, fp16, true>(maps, params);
}

}  // namespace vsa
