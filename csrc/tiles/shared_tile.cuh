// A tile in shared memory as the copy engine lands it and as wgmma reads it: 128-byte swizzle.
#pragma once

#include "tiles/common.cuh"

namespace vsa {

// kRows x kCols 16-bit elements in kCols/64 panels, each kRows rows of 128 bytes. In a panel the 16-byte
// chunk c of row r lies at chunk c ^ (r % 8), which is what TMA's and wgmma's SWIZZLE_128B do when the panel
// starts at a multiple of 1024.
template <class T, int kRows_, int kCols_>
struct alignas(1024) SharedTile {
  static_assert(is_half_type<T> && kRows_ % 8 == 0 && kCols_ % 64 == 0);
  using Element = T;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanelCols = 64;
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kPanelCols * sizeof(T);
  static constexpr int kBytes = kPanels * kPanelBytes;

  T data[kRows * kCols];

  VSA_DEVICE T* panel(int i) { return data + i * kRows * kPanelCols; }
  VSA_DEVICE SharedTile<T, kRows, kPanelCols>& panel_tile(int i) {
    return *reinterpret_cast<SharedTile<T, kRows, kPanelCols>*>(panel(i));
  }

  // The 16-byte chunk that holds columns 8 * chunk to 8 * chunk + 7 of `row`; `chunk` counts over all panels.
  VSA_DEVICE uint4* chunk(int row, int chunk) {
    int in_panel = (chunk % 8) ^ (row % 8);
    return reinterpret_cast<uint4*>(panel(chunk / 8)) + row * 8 + in_panel;
  }
};

// Rows first_row to end_row - 1 become zero; all 32 lanes of a warp take part. Ordinary writes: the caller
// fences.
template <class Tile>
VSA_DEVICE void zero_rows(Tile& tile, int first_row, int end_row = Tile::kRows) {
  constexpr int kChunks = Tile::kCols / 8;
  int lane = lane_id();
  forget(lane);  // addresses take no register before they are needed
  for (int i = first_row * kChunks + lane; i < end_row * kChunks; i += kWarpThreads) {
    *tile.chunk(i / kChunks, i % kChunks) = uint4{0, 0, 0, 0};
  }
}

// The base of a tile as ldmatrix, stmatrix and wgmma descriptors take it.
VSA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace vsa
