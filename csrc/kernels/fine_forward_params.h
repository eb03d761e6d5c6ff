#pragma once

#include "kernels/block_list.h"
#include "kernels/cube_grid.h"
#include "kernels/gate.h"
#include "kernels/shared_ring.h"

namespace vsa {

struct FineForwardParams {
  CubeGrid q_grid, kv_grid;
  CubeGrid coarse_grid;                              // the cubes of `coarse`; of the same tokens as q_grid
  CubeCoordinates query, key, value, out, out_fine;  // of the maps of the same names
  BlockLists lists;                                  // key blocks of each query block
  const int32_t* block_sizes;    // [num_kv_blocks] valid prefix, or null: all of each cube
  const int32_t* q_block_sizes;  // [num_q_blocks], likewise
  float* lse;                    // [batch, heads, num_q_blocks, 64], natural log
  const void* coarse;            // [batch, heads, coarse cubes, head_dim], the query's type, or null
  Gate gate_fine, gate_coarse;
  bool combine;         // out = out_fine * gate_fine + coarse * gate_coarse; else out = out_fine
  bool store_out_fine;  // only with `combine`
  float scale_log2;     // the scale, above 0, times log2(e)
  int32_t heads;
  int32_t num_tasks;  // groups of query cubes, over all heads and batch entries
};

// One consumer warpgroup a query cube.
constexpr int fine_forward_consumers(int head_dim) { return head_dim == 128 ? 2 : 3; }
constexpr int fine_forward_stages(int head_dim) { return head_dim == 128 ? 5 : 10; }
constexpr int fine_forward_threads(int head_dim) { return (fine_forward_consumers(head_dim) + 1) * 128; }
constexpr int fine_forward_shared_bytes(int head_dim) {
  int tile = kCubeTokens * head_dim * kHalfBytes;
  int consumers = fine_forward_consumers(head_dim);
  return round_up(consumers * (2 * tile + 2 * kBarrierBytes) +
                      shared_ring_bytes(tile, fine_forward_stages(head_dim), kStageInfoBytes, true),
                  kTileAlignment);
}

}  // namespace vsa
