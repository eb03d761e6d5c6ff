#include "kernels/pool.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(pool_threads(128))
    pool_d128_bf16(const __grid_constant__ PoolMaps maps, const __grid_constant__ PoolParams params) {
  pool<128, bf16>(maps, params);
}

extern "C" __global__ void __launch_bounds__(pool_threads(128))
    pool_d128_fp16(const __grid_constant__ PoolMaps maps, const __grid_constant__ PoolParams params) {
  pool<128, fp16>(maps, params);
}

}  // namespace vsa
