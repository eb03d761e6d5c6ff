#include "kernels/transpose_index.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kTransposeThreads, 2)
    transpose_index(const __grid_constant__ TransposeIndexParams params) {
  transpose_lists(params);
}

}  // namespace vsa
