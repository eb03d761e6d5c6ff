#include "kernels/grad_query.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    start_grad_query_d64(const __grid_constant__ FineBackwardParams params) {
  start_grad_query<64>(params);
}

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    start_grad_query_d128(const __grid_constant__ FineBackwardParams params) {
  start_grad_query<128>(params);
}

}  // namespace vsa
