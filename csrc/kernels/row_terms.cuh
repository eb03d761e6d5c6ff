// What a query's row adds to its scores and to dP in the backward, -LSE / scale and -delta, as the product of
// a few more columns: then neither costs an instruction or a load of its own where rows lie across the lanes.
//
// Each number is three bf16 that sum to it exactly, in a row of 8 with the others; keys (or values) have -1
// in the columns of the one that is wanted, and 0 in the other's. Both operands lie without swizzle, 8 rows
// of 16 bytes together.
#pragma once

#include "kernels/cube_grid.h"
#include "tiles/wgmma.cuh"

namespace vsa {

struct RowTerms {
  uint4 rows[kCubeTokens];  // 8 bf16 each: LSE / scale in three, 0, delta in three, 0
};

// x in three bf16, two words.
VSA_DEVICE uint2 split_in_three(float x) {
  uint32_t first = __float_as_uint(x) & 0xffff0000u;
  float rest = x - __uint_as_float(first);
  uint32_t second = __float_as_uint(rest) & 0xffff0000u;
  uint32_t third = __float_as_uint(rest - __uint_as_float(second));
  return {first >> 16 | second, third >> 16};
}

// LSE is +inf in slots without a token, -inf in rows without a key: then a number so large that exp2 gives 0.
VSA_DEVICE uint4 row_terms(float lse_over_scale, float delta) {
  constexpr float kHuge = 3e38f;
  if (lse_over_scale == -INFINITY) lse_over_scale = INFINITY, delta = 0.0f;
  uint2 lse = split_in_three(lse_over_scale > kHuge ? kHuge : lse_over_scale);
  uint2 split_delta = split_in_three(delta);
  return {lse.x, lse.y, split_delta.x, split_delta.y};
}

// The keys' side: 8 equal rows of 8 columns, and as many of zeros behind them, as an instruction sums 16.
struct TermSelector {
  uint4 rows[16];

  // Threads 0 to 15; the caller fences. `word`: of the four pairs of columns, the first that counts.
  VSA_DEVICE void init(int thread, int word) {
    uint32_t columns[4] = {};
    constexpr uint32_t kMinusOne = 0xbf80;  // bf16
    if (thread < 8) {
      columns[word] = kMinusOne << 16 | kMinusOne;
      columns[word + 1] = kMinusOne;
    }
    rows[thread] = {columns[0], columns[1], columns[2], columns[3]};
  }
};

// d = -(what `selector` selects of the terms), a column a row of `terms`.
template <int kBlocks>
VSA_DEVICE void mma_terms(FloatTile<kBlocks * kCubeTokens>& d, TermSelector& selector,
                          RowTerms (&terms)[kBlocks]) {
  constexpr int kCore = 8 * sizeof(uint4);
  uint64_t a = plain_descriptor(&selector, kCore, 0), b = plain_descriptor(&terms, 0, kCore);
  mma_step<bf16, 0, 0>(d, a, b, false);
}

}  // namespace vsa
