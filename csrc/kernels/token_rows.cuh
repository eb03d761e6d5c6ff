// Rows of a cube of tokens between registers and global memory.
#pragma once

#include "kernels/cube_tile.cuh"
#include "kernels/token_rows.h"
#include "tiles/register_tile.cuh"

namespace vsa {

// A consumer's 64 rows to the tokens of its cube, rounded. Slots outside the video have no row.
template <class T, int kCols>
VSA_DEVICE void store_tokens(const FloatTile<kCols>& tile, const TokenRows& rows, const CubeGrid& grid,
                             const CubeAddress& cube) {
  T* row[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int64_t token = grid.token(cube.origin, tile_row(half));
    row[half] = token < 0 ? nullptr : static_cast<T*>(rows.at(cube.batch, token, cube.head));
  }
  store_rows<T>(row, tile);
}

}  // namespace vsa
