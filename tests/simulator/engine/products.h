// Matrix products of 16 rows by 8 columns by 16, in the registers' own order (PTX ISA 9.7.14.5, 9.7.15.5.1).
#pragma once

#include "common.h"

namespace sim {

// Operand A of one warp, spread over the lanes that need each value: [upper 8 rows][k][lane].
struct LanesA {
  alignas(64) float value[2][16][kLanes];
};
// Operand B of 8 columns: [odd column][k][lane].
struct LanesB {
  alignas(64) float value[2][16][kLanes];
};

// Row of a lane in its half, and its even column.
inline int row_of(int lane) { return lane / 4; }
inline int column_of(int lane) { return lane % 4 * 2; }

// accumulators[2 * upper + odd]: 32 lanes each; accumulate: add to them, else replace them.
void multiply(const LanesA& a, const LanesB& b, float* const accumulators[4], bool accumulate);

}  // namespace sim
