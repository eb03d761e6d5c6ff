#include "kernels/fine_backward_q.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_q_dense_d64_bf16(const __grid_constant__ FineBackwardQMaps maps,
                                   const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardQ<64, bf16, true>>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_q_dense_d64_fp16(const __grid_constant__ FineBackwardQMaps maps,
                                   const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardQ<64, fp16, true>>(maps, params);
}

}  // namespace vsa
