// Backward of the combination out = fine * gate_fine + coarse[cube] * gate_coarse (VSA, equation 3), and the
// row term of the fine stage's softmax gradient, in one pass over the tokens.
//
// A CTA takes one coarse cube of one head (heads fastest: they lie side by side in memory), a thread 8
// columns of kCombineRows tokens. All loads are issued before the first use: up to 4 tensors * 4 rows * 16
// bytes in flight for each thread. Bound by memory. Slots that hold no token are neither read nor add to a
// sum; tokens among them get zeros. Rows of the fine stage (delta, the LSE's gradient) lie by the query grid,
// which may be another one.
#pragma once

#include "kernels/combine_backward_params.h"
#include "kernels/gate.cuh"

namespace vsa {

struct Eight {
  float data[8];
};

template <class T>
VSA_DEVICE Eight unpack_eight(uint4 packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  Eight result;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 pair = unpack<T>(words[i]);
    result.data[2 * i] = pair.x;
    result.data[2 * i + 1] = pair.y;
  }
  return result;
}

template <class T>
VSA_DEVICE uint4 pack_eight(const Eight& x) {
  return {pack<T>(x.data[0], x.data[1]), pack<T>(x.data[2], x.data[3]), pack<T>(x.data[4], x.data[5]),
          pack<T>(x.data[6], x.data[7])};
}

template <class T>
VSA_DEVICE uint4 load_eight(const T* values, int64_t stride, bool vector) {
  if (vector) return __ldg(reinterpret_cast<const uint4*>(values));
  uint16_t elements[8];
#pragma unroll
  for (int i = 0; i < 8; i++) elements[i] = __ldg(reinterpret_cast<const uint16_t*>(values) + i * stride);
  return reinterpret_cast<uint4&>(elements);
}

// What a thread does with its 8 columns: addresses in tensors of tokens.
struct CombineColumns {
  int batch, head, column;

  template <class T>
  VSA_DEVICE uint4 load(const TokenRows& rows, int64_t token) const {
    const T* row = static_cast<const T*>(rows.data) + batch * rows.strides[0] + token * rows.strides[1] +
                   head * rows.strides[2];
    return __ldg(reinterpret_cast<const uint4*>(row + column));
  }

  template <class T>
  VSA_DEVICE uint4 load(const Gate& gate, int64_t token) const {
    const T* row = static_cast<const T*>(gate.values) + batch * gate.strides[0] + token * gate.strides[1] +
                   head * gate.strides[2];
    return load_eight(row + column * gate.strides[3], gate.strides[3], gate.vector_rows);
  }

  // Into a packed tensor.
  template <class T>
  VSA_DEVICE void store(void* tensor, const CombineBackwardParams& params, int head_dim, int64_t token,
                        const Eight& values) const {
    int64_t row = (batch * params.q_grid.num_tokens() + token) * params.heads + head;
    *reinterpret_cast<uint4*>(static_cast<T*>(tensor) + row * head_dim + column) = pack_eight<T>(values);
  }
};

VSA_DEVICE Eight gate_eight(const Gate& gate, const Eight& values, float factor) {
  Eight result;
#pragma unroll
  for (int i = 0; i < 8; i++) result.data[i] = factor * (gate.values ? values.data[i] : 1.0f);
  return result;
}

// Sum over the lanes that differ in the bits from kFirst up to below kEnd.
template <int kFirst, int kEnd>
VSA_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int lanes = kFirst; lanes < kEnd; lanes *= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Sums over a cube, by warp: of grad_out * gate_coarse by column, and of the two scalar gates' gradients.
template <int kHeadDim>
struct CombineSums {
  static constexpr int kWarps = combine_threads(kHeadDim) / kWarpThreads;
  float coarse[kWarps][kHeadDim];
  float scalar_fine[kWarps], scalar_coarse[kWarps];
};

template <int kHeadDim, class T>
VSA_DEVICE void combine_backward(const CombineBackwardParams& params) {
  constexpr int kLanesPerRow = kHeadDim / 8;
  constexpr int kRowStep = kCubeTokens / kCombineRows;
  using Sums = CombineSums<kHeadDim>;
  __shared__ Sums sums;

  const CubeGrid& grid = params.coarse_grid;
  int cubes = grid.num_cubes(), q_blocks = params.q_grid.num_cubes();
  int head = blockIdx.x % params.heads;
  int cube = blockIdx.x / params.heads % cubes;
  int batch = blockIdx.x / params.heads / cubes;
  CombineColumns columns{batch, head, int(threadIdx.x) % kLanesPerRow * 8};
  int first_slot = threadIdx.x / kLanesPerRow;
  int64_t row = (int64_t(batch) * params.heads + head) * cubes + cube;
  float* delta_rows = params.delta + (int64_t(batch) * params.heads + head) * q_blocks * kCubeTokens;
  Extent3 origin = grid.origin(cube);

  // Where a row of the fine stage lies on the query grid: block * 64 + slot.
  auto place = [&params, cube](int token, int slot) {
    return params.same_grid ? cube * kCubeTokens + slot : params.q_grid.place_of(token);
  };
  auto in_prefix = [&params, &place](int token, int slot) {
    if (!params.block_sizes) return true;
    int at = place(token, slot);
    return at % kCubeTokens < __ldg(params.block_sizes + at / kCubeTokens);
  };

  int tokens[kCombineRows];  // a grid has fewer than 2^31
  bool real[kCombineRows];
  uint4 grad_out[kCombineRows], out_fine[kCombineRows], gate_fine[kCombineRows], gate_coarse[kCombineRows];
#pragma unroll
  for (int i = 0; i < kCombineRows; i++) {
    int slot = first_slot + i * kRowStep;
    tokens[i] = int(grid.token(origin, slot));
    real[i] = tokens[i] >= 0 && in_prefix(tokens[i], slot);
    grad_out[i] = out_fine[i] = gate_fine[i] = gate_coarse[i] = uint4{0, 0, 0, 0};
    if (!real[i]) continue;
    grad_out[i] = columns.load<T>(params.grad_out, tokens[i]);
    out_fine[i] = columns.load<T>(params.out_fine, tokens[i]);
    if (params.gate_fine.values) gate_fine[i] = columns.load<T>(params.gate_fine, tokens[i]);
    if (params.coarse && params.gate_coarse.values) {
      gate_coarse[i] = columns.load<T>(params.gate_coarse, tokens[i]);
    }
  }
  Eight coarse{};
  if (params.coarse) {
    coarse = unpack_eight<T>(
        load_eight(static_cast<const T*>(params.coarse) + row * kHeadDim + columns.column, 1, true));
  }
  float factor_fine = gate_factor(params.gate_fine), factor_coarse = gate_factor(params.gate_coarse);

  Eight grad_coarse{};
  float scalar_fine = 0.0f, scalar_coarse = 0.0f;
#pragma unroll
  for (int i = 0; i < kCombineRows; i++) {
    Eight grad = unpack_eight<T>(grad_out[i]), fine = unpack_eight<T>(out_fine[i]);
    Eight by_coarse = gate_eight(params.gate_coarse, unpack_eight<T>(gate_coarse[i]), factor_coarse);
    Eight by_fine = gate_eight(params.gate_fine, unpack_eight<T>(gate_fine[i]), factor_fine);
    Eight grad_fine, grad_gate_fine, grad_gate_coarse;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      grad_fine.data[c] = grad.data[c] * by_fine.data[c];
      grad_gate_fine.data[c] = grad.data[c] * fine.data[c];
      grad_gate_coarse.data[c] = grad.data[c] * coarse.data[c];
      grad_coarse.data[c] += grad.data[c] * by_coarse.data[c];
      scalar_fine += grad_gate_fine.data[c];
      scalar_coarse += grad_gate_coarse.data[c];
    }
    if (tokens[i] >= 0) {
      if (params.grad_fine) columns.store<T>(params.grad_fine, params, kHeadDim, tokens[i], grad_fine);
      if (params.grad_gate_fine)
        columns.store<T>(params.grad_gate_fine, params, kHeadDim, tokens[i], grad_gate_fine);
      if (params.grad_gate_coarse) {
        columns.store<T>(params.grad_gate_coarse, params, kHeadDim, tokens[i], grad_gate_coarse);
      }
    }
    // From the rounded gradient, the one that the fine backward multiplies with V.
    if (params.grad_fine) grad_fine = unpack_eight<T>(pack_eight<T>(grad_fine));

    float delta = 0.0f;
#pragma unroll
    for (int c = 0; c < 8; c++) delta += grad_fine.data[c] * fine.data[c];
    delta = lanes_sum<1, kLanesPerRow>(delta);
    // A slot of a coarse cube without a token is one of the query grid where the two are the same.
    if (columns.column == 0 && (tokens[i] >= 0 || params.same_grid)) {
      int at = place(tokens[i], first_slot + i * kRowStep);
      if (params.grad_lse && real[i]) {
        delta -= params.grad_lse[batch * params.grad_lse_strides[0] + head * params.grad_lse_strides[1] +
                                 at / kCubeTokens * params.grad_lse_strides[2] +
                                 at % kCubeTokens * params.grad_lse_strides[3]];
      }
      delta_rows[at] = delta;
    }
  }
  if (!params.same_grid) {
    // Slots of the query grid without a token, which no coarse cube holds.
    int slot = threadIdx.x;
    for (int block = cube; block < q_blocks; block += cubes) {
      if (slot < kCubeTokens && params.q_grid.token(params.q_grid.origin(block), slot) < 0) {
        delta_rows[block * kCubeTokens + slot] = 0.0f;
      }
    }
  }

  if (!params.coarse && !params.scalar_fine) return;
  int warp = warp_id();
#pragma unroll
  for (int c = 0; c < 8; c++) {
    float sum = lanes_sum<kLanesPerRow, kWarpThreads>(grad_coarse.data[c]);
    if (lane_id() < kLanesPerRow) sums.coarse[warp][columns.column + c] = sum;
  }
  scalar_fine = lanes_sum<1, kWarpThreads>(scalar_fine);
  scalar_coarse = lanes_sum<1, kWarpThreads>(scalar_coarse);
  if (lane_id() == 0) {
    sums.scalar_fine[warp] = scalar_fine;
    sums.scalar_coarse[warp] = scalar_coarse;
  }
  __syncthreads();
  if (params.grad_coarse && threadIdx.x < kHeadDim) {
    float sum = 0.0f;
    for (int i = 0; i < Sums::kWarps; i++) sum += sums.coarse[i][threadIdx.x];
    static_cast<T*>(params.grad_coarse)[row * kHeadDim + threadIdx.x] = from_float<T>(sum);
  }
  if (threadIdx.x == 0) {
    float fine = 0.0f, by_coarse = 0.0f;
    for (int i = 0; i < Sums::kWarps; i++) {
      fine += sums.scalar_fine[i];
      by_coarse += sums.scalar_coarse[i];
    }
    if (params.scalar_fine) params.scalar_fine[row] = fine;
    if (params.scalar_coarse) params.scalar_coarse[row] = by_coarse;
  }
}

}  // namespace vsa
