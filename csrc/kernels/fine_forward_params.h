#pragma once

#include "kernels/cube_grid.h"
#include "kernels/gate.h"
#include "kernels/schedule.h"
#include "kernels/task_queue.h"
#include "kernels/tile_ring.h"
#include "kernels/token_rows.h"

namespace vsa {

struct FineForwardParams {
  CubeGrid q_grid, kv_grid;
  CubeGrid coarse_grid;               // the cubes of `coarse`; of the same tokens as q_grid
  CubeCoordinates query, key, value;  // of the maps of the same names
  TokenRows out, out_fine;
  TokenRows key_rows;            // as the map of keys has them
  Schedule schedule;             // of fine_forward_consumers, stages of two key blocks
  const int32_t* block_sizes;    // [num_kv_blocks] valid prefix, or null: all of each cube
  const int32_t* q_block_sizes;  // [num_q_blocks], likewise
  float* lse;                    // [batch, heads, num_q_blocks, 64], natural log
  const void* coarse;            // [batch, heads, coarse cubes, head_dim], the query's type, or null
  Gate gate_fine, gate_coarse;
  bool same_grid;       // q_grid is coarse_grid
  bool combine;         // out = out_fine * gate_fine + coarse * gate_coarse; else out = out_fine
  bool store_out_fine;  // only with `combine`
  float scale_log2;     // the scale, above 0, times log2(e)
  int32_t heads;
  int32_t groups;      // of query cubes in a head; even for CTAs in pairs, the last one perhaps empty
  int32_t* next_task;  // 0; null: tasks of equal length, which go round the CTAs
  int32_t num_tasks;
};

// One consumer warpgroup a query cube, as many as have registers; a stage holds the keys or the values of two
// cubes.
constexpr int kForwardStageBlocks = 2;
constexpr int fine_forward_consumers(int head_dim) { return head_dim == 128 ? 2 : 3; }
constexpr int fine_forward_threads(int head_dim) { return (fine_forward_consumers(head_dim) + 1) * 128; }
constexpr int fine_forward_stages(int head_dim) { return head_dim == 128 ? 3 : 6; }
constexpr int kValidRowsBytes = 16;  // masks beside the keys of a stage
constexpr int fine_forward_shared_bytes(int head_dim) {
  int tile = kCubeTokens * head_dim * kHalfBytes, stages = fine_forward_stages(head_dim);
  int consumers = fine_forward_consumers(head_dim);
  int keys = tile_ring_bytes(kForwardStageBlocks * tile, stages, kValidRowsBytes);
  int values = tile_ring_bytes(kForwardStageBlocks * tile, stages, 0);
  return round_up(consumers * (tile + 2 * kBarrierBytes) + kTaskQueueBytes + keys + values, kTileAlignment);
}

}  // namespace vsa
