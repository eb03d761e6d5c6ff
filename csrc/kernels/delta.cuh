// The row term of the softmax's gradient, delta = sum(dO * O) over the columns, less the LSE's gradient
// (FlashAttention-2, section 3.1), where the output is the fine stage's own. Slots without a token get 0.
//
// As pool.cuh: a CTA takes every gridDim-th cube, heads fastest, from a ring of pairs of tiles that the copy
// engine fills ahead. Bound by memory.
#pragma once

#include "kernels/cube_tile.cuh"
#include "kernels/delta_params.h"

namespace vsa {

struct DeltaMaps {
  CUtensorMap grad_out, out;
};

template <int kHeadDim, class T>
struct DeltaShared {
  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  struct Pair {
    Tile grad_out, out;
  };
  Pair stages[kDeltaStages];
  Barrier full[kDeltaStages];
};

// Of this thread's half of a row. Four rows and both halves of them, 8 lanes, read from all banks at once:
// the swizzle spreads the rows over chunks 0 to 3 or 4 to 7 of 8, and the halves begin with another of these.
template <class Pair>
VSA_DEVICE float half_row_dot(Pair& pair, int row, int half) {
  using Tile = decltype(pair.out);
  using T = typename Tile::Element;
  constexpr int kChunks = Tile::kCols / 16;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kChunks; i++) {
    int chunk = kChunks * half + (kChunks == 8 ? i ^ 4 * half : i);
    uint4 x = *pair.grad_out.chunk(row, chunk), y = *pair.out.chunk(row, chunk);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float2 a = unpack<T>(xs[j]), b = unpack<T>(ys[j]);
      sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
    }
  }
  return sum;
}

template <int kHeadDim, class T>
VSA_DEVICE void delta(const DeltaMaps& maps, const DeltaParams& params) {
  using Shared = DeltaShared<kHeadDim, T>;
  static_assert(sizeof(Shared) == delta_shared_bytes(kHeadDim));
  extern __shared__ __align__(1024) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  int all = params.batch * params.heads * params.grid.num_cubes();
  int count = ceil_div(all - int(blockIdx.x), gridDim.x);
  if (threadIdx.x == 0) {
    for (Barrier& full : shared.full) full.init(1);
    fence_barrier_init();
  }
  __syncthreads();

  auto load_pair = [&shared, &maps, &params](int i) {
    CubeAddress address = numbered_cube(params.grid, params.heads, blockIdx.x + i * gridDim.x).address;
    auto& stage = shared.stages[i % kDeltaStages];
    Barrier& full = shared.full[i % kDeltaStages];
    full.arrive_expect(sizeof(stage));
    load_cube(stage.grad_out, maps.grad_out, params.grad_out, address, full);
    load_cube(stage.out, maps.out, params.out, address, full);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(kDeltaStages, count); i++) load_pair(i);
  }

  int row = threadIdx.x / 2, half = threadIdx.x % 2;
  RingPosition<kDeltaStages> ring;
  for (int i = 0; i < count; i++, ring.advance()) {
    shared.full[ring.stage].wait(ring.phase);
    float sum = half_row_dot(shared.stages[ring.stage], row, half);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    __syncthreads();  // everyone has read the tiles: the copy engine may overwrite them
    if (threadIdx.x == 0 && i + kDeltaStages < count) load_pair(i + kDeltaStages);
    if (half != 0) continue;

    auto [address, cube] = numbered_cube(params.grid, params.heads, blockIdx.x + i * gridDim.x);
    int prefix = params.block_sizes ? __ldg(params.block_sizes + cube) : kCubeTokens;
    if (row >= prefix || params.grid.token(address.origin, row) < 0) {
      sum = 0.0f;  // whatever lies there, NaN included
    } else if (params.grad_lse) {
      sum -= params.grad_lse[address.batch * params.grad_lse_strides[0] +
                             address.head * params.grad_lse_strides[1] + cube * params.grad_lse_strides[2] +
                             row * params.grad_lse_strides[3]];
    }
    int64_t head_row = int64_t(address.batch) * params.heads + address.head;
    params.delta[(head_row * params.grid.num_cubes() + cube) * kCubeTokens + row] = sum;
  }
}

}  // namespace vsa
