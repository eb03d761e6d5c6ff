#include "kernels/fine_backward_q.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_q_d128_bf16(const __grid_constant__ FineBackwardQMaps maps,
                              const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardQ<128, bf16>>(maps, params);
}

extern "C" __global__ void __launch_bounds__(kBackwardThreads, 1)
    fine_backward_q_d128_fp16(const __grid_constant__ FineBackwardQMaps maps,
                              const __grid_constant__ FineBackwardParams params) {
  fine_backward<FineBackwardQ<128, fp16>>(maps, params);
}

}  // namespace vsa
