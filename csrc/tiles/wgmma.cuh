// Matrix products on the tensor cores, one warpgroup at a time (wgmma, PTX ISA 9.7.15). All are asynchronous:
//
//   mma_fence();  mma_ABt(scores, q, k, false);  mma_commit();  ...  mma_wait<0>(scores);
//
// Between the fence and the wait nobody touches the accumulators, nor the registers of an A operand.
#pragma once

#include "tiles/register_tile.cuh"

namespace vsa {

// Registers written before become visible to the products that follow.
VSA_DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

VSA_DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving uses of a tile over the place where this stands.
template <int kCols>
VSA_DEVICE void pin(FloatTile<kCols>& tile) {
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) asm volatile("" : "+f"(tile.data[i])::"memory");
}

template <class T, int kCols>
VSA_DEVICE void pin(HalfTile<T, kCols>& tile) {
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) asm volatile("" : "+r"(tile.data[i])::"memory");
}

// Until at most kPending committed groups are unfinished. `tiles` are those that this makes ready: results to
// read, operands to overwrite.
template <int kPending, class... Tiles>
VSA_DEVICE void mma_wait(Tiles&... tiles) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin(tiles), ...);
}

// Keeps what made `bits` above a later mma_wait: ptxas would move the wait up, over arithmetic that is meant
// to run beside the products, but moves none over a store. The store is for bits == `never`.
VSA_DEVICE void keep_above_wait(uint32_t bits, uint32_t never) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.eq.u32 p, %0, %1;\n"
      "@p st.shared.u32 [%2], %0;\n"
      "}\n" ::"r"(bits),
      "r"(never), "r"(0)
      : "memory");
}

// The same for a tile of numbers that are not negative.
template <int kCols>
VSA_DEVICE void keep_above_wait(const FloatTile<kCols>& tile) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < tile.kRegisters; i++) bits |= __float_as_uint(tile.data[i]);
  keep_above_wait(bits, 0xffffffffu);
}

// The instruction takes the element type as text ("C" constraint: CUDA's inline assembly guide).
template <class T>
struct ElementName;
template <>
struct ElementName<bf16> {
  static constexpr char kText[] = "bf16";
};
template <>
struct ElementName<fp16> {
  static constexpr char kText[] = "f16";
};

// Operand lists cannot be written by a template: the one macro of the tile layer.
#define VSA_ACCUMULATORS(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),           \
      "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9]), "+f"(d[i + 10]), "+f"(d[i + 11]), \
      "+f"(d[i + 12]), "+f"(d[i + 13]), "+f"(d[i + 14]), "+f"(d[i + 15])

// d[64, N] (+)= a[64, 16] b[16, N]; operands by descriptor, or a in registers. kTranspose: the operand lies
// with its rows (of a) or columns (of b) contiguous.
template <class T, int kTransposeA, int kTransposeB>
VSA_DEVICE void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.%37.%37 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, %35, %36;\n"
      "}\n"
      : VSA_ACCUMULATORS(d, 0), VSA_ACCUMULATORS(d, 16)
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeA), "n"(kTransposeB), "C"(ElementName<T>::kText));
}

template <class T, int kTransposeB>
VSA_DEVICE void wgmma_m64n64k16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.%39.%39 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n"
      "}\n"
      : VSA_ACCUMULATORS(d, 0), VSA_ACCUMULATORS(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kTransposeB),
        "C"(ElementName<T>::kText));
}

template <class T, int kTransposeA, int kTransposeB>
VSA_DEVICE void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.%69.%69 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %67, %68;\n"
      "}\n"
      : VSA_ACCUMULATORS(d, 0), VSA_ACCUMULATORS(d, 16), VSA_ACCUMULATORS(d, 32), VSA_ACCUMULATORS(d, 48)
      : "l"(a), "l"(b), "r"(int(accumulate)), "n"(kTransposeA), "n"(kTransposeB), "C"(ElementName<T>::kText));
}

template <class T, int kTransposeB>
VSA_DEVICE void wgmma_m64n128k16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.%71.%71 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, "
      "%40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, "
      "%56, %57, %58, %59, %60, %61, %62, %63}, "
      "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n"
      "}\n"
      : VSA_ACCUMULATORS(d, 0), VSA_ACCUMULATORS(d, 16), VSA_ACCUMULATORS(d, 32), VSA_ACCUMULATORS(d, 48)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(kTransposeB),
        "C"(ElementName<T>::kText));
}

#undef VSA_ACCUMULATORS

// Matrix descriptor of a 128-byte-swizzled tile (PTX ISA 9.7.15.5.1): start address, leading and stride byte
// offsets in units of 16 bytes, swizzle mode 1 in bits 62 and 63. Stride: from one group of 8 rows to the
// next. Leading: from one 64-column panel to the next where the columns are not the summed dimension, else
// unused.
VSA_DEVICE uint64_t descriptor(const void* start, uint32_t leading_bytes) {
  constexpr uint64_t kStrideBytes = 1024;
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4) << 16 |
         (kStrideBytes >> 4) << 32 | uint64_t(1) << 62;
}

// The same without swizzle, the summed dimension contiguous: 8 rows of 16 bytes lie together, `leading_bytes`
// from one such core to the next 8 columns, `stride_bytes` to the next 8 rows.
VSA_DEVICE uint64_t plain_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes) {
  return uint64_t(shared_address(start) >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4) << 16 |
         uint64_t(stride_bytes >> 4) << 32;
}

// A descriptor `bytes` further on; shared addresses stay below 2^18, so that nothing carries into the next
// field.
VSA_DEVICE uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Where 16 columns, number `step`, of a tile that is summed over its columns begin.
template <class Tile>
constexpr int columns_offset(int step) {
  return step / 4 * Tile::kPanelBytes + step % 4 * 16 * sizeof(typename Tile::Element);
}

// Where 16 rows, number `step`, begin in a tile that is summed over its rows.
template <class Tile>
constexpr int rows_offset(int step) {
  return step * 16 * Tile::kPanelCols * sizeof(typename Tile::Element);
}

template <class Tile>
VSA_DEVICE uint64_t descriptor(Tile& tile) {
  return descriptor(tile.data, Tile::kPanelBytes);
}

template <class T, int kTransposeA, int kTransposeB, int kCols>
VSA_DEVICE void mma_step(FloatTile<kCols>& d, uint64_t a, uint64_t b, bool accumulate) {
  if constexpr (kCols == 64) {
    wgmma_m64n64k16<T, kTransposeA, kTransposeB>(d.data, a, b, accumulate);
  } else {
    static_assert(kCols == 128);
    wgmma_m64n128k16<T, kTransposeA, kTransposeB>(d.data, a, b, accumulate);
  }
}

template <class T, int kTransposeB, int kCols>
VSA_DEVICE void mma_step(FloatTile<kCols>& d, const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  if constexpr (kCols == 64) {
    wgmma_m64n64k16<T, kTransposeB>(d.data, a, b, accumulate);
  } else {
    static_assert(kCols == 128);
    wgmma_m64n128k16<T, kTransposeB>(d.data, a, b, accumulate);
  }
}

// The 16 columns, number `step`, of an operand in registers.
template <class T, int kCols>
VSA_DEVICE void fragment(uint32_t (&result)[4], const HalfTile<T, kCols>& tile, int step) {
#pragma unroll
  for (int i = 0; i < 4; i++) result[i] = tile.data[4 * step + i];
}

// d[64, N] = a[64, K] b[N, K]^T, added to d if `accumulate`.
template <class T, int kN, int kK>
VSA_DEVICE void mma_ABt(FloatTile<kN>& d, SharedTile<T, 64, kK>& a, SharedTile<T, kN, kK>& b,
                        bool accumulate) {
  uint64_t a_start = descriptor(a), b_start = descriptor(b);
#pragma unroll
  for (int k = 0; k < kK / 16; k++) {
    mma_step<T, 0, 0>(d, advance(a_start, columns_offset<SharedTile<T, 64, kK>>(k)),
                      advance(b_start, columns_offset<SharedTile<T, kN, kK>>(k)), accumulate || k > 0);
  }
}

template <class T, int kN, int kK>
VSA_DEVICE void mma_ABt(FloatTile<kN>& d, const HalfTile<T, kK>& a, SharedTile<T, kN, kK>& b,
                        bool accumulate) {
  uint64_t b_start = descriptor(b);
#pragma unroll
  for (int k = 0; k < kK / 16; k++) {
    uint32_t a_fragment[4];
    fragment(a_fragment, a, k);
    mma_step<T, 0>(d, a_fragment, advance(b_start, columns_offset<SharedTile<T, kN, kK>>(k)),
                   accumulate || k > 0);
  }
}

// d[64, N] = a[64, K] b[K, N], added to d if `accumulate`; of b, K rows from first_row on.
template <class T, int kN, int kK, int kRows>
VSA_DEVICE void mma_AB(FloatTile<kN>& d, const HalfTile<T, kK>& a, SharedTile<T, kRows, kN>& b,
                       bool accumulate, int first_row = 0) {
  uint64_t b_start = descriptor(b);
#pragma unroll
  for (int k = 0; k < kK / 16; k++) {
    uint32_t a_fragment[4];
    fragment(a_fragment, a, k);
    mma_step<T, 1>(d, a_fragment, advance(b_start, rows_offset<SharedTile<T, kRows, kN>>(first_row / 16 + k)),
                   accumulate || k > 0);
  }
}

template <class T, int kN, int kK>
VSA_DEVICE void mma_AB(FloatTile<kN>& d, SharedTile<T, 64, kK>& a, SharedTile<T, kK, kN>& b,
                       bool accumulate) {
  uint64_t a_start = descriptor(a), b_start = descriptor(b);
#pragma unroll
  for (int k = 0; k < kK / 16; k++) {
    mma_step<T, 0, 1>(d, advance(a_start, columns_offset<SharedTile<T, 64, kK>>(k)),
                      advance(b_start, rows_offset<SharedTile<T, kK, kN>>(k)), accumulate || k > 0);
  }
}

// d[64, N] = a[K, 64]^T b[K, N], added to d if `accumulate`.
template <class T, int kN, int kK>
VSA_DEVICE void mma_AtB(FloatTile<kN>& d, SharedTile<T, kK, 64>& a, SharedTile<T, kK, kN>& b,
                        bool accumulate) {
  uint64_t a_start = descriptor(a), b_start = descriptor(b);
#pragma unroll
  for (int k = 0; k < kK / 16; k++) {
    mma_step<T, 1, 1>(d, advance(a_start, rows_offset<SharedTile<T, kK, 64>>(k)),
                      advance(b_start, rows_offset<SharedTile<T, kK, kN>>(k)), accumulate || k > 0);
  }
}

}  // namespace vsa
