#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

// Of a TileRing: more `full` barriers than stages, so that a consumer may pass over what others chose.
constexpr int kRingFullBarriers = 64;
constexpr int kRingVisits = 32;  // every so many stages of a task all consumers stop by at the first ring

// Shared memory of a TileRing, paired or not, with `extra_bytes` (a multiple of 8) beside each tile.
constexpr int tile_ring_bytes(int tile_bytes, int stages, int extra_bytes) {
  int barriers = (kRingFullBarriers + 2 * stages + 1) * kBarrierBytes;
  return round_up(stages * (tile_bytes + extra_bytes) + barriers, kTileAlignment);
}

}  // namespace vsa
