#pragma once

#include "kernels/block_list.h"
#include "kernels/cube_grid.h"

namespace vsa {

struct TransposeIndexParams {
  BlockLists lists;    // key blocks of each query block
  int32_t* q_offsets;  // [batch, heads, num_kv_blocks + 1]
  int32_t* q_indices;  // [batch, heads, num_q_blocks * max_blocks]
  int32_t heads, num_q_blocks, num_kv_blocks, max_blocks;
  int32_t keys_per_pass;  // key blocks that shared memory holds counts for
};

constexpr int kTransposeThreads = 1024;  // a warp for each of the 32 query blocks of a bit mask
constexpr int kTransposeCtas = 8;        // in a cluster, which has one head
constexpr int kTransposeMaxKeys = 16384;
constexpr int kTransposeArrays = 3;  // counts, cursors, masks
constexpr int transpose_shared_bytes(int keys_per_pass) {
  return (kTransposeArrays * keys_per_pass + kTransposeThreads / 32 + 1) * int(sizeof(int32_t));
}

}  // namespace vsa
