#pragma once

#include <cstdint>

namespace vsa {

// For every row (a query block of one head and batch entry) an ascending list of block numbers.
struct BlockLists {
  const int32_t* counts;  // [batch, heads, rows] by count_strides
  const int32_t*
      entries;  // [batch, heads, rows, max_blocks] by entry_strides, last dimension packed; null: all blocks
  int64_t count_strides[3];
  int64_t entry_strides[3];
  int32_t num_blocks;  // that a list may name

#ifdef __CUDACC__
  __device__ __forceinline__ int count(int batch, int head, int row) const {
    if (!entries) return num_blocks;
    return counts[batch * count_strides[0] + head * count_strides[1] + row * count_strides[2]];
  }
  __device__ __forceinline__ const int32_t* list(int batch, int head, int row) const {
    if (!entries) return nullptr;
    return entries + batch * entry_strides[0] + head * entry_strides[1] + row * entry_strides[2];
  }
#endif
};

}  // namespace vsa
