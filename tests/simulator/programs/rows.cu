// Ordinary CUDA C++ over rows of 256 floats, a CTA of 128 threads a row: what nvcc makes of reductions by
// shuffle, exponentials, packed conversions, a bitonic sort in shared memory, a stack array, a switch and
// constant memory.
#include <cuda_bf16.h>

#include <cstdint>

constexpr int kWidth = 256;
constexpr int kThreads = 128;

struct Params {
  const float* in;         // [rows, 256]
  __nv_bfloat16* softmax;  // [rows, 256]
  float* sorted;           // [rows, 256] ascending
  int32_t* histogram;      // [8] over all rows, of floor(|x| * 2) clamped to 7
  int32_t* mixed;          // [rows, 128]
};

__constant__ int kPrimes[8] = {2, 3, 5, 7, 11, 13, 17, 19};

__device__ float warp_max(float value) {
  for (int offset = 16; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

__device__ float warp_sum(float value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// An integer that depends on the thread through a switch and a stack array indexed at run time.
__device__ int mix(int thread, int row) {
  int stack[8];
  for (int i = 0; i < 8; ++i) stack[i] = kPrimes[(i + row) % 8] * (thread + i);
  int value = stack[(thread * 5 + row) % 8];
  switch ((thread ^ row) % 6) {
    case 0:
      value = __popc(value) + 100;
      break;
    case 1:
      value = value / 7;
      break;
    case 2:
      value = -value % 13;
      break;
    case 3:
      value = static_cast<int>((static_cast<int64_t>(value) * 123456789) >> 20);
      break;
    case 4:
      value = __brev(value) >> 8;
      break;
    default:
      value ^= 0x5a5a;
      break;
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(kThreads) rows(const __grid_constant__ Params params) {
  __shared__ float values[kWidth];
  __shared__ float partial[2][kThreads / 32];
  __shared__ int counts[8];
  const int thread = threadIdx.x;
  const int row = blockIdx.x;
  if (thread < 8) counts[thread] = 0;
  const float2 pair = reinterpret_cast<const float2*>(params.in + row * kWidth)[thread];
  reinterpret_cast<float2*>(values)[thread] = pair;

  const float high = warp_max(fmaxf(pair.x, pair.y));
  if (thread % 32 == 0) partial[0][thread / 32] = high;
  __syncthreads();
  float row_max = partial[0][0];
  for (int warp = 1; warp < kThreads / 32; ++warp) row_max = fmaxf(row_max, partial[0][warp]);
  const float x = __expf(pair.x - row_max);
  const float y = __expf(pair.y - row_max);
  const float sum = warp_sum(x + y);
  if (thread % 32 == 0) partial[1][thread / 32] = sum;
  for (float value : {pair.x, pair.y}) atomicAdd(&counts[min(static_cast<int>(fabsf(value) * 2.0f), 7)], 1);
  __syncthreads();
  float row_sum = 0.0f;
  for (float warp_total : partial[1]) row_sum += warp_total;
  const float inverse = __fdividef(1.0f, row_sum);
  reinterpret_cast<__nv_bfloat162*>(params.softmax + row * kWidth)[thread] =
      __floats2bfloat162_rn(x * inverse, y * inverse);
  if (thread < 8) atomicAdd(params.histogram + thread, counts[thread]);

  for (int size = 2; size <= kWidth; size *= 2) {
    for (int stride = size / 2; stride; stride /= 2) {
      const int low = 2 * stride * (thread / stride) + thread % stride;
      const bool ascending = (low & size) == 0;
      const float a = values[low];
      const float b = values[low + stride];
      if ((a > b) == ascending) {
        values[low] = b;
        values[low + stride] = a;
      }
      __syncthreads();
    }
  }
  for (int i = thread; i < kWidth; i += kThreads) params.sorted[row * kWidth + i] = values[i];
  params.mixed[row * kThreads + thread] = mix(thread, row);
}
