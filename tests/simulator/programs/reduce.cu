// Victim: out[row] += sum over CTAs of 2 * in[cta][row], rows of 256 floats, by 1-D bulk reductions from two
// shared buffers in turn.
#include <cuda/ptx>

namespace ptx = cuda::ptx;

struct Params {
  const float* in;  // [ctas, rows, 256]
  float* out;       // [rows, 256]
  int rows;
};

constexpr int kWidth = 256;

extern "C" __global__ void __launch_bounds__(128, 1) reduce(const __grid_constant__ Params params) {
  __shared__ __align__(128) float buffers[2][kWidth];
  const int thread = threadIdx.x;
  const float* in = params.in + static_cast<int64_t>(blockIdx.x) * params.rows * kWidth;
  for (int row = 0; row < params.rows; ++row) {
    float* buffer = buffers[row % 2];
    if (thread == 0) ptx::cp_async_bulk_wait_group_read(ptx::n32_t<1>{});
    __syncthreads();
    for (int i = thread; i < kWidth; i += 128) buffer[i] = 2.0f * in[row * kWidth + i];
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    if (thread == 0) {
      ptx::cp_reduce_async_bulk(ptx::space_global, ptx::space_shared, ptx::op_add, params.out + row * kWidth,
                                buffer, kWidth * sizeof(float));
      ptx::cp_async_bulk_commit_group();
    }
  }
  if (thread == 0) ptx::cp_async_bulk_wait_group(ptx::n32_t<0>{});
}
