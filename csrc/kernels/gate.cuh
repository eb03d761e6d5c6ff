// Gates on the rows of an accumulator tile (VSA, equation 3: O = O_f * G_f + O_c * G_c).
#pragma once

#include "kernels/cube_grid.h"
#include "kernels/cube_tile.cuh"
#include "kernels/gate.h"
#include "tiles/register_tile.cuh"

namespace vsa {

// Two neighbouring columns of a 16-bit row, `stride` elements apart.
template <class T>
VSA_DEVICE float2 load_pair(const T* row, int column, int64_t stride) {
  return {to_float(row[column * stride]), to_float(row[(column + 1) * stride])};
}

// This lane's row of a gate's values for `half`, or null where the slot is no real token or the gate is one
// number.
template <class T>
VSA_DEVICE const T* gate_row(const Gate& gate, const CubeGrid& grid, const CubeAddress& cube, uint64_t valid,
                             int half) {
  if (!gate.values || !(valid >> tile_row(half) & 1)) return nullptr;
  int64_t token = grid.token(cube.origin, tile_row(half));
  return static_cast<const T*>(gate.values) + cube.batch * gate.strides[0] + token * gate.strides[1] +
         cube.head * gate.strides[2];
}

VSA_DEVICE float gate_factor(const Gate& gate) {
  return gate.scalar ? gate.factor * __ldg(gate.scalar) : gate.factor;
}

// tile *= gate
template <class T, int kCols>
VSA_DEVICE void multiply_gate(FloatTile<kCols>& tile, const Gate& gate, const CubeGrid& grid,
                              const CubeAddress& cube, uint64_t valid) {
  float factor = gate_factor(gate);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const T* row = gate_row<T>(gate, grid, cube, valid, half);
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 g = row ? load_pair(row, 8 * j + tile_column(), gate.strides[3]) : float2{1.0f, 1.0f};
      tile.data[4 * j + 2 * half] *= factor * g.x;
      tile.data[4 * j + 2 * half + 1] *= factor * g.y;
    }
  }
}

// tile += coarse * gate on real rows; coarse [cubes of coarse_grid, kCols], a token takes its cube's row.
template <class T, int kCols>
VSA_DEVICE void add_gated_coarse(FloatTile<kCols>& tile, const T* coarse, const CubeGrid& coarse_grid,
                                 const Gate& gate, const CubeGrid& grid, const CubeAddress& cube,
                                 uint64_t valid) {
  float factor = gate_factor(gate);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (!(valid >> tile_row(half) & 1)) continue;
    const T* row = gate_row<T>(gate, grid, cube, valid, half);
    const T* values = coarse + int64_t(coarse_grid.cube_of(grid.token(cube.origin, tile_row(half)))) * kCols;
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 g = row ? load_pair(row, 8 * j + tile_column(), gate.strides[3]) : float2{1.0f, 1.0f};
      float2 x = unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(values + 8 * j + tile_column())));
      tile.data[4 * j + 2 * half] += factor * g.x * x.x;
      tile.data[4 * j + 2 * half + 1] += factor * g.y * x.y;
    }
  }
}

}  // namespace vsa
