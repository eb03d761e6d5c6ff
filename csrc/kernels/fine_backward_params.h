#pragma once

#include "kernels/cube_grid.h"
#include "kernels/schedule.h"
#include "kernels/task_queue.h"
#include "kernels/tile_ring.h"
#include "kernels/token_rows.h"

namespace vsa {

// Whether a kernel runs at all: with `ends`, if all pairs of blocks are listed, or unless they are. Then the
// device chooses between two ways to the same gradients, of which both are launched.
struct PassChoice {
  const int32_t* ends;  // [rows], row_stride apart: the entries of a head's compressed lists; null: it runs
  int64_t row_stride;
  int32_t rows;  // batch * heads
  int32_t all;   // entries where every query block has every key block
  bool if_all;   // it runs if they are there; else it runs unless they are
};

// All passes. What is absent is null.
struct FineBackwardParams {
  CubeGrid q_grid, kv_grid;
  CubeCoordinates query, key, value, grad_out;  // of the maps of the same names
  TokenRows grad_query, grad_key, grad_value;
  Schedule schedule;                           // of the pass
  const int32_t *block_sizes, *q_block_sizes;  // [num_kv_blocks], [num_q_blocks] valid prefix
  const float *lse, *delta;  // [batch, heads, num_q_blocks, 64], for what leaves the row terms
  // [batch, heads, num_q_blocks, 64] of kRowTermsBytes, which the query pass, or start_grad_query, leaves for
  // the pass after it.
  void* row_terms;
  // kThinTokens rows that count for nothing, for the thin cubes that a stage lacks. Not null: the pass that
  // keeps keys reads terms of thin cubes in the order of thin_slot.
  void* no_terms;
  // dQ's sums [batch, heads, num_q_blocks, head_dim / 64, kGradQueryTile], of the fused pass and the kernels
  // around it.
  float* grad_query_sums;
  bool adds_directly;  // from registers; else by the copy engine
  // [batch, heads, cubes of pooled_grid, head_dim], the query's type; what writes dQ takes the first, what
  // writes dK and dV the others.
  const void *dq_pooled, *dk_pooled, *dv_pooled;
  CubeGrid pooled_grid;     // of the same tokens as the grid of the pass
  bool pooled_on_own_grid;  // pooled_grid is the grid of the pass
  float scale, scale_log2;  // scale_log2 = scale * log2(e)
  PassChoice choice;
  int32_t heads;
  int32_t groups;      // of cubes in a head, a task each
  int32_t* next_task;  // 0; null: tasks of equal length, which go round the CTAs
  int32_t num_tasks;   // groups of the pass's cubes, over all heads and batch entries
};

// Of all passes: two consumer warpgroups, a cube each, which keep two tiles of it (key side: K, V; query
// side: Q, dO), and two rings (Q, dO; or K, V).
constexpr int kBackwardConsumers = 2;
constexpr int kBackwardThreads = (kBackwardConsumers + 1) * 128;
constexpr int kBackwardQStageBlocks = 2;
constexpr int fine_backward_kv_stage_blocks(int head_dim) { return head_dim == 128 ? 1 : 2; }

struct BackwardStages {
  int first, second;  // of the two rings
};
constexpr BackwardStages fine_backward_q_stages(int head_dim) {
  return head_dim == 128 ? BackwardStages{3, 2} : BackwardStages{6, 6};
}
constexpr BackwardStages fine_backward_kv_stages(int head_dim) {
  return head_dim == 128 ? BackwardStages{5, 4} : BackwardStages{6, 5};
}

constexpr bool fine_backward_fused_takes_lists(int head_dim) { return head_dim == 64; }
constexpr BackwardStages fine_backward_fused_stages(int head_dim) {
  return head_dim == 128 ? BackwardStages{3, 3} : BackwardStages{4, 3};
}

// `extra_bytes` beside a block of the first ring, `own_bytes` of the pass.
constexpr int fine_backward_shared_bytes(int head_dim, int stage_blocks, BackwardStages stages,
                                         int extra_bytes, int own_bytes) {
  int tile = kCubeTokens * head_dim * kHalfBytes;
  return round_up(kBackwardConsumers * (2 * tile + 2 * kBarrierBytes) + kBarrierBytes + kTaskQueueBytes +
                      round_up(own_bytes, kTileAlignment) +
                      tile_ring_bytes(stage_blocks * tile, stages.first, stage_blocks * extra_bytes) +
                      tile_ring_bytes(stage_blocks * tile, stages.second, 0),
                  kTileAlignment);
}
constexpr int kValidMaskBytes = 8;  // of a key block
constexpr int kRowTermsBytes = 16;  // of a query
constexpr int kTermSelectorsBytes = 2 * 256;
constexpr int fine_backward_q_shared_bytes(int head_dim) {
  return fine_backward_shared_bytes(head_dim, kBackwardQStageBlocks, fine_backward_q_stages(head_dim),
                                    kValidMaskBytes, 0);
}
constexpr int fine_backward_kv_shared_bytes(int head_dim) {
  return fine_backward_shared_bytes(head_dim, fine_backward_kv_stage_blocks(head_dim),
                                    fine_backward_kv_stages(head_dim), kCubeTokens * kRowTermsBytes,
                                    kTermSelectorsBytes);
}

// Of the fused pass: a consumer's dS of a stage, and a 64 x 64 tile of what it adds to dQ.
constexpr int kGradQueryTile = kCubeTokens * 64;  // fp32, in the order of a consumer's registers
constexpr int kGradQueryThreads = 128;            // of the kernels before and after it
constexpr int kListedBlocksBytes = 16;            // of a stage
constexpr int fine_backward_fused_shared_bytes(int head_dim) {
  int blocks = fine_backward_kv_stage_blocks(head_dim);
  int own = blocks * kCubeTokens * 64 * kHalfBytes + kGradQueryTile * 4;
  return fine_backward_shared_bytes(head_dim, blocks, fine_backward_fused_stages(head_dim),
                                    kCubeTokens * kRowTermsBytes + kListedBlocksBytes / blocks,
                                    round_up(kTermSelectorsBytes, kTileAlignment) + kBackwardConsumers * own);
}

}  // namespace vsa
