#pragma once

#include "kernels/cube_grid.h"
#include "kernels/gate.h"
#include "kernels/token_rows.h"

namespace vsa {

// What is absent is null. Gradients of tensor gates: [batch, tokens, heads, head_dim] packed, the input's
// type.
struct CombineBackwardParams {
  CubeGrid q_grid;
  CubeGrid coarse_grid;  // the cubes of `coarse`, which the CTAs walk; of the same tokens as q_grid
  TokenRows grad_out, out_fine;
  const int32_t* block_sizes;  // [num_q_blocks]
  const float* grad_lse;       // [batch, heads, num_q_blocks, 64] by grad_lse_strides
  int64_t grad_lse_strides[4];
  const void* coarse;  // [batch, heads, coarse cubes, head_dim], the input's type
  Gate gate_fine, gate_coarse;
  void* grad_fine;    // [batch, tokens, heads, head_dim] packed
  float* delta;       // [batch, heads, num_q_blocks, 64]
  void* grad_coarse;  // [batch, heads, coarse cubes, head_dim], the query's type
  void *grad_gate_fine, *grad_gate_coarse;
  // [batch, heads, coarse cubes], sums over a cube for gates of one number
  float *scalar_fine, *scalar_coarse;
  int32_t heads;
  bool same_grid;  // q_grid is coarse_grid
};

constexpr int kCombineRows = 4;  // of a cube, for each thread
constexpr int combine_threads(int head_dim) { return kCubeTokens * head_dim / 8 / kCombineRows; }
// Of an SM: 128 registers a thread.
constexpr int combine_ctas(int head_dim) { return 512 / combine_threads(head_dim); }

}  // namespace vsa
