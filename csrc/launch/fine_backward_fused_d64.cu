#include "kernels/fine_backward_fused.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_fused_d64_bf16(const __grid_constant__ FineBackwardKeysMaps maps,
                                 const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardFused<64, bf16>>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_fused_d64_fp16(const __grid_constant__ FineBackwardKeysMaps maps,
                                 const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardFused<64, fp16>>(maps, params);
}

}  // namespace vsa
