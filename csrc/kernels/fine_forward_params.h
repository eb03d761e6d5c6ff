#pragma once

#include "kernels/block_list.h"
#include "kernels/cube_grid.h"
#include "kernels/gate.h"
#include "kernels/pair_ring.h"
#include "kernels/token_rows.h"

namespace vsa {

struct FineForwardParams {
  CubeGrid q_grid, kv_grid;
  CubeGrid coarse_grid;               // the cubes of `coarse`; of the same tokens as q_grid
  CubeCoordinates query, key, value;  // of the maps of the same names
  TokenRows out, out_fine;
  BlockLists lists;              // key blocks of each query block
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

// One consumer warpgroup a query cube; a stage holds the keys and values of two cubes.
constexpr int kForwardConsumers = 2;
constexpr int fine_forward_stages(int head_dim) { return head_dim == 128 ? 3 : 6; }
constexpr int kForwardThreads = (kForwardConsumers + 1) * 128;
constexpr int fine_forward_shared_bytes(int head_dim) {
  int queries = kForwardConsumers * (kCubeTokens * head_dim * kHalfBytes);
  return round_up(queries + pair_ring_bytes(head_dim, fine_forward_stages(head_dim), kForwardConsumers) +
                      2 * kForwardConsumers * kBarrierBytes,
                  kTileAlignment);
}

}  // namespace vsa
