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

// select.cuh, for any number of cubes.

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

// select_small.cuh, for few cubes. Of a row's keys a lane searches 32, so that 16 or 32 lanes share the row.
constexpr int kSelectLaneKeys = 32;
constexpr int kSelectSmallCubes = 32 * kSelectLaneKeys;
constexpr int select_small_lanes(int cubes) { return cubes > 16 * kSelectLaneKeys ? 32 : 16; }

// Up to 384 cubes are one tile of keys for each warpgroup.
constexpr int kSelectSmallWarpgroups = 6;
constexpr int kSelectSmallThreads = kSelectSmallWarpgroups * 128;

// At most so many rows a CTA: a warp searches once.
constexpr int select_small_rows(int cubes) { return kSelectSmallThreads / select_small_lanes(cubes); }
constexpr int kSelectSmallMostRows = select_small_rows(1);

// Of the ring of key tiles of each warpgroup.
constexpr int select_small_stages(int head_dim) { return 128 / head_dim; }

// Query tile, key tiles and barriers.
constexpr int select_small_tile_bytes(int head_dim) {
  int tiles = 1 + kSelectSmallWarpgroups * select_small_stages(head_dim);
  return round_up(tiles * (kCubeTokens * head_dim * kHalfBytes + kBarrierBytes), kTileAlignment);
}

// Scores are stored in whole tiles along the keys, along the rows 8 at a time.
constexpr int kSelectScoreRows = 8;
constexpr int select_small_row_words(int cubes) { return round_up(cubes, kCubeTokens); }

constexpr int select_small_shared_bytes(int head_dim, int cubes, int rows) {
  return select_small_tile_bytes(head_dim) +
         round_up(rows, kSelectScoreRows) * select_small_row_words(cubes) * int(sizeof(uint32_t));
}

}  // namespace vsa
