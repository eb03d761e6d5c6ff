#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

// What is absent is null.
struct DeltaParams {
  CubeGrid grid;
  CubeCoordinates grad_out, out;  // of the maps of the same names
  const int32_t* block_sizes;     // [num_cubes] valid prefix
  const float* grad_lse;          // [batch, heads, num_cubes, 64] by grad_lse_strides
  int64_t grad_lse_strides[4];
  float* delta;  // [batch, heads, num_cubes, 64]
  int32_t batch, heads;
};

constexpr int kDeltaThreads = 2 * kCubeTokens;  // two a row
constexpr int kDeltaStages = 2;
constexpr int delta_ctas_per_sm(int head_dim) { return 384 / head_dim; }  // that share its memory
constexpr int delta_shared_bytes(int head_dim) {
  return round_up(kDeltaStages * (2 * kCubeTokens * head_dim * kHalfBytes + kBarrierBytes), kTileAlignment);
}

}  // namespace vsa
