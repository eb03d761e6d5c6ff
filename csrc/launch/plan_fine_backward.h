#pragma once

#include "launch/plan_schedule.h"

namespace vsa {

// Of all passes; each uses what it needs. Addresses: 0 where absent.
struct FineBackwardArguments {
  TokenTensor query, key, value, grad_out;
  TokenTensor grad_query, grad_key, grad_value;
  CubeGrid q_grid, kv_grid;
  Schedule kv_schedule{}, q_schedule{};         // made for either pass
  uint64_t block_sizes = 0, q_block_sizes = 0;  // int32 [blocks]
  uint64_t lse = 0, delta = 0;                  // fp32 [batch, heads, num_q_blocks, 64] packed
  // 16 bytes [batch * heads * num_q_blocks + 1, 64], which what is launched first writes.
  uint64_t row_terms = 0;
  uint64_t grad_query_sums = 0;  // fp32 [batch, heads, num_q_blocks, 64, head_dim], of the fused pass
  bool adds_directly = false;    // to these, where lists are such that key blocks share few query blocks
  // int32 [batch, heads, num_kv_blocks + 1] of transpose_index. Then the fused pass and its neighbours, and
  // the query pass without a schedule, run only if all pairs of blocks are listed, the two passes with
  // schedules only if not. 0: what is launched runs.
  uint64_t choose_by = 0;
  // [batch, heads, cubes, head_dim] packed, the query's type
  uint64_t dq_pooled = 0, dk_pooled = 0, dv_pooled = 0;
  CubeGrid pooled_q_grid, pooled_kv_grid;  // their cubes; of q_grid's and kv_grid's tokens
  double scale = 1.0;
  int num_sms = 1;  // of the device
};

// Two passes, in this order: dQ, then dK and dV.
LaunchPlan plan_fine_backward_q(const FineBackwardArguments& arguments);
LaunchPlan plan_fine_backward_kv(const FineBackwardArguments& arguments);

// Or one pass, with what stands before and after it.
LaunchPlan plan_start_grad_query(const FineBackwardArguments& arguments);
LaunchPlan plan_fine_backward_fused(const FineBackwardArguments& arguments);
LaunchPlan plan_finish_grad_query(const FineBackwardArguments& arguments);

}  // namespace vsa
