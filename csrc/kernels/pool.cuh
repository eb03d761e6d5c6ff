// Mean over each cube's real tokens of query, key and value, in one launch, straight from raster tokens (VSA,
// section 2.2).
//
// A CTA takes every gridDim-th cube (heads fastest: those that are loaded at a time lie side by side in
// memory), from a ring of kStages tiles that the copy engine fills ahead; thread 0 is the producer and all
// threads add. Bound by memory: every token is read once; kStages * CTAs per SM tiles in flight hide its
// latency.
//
//   thread 0     load 0 .. kStages-1 |        load kStages      |  ...
//   all threads                      | wait full 0, add, barrier | wait full 1, add, barrier | ...
#pragma once

#include "kernels/cube_tile.cuh"
#include "kernels/pool_params.h"

namespace vsa {

struct PoolMaps {
  CUtensorMap input[kPoolTensors];
};

template <int kHeadDim, class T>
struct PoolShared {
  static constexpr int kStages = pool_stages(kHeadDim);
  SharedTile<T, kCubeTokens, kHeadDim> tiles[kStages];
  Barrier full[kStages];
};

struct PoolTile {
  int tensor;
  NumberedCube of;
};

VSA_DEVICE PoolTile pool_tile(const PoolParams& params, int index) {
  int per_tensor = params.batch * params.heads * params.grid.num_cubes();
  int tensor = index / per_tensor;
  return {tensor, numbered_cube(params.grid, params.heads, index - tensor * per_tensor)};
}

// Sums of 8 columns over the tile's 64 rows; thread (column, row % 8) adds 8 rows, then the 8 lanes of a
// column combine. Lanes 0 to 7 of a quarter warp read 8 different rows, which the swizzle spreads over all
// banks.
template <class Tile>
VSA_DEVICE void column_sums(float (&sums)[8], Tile& tile, int column, int first_row) {
  using T = std::remove_reference_t<decltype(tile.data[0])>;
#pragma unroll
  for (int i = 0; i < 8; i++) sums[i] = 0.0f;
#pragma unroll
  for (int row = 0; row < Tile::kRows; row += 8) {
    uint4 chunk = *tile.chunk(row + first_row, column);
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 pair = unpack<T>(words[i]);
      sums[2 * i] += pair.x;
      sums[2 * i + 1] += pair.y;
    }
  }
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], lanes);
  }
}

template <int kHeadDim, class T>
VSA_DEVICE void pool(const PoolMaps& maps, const PoolParams& params) {
  using Shared = PoolShared<kHeadDim, T>;
  static_assert(sizeof(Shared) == pool_shared_bytes(kHeadDim));
  constexpr int kStages = Shared::kStages;
  extern __shared__ __align__(1024) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);

  int all = kPoolTensors * params.batch * params.heads * params.grid.num_cubes();
  int count = ceil_div(all - int(blockIdx.x), gridDim.x);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) shared.full[i].init(1);
    fence_barrier_init();
  }
  __syncthreads();

  auto load_tile = [&shared, &maps, &params](int i) {
    PoolTile tile = pool_tile(params, blockIdx.x + i * gridDim.x);
    Barrier& full = shared.full[i % kStages];
    full.arrive_expect(sizeof(shared.tiles[0]));
    load_cube(shared.tiles[i % kStages], maps.input[tile.tensor], params.input[tile.tensor], tile.of.address,
              full);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(kStages, count); i++) load_tile(i);
  }

  int column = threadIdx.x / 8, first_row = threadIdx.x % 8;
  RingPosition<kStages> ring;
  for (int i = 0; i < count; i++, ring.advance()) {
    shared.full[ring.stage].wait(ring.phase);
    float sums[8];
    column_sums(sums, shared.tiles[ring.stage], column, first_row);
    __syncthreads();  // everyone has read the tile: the copy engine may overwrite it
    if (threadIdx.x == 0 && i + kStages < count) load_tile(i + kStages);

    if (first_row == 0) {
      auto [tensor, of] = pool_tile(params, blockIdx.x + i * gridDim.x);
      Extent3 side = params.grid.sides(of.address.origin);
      float tokens = side.t * side.h * side.w;
      int64_t head_row = int64_t(of.address.batch) * params.heads + of.address.head;
      int64_t row = head_row * params.grid.num_cubes() + of.cube;
      uint4 mean = {pack<T>(sums[0] / tokens, sums[1] / tokens), pack<T>(sums[2] / tokens, sums[3] / tokens),
                    pack<T>(sums[4] / tokens, sums[5] / tokens), pack<T>(sums[6] / tokens, sums[7] / tokens)};
      reinterpret_cast<uint4*>(static_cast<T*>(params.output[tensor]) + row * kHeadDim)[column] = mean;
    }
  }
}

}  // namespace vsa
