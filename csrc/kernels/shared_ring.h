#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

constexpr int kStageInfoBytes = 16;

// Shared memory of a SharedRing: `stages` pairs of tiles, then what belongs to each stage, then one barrier.
constexpr int shared_ring_bytes(int tile_bytes, int stages, int info_bytes = kStageInfoBytes,
                                bool separate = false) {
  int barriers = separate ? 3 : 2;
  return round_up(stages * (2 * tile_bytes + info_bytes + barriers * kBarrierBytes) + kBarrierBytes,
                  kTileAlignment);
}

}  // namespace vsa
