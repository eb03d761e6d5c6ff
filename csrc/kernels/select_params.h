#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

struct SelectParams {
  CubeCoordinates query, key;  // of the maps of the same names
  int32_t* counts;             // [batch, heads, num_cubes]
  int32_t* indices;            // [batch, heads, num_cubes, topk]
  int32_t heads, num_cubes, topk;
  int32_t ctas_per_head, rows_per_cta;
  float scale;
};

// SMs of an H100 or H200.
constexpr int kSelectSms = 132;

// Scores are ordered as 32-bit keys, 8 bits a pass.
constexpr int kSelectPasses = 4;
constexpr int kSelectBins = 256;
constexpr int kSelectRowStateBytes = 12;

// Two warpgroups, one for each half of the keys, to a group of 64 query rows; and a producer warp.
constexpr int kSelectKeyHalves = 2;
constexpr int select_threads(int row_groups) { return row_groups * kSelectKeyHalves * 128 + 32; }

// Of the ring of each key half; what shared memory holds beside the bins of two row groups.
constexpr int select_stages(int row_groups, int head_dim) { return 512 / head_dim / row_groups; }

constexpr int select_shared_bytes(int row_groups, int head_dim) {
  int rows = row_groups * kCubeTokens;
  int stages = kSelectKeyHalves * select_stages(row_groups, head_dim);
  int barriers = 1 + kSelectPasses + 2 * stages;
  return round_up(rows * (kSelectBins * 4 + kSelectRowStateBytes) +
                      stages * kCubeTokens * head_dim * kHalfBytes + kSelectPasses * 4 +
                      barriers * kBarrierBytes,
                  kTileAlignment);
}

}  // namespace vsa
