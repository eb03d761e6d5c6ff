// Tiles of 64 rows spread over the registers of a warpgroup: fp32 accumulators and 16-bit matrix operands.
//
// Who holds what (wgmma's accumulator layout): warp w of the warpgroup holds rows 16w to 16w + 15; lane l
// holds, of each group of 8 columns j, the four elements
//     row 16w + l/4     : columns 8j + 2(l%4), 8j + 2(l%4) + 1     registers 4j,     4j + 1     half 0
//     row 16w + l/4 + 8 : the same columns                         registers 4j + 2, 4j + 3     half 1
// so a row lies in the 4 lanes of a quad, and a lane has two rows. An operand of 16 columns packs the same
// elements in pairs: {half 0, half 1} of its first 8 columns, then {half 0, half 1} of the last 8.
#pragma once

#include <cmath>

#include "tiles/shared_tile.cuh"

namespace vsa {

template <int kCols_>
struct FloatTile {
  static constexpr int kCols = kCols_;
  static constexpr int kRegisters = kCols / 2;
  float data[kRegisters];
};

template <class T_, int kCols_>
struct HalfTile {
  using T = T_;
  static constexpr int kCols = kCols_;
  static constexpr int kRegisters = kCols / 4;
  uint32_t data[kRegisters];
};

// One value for each of the two rows that a lane holds.
struct RowVector {
  float data[2];
};

VSA_DEVICE int warp_in_warpgroup() { return (threadIdx.x % kWarpgroupThreads) / kWarpThreads; }

// The row of this lane's `half`, and its first column in column group 0.
VSA_DEVICE int tile_row(int half) { return warp_in_warpgroup() * 16 + lane_id() / 4 + 8 * half; }
VSA_DEVICE int tile_column() { return 2 * (lane_id() % 4); }

template <int kCols>
VSA_DEVICE void zero(FloatTile<kCols>& tile) {
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) tile.data[i] = 0.0f;
}

template <int kCols>
VSA_DEVICE void fill(FloatTile<kCols>& tile, const RowVector& rows) {
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) tile.data[i] = rows.data[i / 2 % 2];
}

// result[row] = max over the row, in every lane of the row's quad.
template <int kCols>
VSA_DEVICE void row_max(RowVector& result, const FloatTile<kCols>& tile) {
  constexpr int kChains = 4;  // a row: enough that none waits for its last instruction
  float chains[2][kChains];
#pragma unroll
  for (int j = 0; j < kCols / 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& chain = chains[i / 2][2 * j % kChains + i % 2];
      float x = tile.data[4 * j + i];
      chain = 2 * j < kChains ? x : fmaxf(chain, x);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float x = fmaxf(fmaxf(chains[half][0], chains[half][1]), fmaxf(chains[half][2], chains[half][3]));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    result.data[half] = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
}

VSA_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

VSA_DEVICE uint32_t quad_or(uint32_t x) {
  x |= __shfl_xor_sync(0xffffffffu, x, 1);
  return x | __shfl_xor_sync(0xffffffffu, x, 2);
}

template <int kCols>
VSA_DEVICE void mul_row(FloatTile<kCols>& tile, const RowVector& factor) {
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) tile.data[i] *= factor.data[(i / 2) % 2];
}

// Bit c of masks[b] says whether column 64 b + c counts; elsewhere the tile becomes `value`. Masks are the
// same in the whole warp.
template <int kCols>
VSA_DEVICE void fill_masked(FloatTile<kCols>& tile, const uint64_t (&masks)[kCols / 64], float value) {
#pragma unroll
  for (int b = 0; b < kCols / 64; b++) {
    if (__all_sync(0xffffffffu, masks[b] == ~uint64_t(0))) continue;
    uint64_t mask = masks[b] >> tile_column();
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (!(mask >> (8 * j + i % 2) & 1)) tile.data[32 * b + 4 * j + i] = value;
      }
    }
  }
}

// Bit r of `mask` says whether row r counts; elsewhere the tile becomes `value`.
template <int kCols>
VSA_DEVICE void fill_rows(FloatTile<kCols>& tile, uint64_t mask, float value) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (mask >> tile_row(half) & 1) continue;
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) tile.data[4 * j + 2 * half] = tile.data[4 * j + 2 * half + 1] = value;
  }
}

// result = the columns of `tile` from first_column on, rounded to T, nearest even.
template <class T, int kCols, int kTileCols>
VSA_DEVICE void convert(HalfTile<T, kCols>& result, const FloatTile<kTileCols>& tile, int first_column = 0) {
#pragma unroll
  for (int i = 0; i < result.kRegisters; i++) {
    const float* pair = tile.data + first_column / 2 + 2 * i;
    result.data[i] = pack<T>(pair[0], pair[1]);
  }
}

// 2^x as the hardware approximates it (ex2.approx.ftz: 2 ulp; 2^-inf = 0). volatile: it stays on its side of
// a wait, so that exponentials run while a matrix product does.
VSA_DEVICE float exp2_approx(float x) {
  float y;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 rows by 16 columns as a matrix operand (ldmatrix); `chunk` is 8 columns of row l % 16 in lane l, the
// first ones in lanes 0 to 15, the last ones in lanes 16 to 31.
VSA_DEVICE void load_fragment(uint32_t* result, const void* chunk) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(chunk))
               : "memory");
}

// The 64 rows of a shared tile as a matrix operand; each warp reads its own 16 rows.
template <class T, int kCols>
VSA_DEVICE void load(HalfTile<T, kCols>& tile, SharedTile<T, 64, kCols>& source) {
  int row = warp_in_warpgroup() * 16 + lane_id() % 16;
#pragma unroll
  for (int k = 0; k < kCols / 16; k++) {
    load_fragment(tile.data + 4 * k, source.chunk(row, 2 * k + lane_id() / 16));
  }
}

// The other way (stmatrix). Ordinary writes: fence_async_shared() before the copy engine or wgmma reads them.
template <class T>
VSA_DEVICE void store(SharedTile<T, 64, 64>& destination, const HalfTile<T, 64>& tile) {
  int row = warp_in_warpgroup() * 16 + lane_id() % 16;
  int first = shared_address(destination.chunk(row, lane_id() / 16));
  forget(first);  // one address in a register, not four
#pragma unroll
  for (int k = 0; k < 4; k++) {
    int address = first ^ 32 * k;  // chunk 2k instead of chunk 0: the swizzle is an exclusive or, too
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                 "r"(tile.data[4 * k]), "r"(tile.data[4 * k + 1]), "r"(tile.data[4 * k + 2]),
                 "r"(tile.data[4 * k + 3])
                 : "memory");
  }
}

// Of a 4 x 4 matrix, a column a lane of each quad, the transpose.
VSA_DEVICE void quad_transpose(uint32_t (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    bool upper = lane_id() & bit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + bit], bit);
      (upper ? x[i] : x[i + bit]) = received;
    }
  }
}

// The tile's two rows of this lane to rows of global memory (16-byte aligned; null: not written), rounded.
template <class T, int kCols>
VSA_DEVICE void store_rows(T* const (&rows)[2], const FloatTile<kCols>& tile) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int j = 0; j < kCols / 8; j += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = pack<T>(tile.data[4 * (j + i) + 2 * half], tile.data[4 * (j + i) + 2 * half + 1]);
      }
      quad_transpose(x);
      if (rows[half]) reinterpret_cast<uint4*>(rows[half])[j + lane_id() % 4] = {x[0], x[1], x[2], x[3]};
    }
  }
}

// Of a row of 16-bit values, what a lane holds of a tile's row: [j] is columns 8j + tile_column() and the
// next.
template <class T_, int kCols>
struct RowPairs {
  using T = T_;
  uint32_t data[kCols / 8];
};

// The other way: a row of this lane's quad, 16-byte aligned; null: zeros. All lanes of the warp.
template <class T, int kCols>
VSA_DEVICE void load_row(RowPairs<T, kCols>& pairs, const T* row) {
  constexpr int kChunks = kCols / 32;  // of 16 bytes, a lane
  uint4 chunks[kChunks];
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    chunks[k] = row ? __ldg(reinterpret_cast<const uint4*>(row) + 4 * k + lane_id() % 4) : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int k = 0; k < kChunks; k++) {
    uint32_t x[4] = {chunks[k].x, chunks[k].y, chunks[k].z, chunks[k].w};
    quad_transpose(x);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs.data[4 * k + i] = x[i];
  }
}

}  // namespace vsa
