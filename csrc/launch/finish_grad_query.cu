#include "kernels/grad_query.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    finish_grad_query_d64_bf16(const __grid_constant__ FineBackwardParams params) {
  finish_grad_query<64, bf16>(params);
}

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    finish_grad_query_d64_fp16(const __grid_constant__ FineBackwardParams params) {
  finish_grad_query<64, fp16>(params);
}

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    finish_grad_query_d128_bf16(const __grid_constant__ FineBackwardParams params) {
  finish_grad_query<128, bf16>(params);
}

extern "C" __global__ void __launch_bounds__(kGradQueryThreads)
    finish_grad_query_d128_fp16(const __grid_constant__ FineBackwardParams params) {
  finish_grad_query<128, fp16>(params);
}

}  // namespace vsa
