#pragma once

#include <cstdint>

namespace vsa {

// [batch, tokens, heads, head_dim] of 16-bit elements, rows 16-byte aligned.
struct TokenRows {
  void* data;
  int64_t strides[3];  // elements: batch, token, head

#ifdef __CUDACC__
  __device__ __forceinline__ void* at(int64_t batch, int64_t token, int64_t head) const {
    int64_t offset = batch * strides[0] + token * strides[1] + head * strides[2];
    return static_cast<uint16_t*>(data) + offset;
  }
#endif
};

}  // namespace vsa
