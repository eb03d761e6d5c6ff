// What the selection kernels share: the rows of a CTA, the order of scores, and lists that need no scores.
#pragma once

#include "kernels/cube_tile.cuh"
#include "kernels/select_params.h"

namespace vsa {

struct SelectMaps {
  CUtensorMap query, key;
};

// The query rows of one CTA; `tiles` is how many tiles of keys there are.
struct SelectTask {
  int batch, head, first_row, rows, tiles;
  int64_t output_row;  // of counts and indices, where first_row goes
};

VSA_DEVICE SelectTask select_task(const SelectParams& params) {
  int head = blockIdx.x / params.ctas_per_head;
  int first = (blockIdx.x - head * params.ctas_per_head) * params.rows_per_cta;
  return {head / params.heads,
          head % params.heads,
          first,
          min(params.rows_per_cta, params.num_cubes - first),
          int(ceil_div(params.num_cubes, kCubeTokens)),
          int64_t(head) * params.num_cubes + first};
}

// The order of scores as an order of integers. The NaN that arithmetic gives is 0x7fffffff, which comes out
// largest; -inf gives -0x7f800000, so that kSelectNoKey is below every score.
constexpr int32_t kSelectNoKey = int32_t(0x80000000);

VSA_DEVICE int32_t select_key(float score) {
  int32_t bits = __float_as_int(score);
  int32_t sign = bits >> 31;
  return ((bits & 0x7fffffff) ^ sign) - sign;
}

// The `count` lowest bits of `mask`.
VSA_DEVICE uint64_t select_lowest(uint64_t mask, int count) {
#pragma unroll 1
  for (int extra = __popcll(mask) - count; extra > 0; extra--) mask ^= uint64_t(1) << (63 - __clzll(mask));
  return mask;
}

VSA_DEVICE void select_store_counts(const SelectParams& params, const SelectTask& task) {
  for (int i = threadIdx.x; i < task.rows; i += blockDim.x) {
    params.counts[task.output_row + i] = params.topk;
  }
}

// Every cube is selected: no scores.
VSA_DEVICE void select_all(const SelectParams& params, const SelectTask& task) {
  for (int row = warp_id(); row < task.rows; row += blockDim.x / kWarpThreads) {
    int32_t* indices = params.indices + (task.output_row + row) * params.topk;
    for (int i = lane_id(); i < params.topk; i += kWarpThreads) indices[i] = i;
  }
}

}  // namespace vsa
