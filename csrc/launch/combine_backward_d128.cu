#include "kernels/combine_backward.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128, false))
    combine_backward_d128_bf16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, bf16, false>(params);
}

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128, true))
    combine_backward_d128_bf16_plain(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, bf16, true>(params);
}

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128, false))
    combine_backward_d128_fp16(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, fp16, false>(params);
}

extern "C" __global__ void __launch_bounds__(combine_threads(128), combine_ctas(128, true))
    combine_backward_d128_fp16_plain(const __grid_constant__ CombineBackwardParams params) {
  combine_backward<128, fp16, true>(params);
}

}  // namespace vsa
