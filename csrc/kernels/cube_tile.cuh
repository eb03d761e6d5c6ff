// A cube of tokens from global memory to a shared tile, one box of the copy engine a panel.
#pragma once

#include "kernels/cube_grid.h"
#include "tiles/shared_tile.cuh"
#include "tiles/tma.cuh"

namespace vsa {

// Which cube of which head of which batch entry.
struct CubeAddress {
  int batch, head;
  Extent3 origin;
};

struct NumberedCube {
  CubeAddress address;
  int cube;
};

// Number `index` of the cubes of all heads and batch entries: heads fastest, which lie side by side in
// memory.
VSA_DEVICE NumberedCube numbered_cube(const CubeGrid& grid, int heads, int index) {
  int row = index / heads, batch = row / grid.num_cubes(), cube = row - batch * grid.num_cubes();
  return {{batch, index - row * heads, grid.origin(cube)}, cube};
}

VSA_DEVICE void box_coordinates(int32_t (&result)[5], const CubeCoordinates& at, const CubeAddress& cube,
                                int panel) {
  result[0] = cube.head * at.head_in_columns + 64 * panel;
  result[1] = cube.origin.w;
  result[2] = cube.origin.h;
  result[3] = cube.origin.t;
  result[4] = cube.batch * at.batch_in_outer + cube.head * at.head_in_outer;
}

// One thread. Tokens outside the video arrive as zeros; `full` gets Tile::kBytes in every case.
template <class Tile>
VSA_DEVICE void load_cube(Tile& tile, const CUtensorMap& map, const CubeCoordinates& at,
                          const CubeAddress& cube, Barrier& full) {
  static_assert(Tile::kRows == kCubeTokens);
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; panel++) {
    int32_t coordinates[5];
    box_coordinates(coordinates, at, cube, panel);
    load_async(tile.panel(panel), map, coordinates, full);
  }
}

}  // namespace vsa
