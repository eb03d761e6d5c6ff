#pragma once

#include <cstdint>

namespace vsa {

// A factor on an attention output: `values` [batch, tokens, heads, head_dim] by strides, of the query's type,
// times `factor`; or one fp32 number `scalar` in device memory, times `factor`; or `factor` alone where both
// are null.
struct Gate {
  const void* values;
  const float* scalar;
  float factor;
  bool vector_rows;  // rows of `values` can be read 16 bytes at a time
  int64_t strides[4];
};

}  // namespace vsa
