// The ring of key and value tiles between the producer warps and the consumer warpgroups of the forward. A
// stage holds two cubes; its keys and its values are loaded, waited for and released one by one.
//
// Barriers of a stage. full: one arrival by the producer warp and the bytes of the tile. empty: one arrival
// by each warp of each consumer, member or not, in ring order; skipping a round would alias the phase bit.
#pragma once

#include "kernels/block_pairs.cuh"
#include "kernels/cube_tile.cuh"
#include "kernels/pair_ring.h"

namespace vsa {

struct PairInfo {
  uint64_t valid[2];  // bit per row of each cube: a real token
  uint32_t members;   // bit per consumer
  uint16_t last;      // of its task
  uint16_t partial;   // some row is no real token
};
static_assert(sizeof(PairInfo) == kPairInfoBytes);

template <int kStages, int kConsumers>
struct PairBarriers {
  Barrier full[kStages], empty[kStages];

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) barrier.init(kConsumers * kWarpgroupThreads / kWarpThreads);
  }

  // One warp of a consumer has finished with a tile. What its wgmma read is read: the caller waited for that.
  VSA_DEVICE void release(int stage) {
    __syncwarp();
    if (lane_id() == 0) empty[stage].arrive();
  }
};

template <class Tile_, int kStages_, int kConsumers_>
struct PairRing {
  using Tile = Tile_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;

  Tile keys[kStages], values[kStages];
  PairInfo info[kStages];  // written with the keys, and theirs to overwrite
  PairBarriers<kStages, kConsumers> key_barriers, value_barriers;
  Barrier landed;  // of values whose pads the producer clears before it publishes them
  PairPlan<kConsumers> key_plan, value_plan;

  VSA_DEVICE void init() {
    key_barriers.init();
    value_barriers.init();
    landed.init(1);
  }
};

// One thread: two cubes of one head into a tile of 128 rows. `full` gets the bytes.
template <class Tile>
VSA_DEVICE void load_pair(Tile& tile, const CUtensorMap& map, const CubeCoordinates& at, int batch, int head,
                          const Extent3 (&origins)[2], Barrier& full) {
  static_assert(Tile::kRows == 2 * kCubeTokens);
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; panel++) {
      int32_t coordinates[5];
      box_coordinates(coordinates, at, {batch, head, origins[i]}, panel);
      load_async(tile.panel(panel) + i * kCubeTokens * Tile::kPanelCols, map, coordinates, full);
    }
  }
}

}  // namespace vsa
