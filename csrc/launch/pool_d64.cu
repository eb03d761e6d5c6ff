#include "kernels/pool.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(pool_threads(64))
    pool_d64_bf16(const __grid_constant__ PoolMaps maps, const __grid_constant__ PoolParams params) {
  pool<64, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(pool_threads(64))
    pool_d64_fp16(const __grid_constant__ PoolMaps maps, const __grid_constant__ PoolParams params) {
  pool<64, fp16>(maps, params);
}

}  // namespace vsa
