#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

constexpr int kTileInfoBytes = 16;
constexpr int kRingEntryBytes = 8;

// Shared memory of a MemberRing: `stages` pairs of tiles with what belongs to each and two barriers, a queue
// for each consumer with a barrier at each place and one for its tiles, one barrier.
constexpr int member_ring_bytes(int tile_bytes, int stages, int consumers, int info_bytes) {
  int queue = (stages + 1) * (kRingEntryBytes + kBarrierBytes) + kBarrierBytes;
  return round_up(
      stages * (2 * tile_bytes + info_bytes + 2 * kBarrierBytes) + consumers * queue + kBarrierBytes,
      kTileAlignment);
}

}  // namespace vsa
