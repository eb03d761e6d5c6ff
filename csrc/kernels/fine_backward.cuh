// What the two passes of the fine stage's backward share. Per pair of blocks, with S = Q K^T:
//
//   P = exp2(scale_log2 S - log2(e) LSE)     dP = dO V^T     dS = P (dP - delta)
//   dV += P^T dO     dK += dS^T Q     dQ += dS K     and at the end dK, dQ times scale
//
// A pass keeps what belongs to a consumer's cube and walks a ring of the other side's tiles. No reduction
// between CTAs, so every run gives the same bits; S and dP are computed twice for that, 7 matrix products
// instead of 5.
#pragma once

#include "kernels/fine_backward_params.h"
#include "kernels/member_ring.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

constexpr float kLog2E = 1.4426950408889634f;

template <int kHeadDim_, class T_, int kConsumers_, class Info>
struct FineBackward {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kStages = fine_backward_stages(kHeadDim);
  // The producer's are enough to keep its lists and coordinates.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 56 : 80;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 224 : 144;

  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  using Ring = MemberRing<Tile, kStages, kConsumers, Info>;
  struct Shared {
    Tile first[kConsumers], second[kConsumers];  // of each consumer's cube; later the gradients
    Ring ring;
  };
};

// What a CTA works on: the cubes at `cubes` positions from `first` on, of one head, in the order along time.
template <int kConsumers>
struct FineBackwardTask {
  int batch, head, first, cubes;

  VSA_DEVICE FineBackwardTask(const CubeGrid& grid, int heads) {
    int groups = ceil_div(grid.num_cubes(), kConsumers);
    int row = blockIdx.x / groups;
    batch = row / heads;
    head = row % heads;
    first = (blockIdx.x - row * groups) * kConsumers;
    cubes = min(kConsumers, grid.num_cubes() - first);
  }

  VSA_DEVICE int cube(const CubeGrid& grid, int consumer) const {
    return grid.cube_along_time(first + consumer);
  }
  VSA_DEVICE CubeAddress address(const CubeGrid& grid, int cube) const {
    return {batch, head, grid.origin(cube)};
  }
};

// One thread of the producer: the tiles that a consumer keeps.
template <class Shared>
VSA_DEVICE void load_resident(Shared& shared, int consumer, const CUtensorMap& first_map,
                              const CubeCoordinates& first_at, const CUtensorMap& second_map,
                              const CubeCoordinates& second_at, const CubeAddress& cube) {
  Barrier& resident = shared.ring.resident[consumer];
  resident.arrive_expect(2 * sizeof(shared.first[consumer]));
  load_cube(shared.first[consumer], first_map, first_at, cube, resident);
  load_cube(shared.second[consumer], second_map, second_at, cube, resident);
}

constexpr int kNone = -1;

// A consumer's way round the ring: step(stage, pending) for each stage that it is a member of. Its last
// products may stay in flight and hold the stage, which is pending until the next step has waited for them
// and released it (kNone: nothing is). A stage that has not landed is time to finish what is pending, so that
// loads find room in the ring whatever the lists. `finish` waits for the products.
template <class Ring, class Step, class Finish>
VSA_DEVICE void walk_ring(Ring& ring, int consumer, Step step, Finish finish) {
  RingPosition<Ring::kPlaces> at;
  int pending = kNone;
  auto wait = [&ring, &finish, &pending](Barrier& barrier, uint32_t phase) {
    if (__all_sync(0xffffffffu, barrier.test(phase))) return;
    finish();
    if (pending != kNone) ring.release(pending);
    pending = kNone;
    barrier.wait(phase);
  };
  while (true) {
    wait(ring.listed[consumer][at.stage], at.phase);
    const auto& entry = ring.queue[consumer][at.stage];
    int stage = __shfl_sync(0xffffffffu, entry.stage, 0);  // one address for the whole warp
    if (stage == Ring::kEnd) break;
    wait(ring.full[stage], entry.phase);
    pending = step(stage, pending);
    at.advance();
  }
  finish();
}

VSA_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
VSA_DEVICE uint32_t bits_of(uint32_t x) { return x; }

// Keeps what stands above from mixing with what stands below: ptxas spreads matrix products among arithmetic
// that is meant to run beside them, but moves nothing over a branch. Never taken. kPlace, from 1 on: another
// for each in a function, or the compiler sees that only the first can be.
template <int kPlace>
VSA_DEVICE void keep_apart(int stage) {
  if (stage == -2 - kPlace) __trap();
}

// Keeps what made `tile` above this place. ptxas moves a wait for matrix products that stands here up, though
// the work above is meant to run beside those products; it moves nothing over a branch that depends on all of
// it. Never taken: the plan lets no infinite scale pass. By vote, so that the warp stays converged and
// addresses uniform.
template <class Tile>
VSA_DEVICE void settle(const Tile& tile, float scale_log2) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) bits |= bits_of(tile.data[i]);
  if (__any_sync(0xffffffffu, bits == 0xffffffffu) && scale_log2 == INFINITY) __trap();
}

// What a lane's two tokens get of the pooled gradients: a row of them, the token's cube's, over its tokens.
struct PooledRows {
  int64_t row[2];
  float share[2];

  // `real` tokens of cube number `cube` of the pass's `grid`.
  VSA_DEVICE PooledRows(const FineBackwardParams& params, const CubeGrid& grid, const CubeAddress& address,
                        int cube, uint64_t real) {
    const CubeGrid& pooled = params.pooled_grid;
    int64_t first = (int64_t(address.batch) * params.heads + address.head) * pooled.num_cubes();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int from = cube, tokens = __popcll(real);
      if (!params.pooled_on_own_grid) {
        // A slot without a token takes any row: its gradient is not stored.
        from = pooled.cube_of(max(grid.token(address.origin, tile_row(half)), int64_t(0)));
        Extent3 side = pooled.sides(pooled.origin(from));
        tokens = side.t * side.h * side.w;
      }
      row[half] = first + from;
      share[half] = 1.0f / tokens;
    }
  }
};

// tile = tile * scale + pooled * share; pooled [cubes of all heads, kCols] or null.
template <class T, int kCols>
VSA_DEVICE void scale_and_add_rows(FloatTile<kCols>& tile, float scale, const T* pooled,
                                   const PooledRows& from) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const T* row = pooled + from.row[half] * kCols + tile_column();
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 add{0.0f, 0.0f};
      if (pooled) add = unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(row + 8 * j)));
      float &x = tile.data[4 * j + 2 * half], &y = tile.data[4 * j + 2 * half + 1];
      x = fmaf(x, scale, from.share[half] * add.x);
      y = fmaf(y, scale, from.share[half] * add.y);
    }
  }
}

// One consumer's gradient of its cube, through shared memory to global.
template <class Tile, int kCols>
VSA_DEVICE void store_gradient(const FloatTile<kCols>& gradient, Tile& staging, int consumer,
                               const CUtensorMap& map, const CubeCoordinates& at, const CubeAddress& cube) {
  HalfTile<typename Tile::Element, kCols> rounded;
  convert(rounded, gradient);
  // The tile held an operand: no warp's products may still read it.
  named_barrier_sync(1 + consumer, kWarpgroupThreads);
  store(staging, rounded);
  fence_async_shared();  // the copy engine reads what this warpgroup wrote
  named_barrier_sync(1 + consumer, kWarpgroupThreads);
  if (threadIdx.x % kWarpgroupThreads == 0) {
    store_cube(map, at, cube, staging);
    store_commit();
  }
}

}  // namespace vsa
