#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

constexpr int kPairInfoBytes = 24;
constexpr int kPairPlanStages = 64;  // that a producer warp plans ahead

// A PairPlan for `lists` lists.
constexpr int pair_plan_bytes(int lists) { return kPairPlanStages * (2 * 4 + 1) + (1 << lists) * 4; }

// Shared memory of a PairRing of tiles of two cubes.
constexpr int pair_ring_bytes(int head_dim, int stages, int consumers) {
  int tile = 2 * kCubeTokens * head_dim * kHalfBytes;
  int barriers = (4 * stages + 1) * kBarrierBytes;
  return round_up(2 * stages * tile + stages * kPairInfoBytes + barriers + 2 * pair_plan_bytes(consumers),
                  kTileAlignment);
}

}  // namespace vsa
