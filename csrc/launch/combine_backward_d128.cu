#include "kernels/combine_backward.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128))
    combine_backward_d128_bf16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, bf16>(params);
}

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128))
    combine_backward_d128_fp16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, fp16>(params);
}

}  // namespace vsa
