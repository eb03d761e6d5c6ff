// Matrix products of one warp (mma.sync), where wgmma does not fit.
#pragma once

#include "tiles/register_tile.cuh"

namespace vsa {

// d[16, 8] += a[16, 16] b[8, 16]^T. Fragments as in the PTX ISA, 9.7.14.5.8: a and d as in a register tile;
// of b, lane l has row l/4, columns 2(l%4), 2(l%4) + 1 and these plus 8.
template <class T>
VSA_DEVICE void mma_m16n8k16(float* d, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d = a b^T, where row(i, j) is row i + j of b in global memory (kK elements, 4-byte aligned), or null for
// zeros; i is a multiple of 8, j below 8. Slow; what it needs is computed here, and takes no register before.
template <class T, int kN, int kK, class Row>
VSA_DEVICE void mma_ABt_rows(FloatTile<kN>& d, SharedTile<T, 64, kK>& a, Row row) {
  zero(d);
  int lane = lane_id();
  forget(lane);
  int a_row = warp_in_warpgroup() * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < kN / 8; j++) {
    int b_row = lane / 4;
    forget(b_row);
    const T* from = row(8 * j, b_row);
#pragma unroll 1
    for (int k = 0; k < kK; k += 16) {
      uint32_t a_fragment[4], b_fragment[2] = {0, 0};
      load_fragment(a_fragment, a.chunk(a_row, k / 8 + lane / 16));
      if (from) {
        const T* element = from + k + 2 * (lane % 4);
        b_fragment[0] = __ldg(reinterpret_cast<const uint32_t*>(element));
        b_fragment[1] = __ldg(reinterpret_cast<const uint32_t*>(element + 8));
      }
      mma_m16n8k16<T>(d.data + 4 * j, a_fragment, b_fragment);
    }
  }
}

}  // namespace vsa
