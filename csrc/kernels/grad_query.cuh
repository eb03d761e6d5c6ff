// What stands around the fused pass of the backward: sums of dQ begin at zero, and end as rows of dQ.
#pragma once

#include "kernels/fine_backward.cuh"
#include "kernels/row_terms.cuh"

namespace vsa {

// A CTA a query block of a head, the last one first: what is written last is in L2 when the pass begins, with
// the first blocks. Its sums become zero, and its rows' terms are left for the pass.
template <int kHeadDim>
VSA_DEVICE void start_grad_query(const FineBackwardParams& params) {
  if (!is_chosen(params.choice)) return;
  constexpr int kVectors = kCubeTokens * kHeadDim / 4;
  int64_t block = gridDim.x - 1 - blockIdx.x;
  auto* sums = reinterpret_cast<float4*>(params.grad_query_sums) + block * kVectors;
#pragma unroll
  for (int i = 0; i < kVectors; i += kGradQueryThreads) sums[i + threadIdx.x] = float4{0, 0, 0, 0};
  if (threadIdx.x < kCubeTokens) {
    int64_t row = block * kCubeTokens + threadIdx.x;
    float lse = __ldg(params.lse + row), delta = __ldg(params.delta + row);
    static_cast<uint4*>(params.row_terms)[row] = row_terms(lse / params.scale, delta);
  }
}

// A warpgroup a query block of a head, again the last one first, whose sums are in L2. Its registers are
// those of the consumers that made them.
template <int kHeadDim, class T>
VSA_DEVICE void finish_grad_query(const FineBackwardParams& params) {
  if (!is_chosen(params.choice)) return;
  constexpr int kWarpVectors = kGradQueryTile / 16;
  int blocks = params.q_grid.num_cubes();
  int index = gridDim.x - 1 - blockIdx.x, row = index / blocks, block = index - row * blocks;
  FloatTile<kHeadDim> sums;
#pragma unroll
  for (int panel = 0; panel < kHeadDim / 64; panel++) {
    int64_t tile = index * int64_t(kHeadDim / 64) + panel;
    auto* from = reinterpret_cast<const float4*>(params.grad_query_sums + tile * kGradQueryTile) +
                 warp_in_warpgroup() * kWarpVectors + lane_id();
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float4 x = __ldcs(from + j * kWarpThreads);
      float* to = sums.data + 32 * panel + 4 * j;
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
  }
  CubeAddress address{row / params.heads, row % params.heads, params.q_grid.origin(block)};
  store_grad_query<T>(sums, params, address, block);
}

}  // namespace vsa
