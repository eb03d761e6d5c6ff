// Gates on the rows of an accumulator tile (VSA, equation 3: O = O_f * G_f + O_c * G_c).
#pragma once

#include "kernels/cube_grid.h"
#include "kernels/cube_tile.cuh"
#include "kernels/gate.h"
#include "tiles/register_tile.cuh"

namespace vsa {

// This lane's part of a token's row of a gate; ones where the gate is one number, zeros for no token (-1).
// All lanes of the warp.
template <class T, int kCols>
VSA_DEVICE void load_gate(RowPairs<T, kCols>& pairs, const Gate& gate, const CubeAddress& cube,
                          int64_t token) {
  if (!gate.values) {
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) pairs.data[j] = pack<T>(1.0f, 1.0f);
    return;
  }
  const T* row = nullptr;
  if (token >= 0) {
    row = static_cast<const T*>(gate.values) + cube.batch * gate.strides[0] + token * gate.strides[1] +
          cube.head * gate.strides[2];
  }
  if (gate.vector_rows) {
    load_row(pairs, row);
    return;
  }
  const auto* elements = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
  for (int j = 0; j < kCols / 8; j++) {
    const uint16_t* pair = elements + (8 * j + tile_column()) * gate.strides[3];
    pairs.data[j] = row ? __ldg(pair) | uint32_t(__ldg(pair + gate.strides[3])) << 16 : 0;
  }
}

VSA_DEVICE float gate_factor(const Gate& gate) {
  return gate.scalar ? gate.factor * __ldg(gate.scalar) : gate.factor;
}

// tile *= gate
template <class T, int kCols>
VSA_DEVICE void multiply_gate(FloatTile<kCols>& tile, const Gate& gate, const CubeGrid& grid,
                              const CubeAddress& cube) {
  float factor = gate_factor(gate);
  if (!gate.values) {
    if (factor != 1.0f) mul_row(tile, {factor, factor});
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    RowPairs<T, kCols> gates;
    load_gate(gates, gate, cube, grid.token(cube.origin, tile_row(half)));
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 g = unpack<T>(gates.data[j]);
      tile.data[4 * j + 2 * half] *= factor * g.x;
      tile.data[4 * j + 2 * half + 1] *= factor * g.y;
    }
  }
}

// The coarse stage's output of one head, `values` [cubes of `cubes`, head_dim]. A token takes the row of its
// cube: `own` where the fine stage runs on the same grid.
template <class T>
struct CoarseRows {
  const T* values;
  const CubeGrid& cubes;
  bool same_grid;
  int own;

  // Of a raster token, -1 for none; null for none.
  VSA_DEVICE const T* row(int64_t token, int head_dim) const {
    if (same_grid) return values + int64_t(own) * head_dim;
    return token < 0 ? nullptr : values + int64_t(cubes.cube_of(token)) * head_dim;
  }
};

// tile += coarse * gate
template <class T, int kCols>
VSA_DEVICE void add_gated_coarse(FloatTile<kCols>& tile, const CoarseRows<T>& coarse, const Gate& gate,
                                 const CubeGrid& grid, const CubeAddress& cube) {
  float factor = gate_factor(gate);
  if (coarse.same_grid && !gate.values) {  // one row for all tokens, as it is
    const T* row = coarse.row(0, kCols) + tile_column();
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 x = unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(row + 8 * j)));
#pragma unroll
      for (int i = 0; i < 4; i++) tile.data[4 * j + i] += factor * (i % 2 ? x.y : x.x);
    }
    return;
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int64_t token = grid.token(cube.origin, tile_row(half));
    RowPairs<T, kCols> rows, gates;
    load_row(rows, coarse.row(token, kCols));
    load_gate(gates, gate, cube, token);
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 x = unpack<T>(rows.data[j]), g = unpack<T>(gates.data[j]);
      tile.data[4 * j + 2 * half] += factor * g.x * x.x;
      tile.data[4 * j + 2 * half + 1] += factor * g.y * x.y;
    }
  }
}

}  // namespace vsa
