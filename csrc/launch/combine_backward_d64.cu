#include "kernels/combine_backward.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(combine_threads(64), combine_ctas(64))
    combine_backward_d64_bf16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<64, bf16>(params);
}

extern "C" __global__ void __launch_bounds__(combine_threads(64), combine_ctas(64))
    combine_backward_d64_fp16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<64, fp16>(params);
}

}  // namespace vsa
