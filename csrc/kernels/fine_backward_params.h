#pragma once

#include "kernels/block_list.h"
#include "kernels/cube_grid.h"
#include "kernels/member_ring.h"

namespace vsa {

// Both passes. What is absent is null.
struct FineBackwardParams {
  CubeGrid q_grid, kv_grid;
  CubeCoordinates query, key, value, grad_out;  // of the maps of the same names
  CubeCoordinates grad_query, grad_key, grad_value;
  BlockLists lists;  // key blocks of each query block
  const int32_t*
      q_offsets;  // [batch, heads, num_kv_blocks + 1]: rows of q_indices; null: all query blocks everywhere
  const int32_t* q_indices;  // [batch, heads, q_indices_per_head]: query blocks of each key block
  int64_t q_indices_per_head;
  const int32_t *block_sizes, *q_block_sizes;  // [num_kv_blocks], [num_q_blocks] valid prefix
  const float *lse, *delta;                    // [batch, heads, num_q_blocks, 64]
  // [batch, heads, cubes of pooled_grid, head_dim], the query's type; the query pass takes the first, the key
  // pass the others.
  const void *dq_pooled, *dk_pooled, *dv_pooled;
  CubeGrid pooled_grid;     // of the same tokens as the grid of the pass
  bool pooled_on_own_grid;  // pooled_grid is the grid of the pass
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  int32_t heads;
};

// Two tiles that a consumer keeps, and a ring of pairs. One consumer warpgroup a cube: as many as have
// registers.
constexpr int kBackwardKvConsumers = 2;
constexpr int fine_backward_q_consumers(int head_dim) { return head_dim == 128 ? 2 : 3; }
constexpr int fine_backward_threads(int consumers) { return (consumers + 1) * 128; }
constexpr int kBackwardRowBytes = 2 * kCubeTokens * 4;  // LSE and delta of a query block
constexpr int fine_backward_stages(int head_dim) { return head_dim == 128 ? 5 : 11; }

constexpr int fine_backward_shared_bytes(int head_dim, int consumers, int info_bytes) {
  int tile = kCubeTokens * head_dim * kHalfBytes;
  return 2 * consumers * tile +
         member_ring_bytes(tile, fine_backward_stages(head_dim), consumers, info_bytes);
}
constexpr int fine_backward_kv_shared_bytes(int head_dim) {
  return fine_backward_shared_bytes(head_dim, kBackwardKvConsumers, kTileInfoBytes + kBackwardRowBytes);
}
constexpr int fine_backward_q_shared_bytes(int head_dim) {
  return fine_backward_shared_bytes(head_dim, fine_backward_q_consumers(head_dim), kTileInfoBytes);
}

}  // namespace vsa
