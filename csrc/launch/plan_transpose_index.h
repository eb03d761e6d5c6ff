#pragma once

#include "kernels/block_list.h"
#include "launch/plan.h"

namespace vsa {

struct TransposeIndexArguments {
  BlockLists lists;  // key blocks of each query block
  int64_t batch = 0, heads = 0, num_q_blocks = 0, max_blocks = 0, num_kv_blocks = 0;
  uint64_t q_offsets = 0,
           q_indices =
               0;  // int32 [batch, heads, num_kv_blocks + 1], [batch, heads, num_q_blocks * max_blocks]
};

LaunchPlan plan_transpose_index(const TransposeIndexArguments& arguments);

}  // namespace vsa
