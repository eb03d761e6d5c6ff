#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

constexpr int kPoolTensors = 3;  // query, key, value

struct PoolParams {
  CubeGrid grid;
  CubeCoordinates input[kPoolTensors];  // of maps.input
  void* output[kPoolTensors];           // [batch, heads, num_cubes, head_dim], the input's type
  int32_t batch, heads;
};

constexpr int kPoolCtasPerSm = 6;                              // that share its memory
constexpr int pool_threads(int head_dim) { return head_dim; }  // 8 threads for each 16-byte column of a row
constexpr int pool_stages(int head_dim) { return 256 / head_dim; }
constexpr int pool_shared_bytes(int head_dim) {
  return round_up(pool_stages(head_dim) * (kCubeTokens * head_dim * kHalfBytes + kBarrierBytes),
                  kTileAlignment);
}

}  // namespace vsa
