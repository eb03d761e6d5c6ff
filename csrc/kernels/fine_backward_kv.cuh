// Fine stage, backward, key side: dK and dV, each written once.
//
// A consumer keeps K and V of a key cube and walks the query cubes that chose it, 128 queries at a time at
// head_dim 64, else 64: first ring Q with LSE, second dO with delta. Rows are keys: S^T = K Q^T, dP^T = V dO^T,
// so that P^T and dS^T are matrix operands in registers. Per member stage i, block by block of its queries:
//
//   tensor cores   | dK(i-1) | S(i) | dP(i) - delta | dV += P(i)^T dO | dK += dS(i)^T Q ...
//   consumer       |  wait dK, release i-1 | P(i) ----- | dS(i) -----  | wait dV
//
// The other consumer's products fill the gaps.
#pragma once

#include "kernels/fine_backward.cuh"

namespace vsa {

// LSE, or delta, of a stage's queries; alike +inf and 0 in slots without a token.
template <int kBlocks>
struct QueryRows {
  float rows[kBlocks * kCubeTokens];
};

// A number for each column of a block, of which a lane holds those of its columns: 2j, 2j + 1 of group j.
struct ColumnVector {
  float data[kCubeTokens / 4];

  VSA_DEVICE float of(int i) const { return data[i / 4 * 2 + i % 2]; }  // of a tile's register i
};

VSA_DEVICE void fill(ColumnVector& vector, float value) {
  for (float& x : vector.data) x = value;
}

VSA_DEVICE void load(ColumnVector& result, const float* row) {
#pragma unroll
  for (int j = 0; j < kCubeTokens / 8; j++) {
    float2 pair = *reinterpret_cast<const float2*>(row + 8 * j + tile_column());
    result.data[2 * j] = pair.x;
    result.data[2 * j + 1] = pair.y;
  }
}

// A consumer's registers through the loop.
template <class Kernel>
struct FineBackwardKvPass {
  using T = typename Kernel::T;
  static constexpr int kBlocks = Kernel::kStageBlocks;
  static constexpr int kBlockRegisters = FloatTile<kCubeTokens>::kRegisters;
  using Scores = FloatTile<Kernel::kStageTokens>;

  FloatTile<Kernel::kHeadDim> grad_key, grad_value;
  HalfTile<T, kCubeTokens> probabilities[kBlocks], grad_scores[kBlocks];  // the last of these is pending

  VSA_DEVICE void begin(const FineBackwardParams&, const Task&, int) {
    zero(grad_key);
    zero(grad_value);
  }

  template <int kLater>
  VSA_DEVICE void wait() {
    mma_wait<kLater>(grad_key, grad_scores[kBlocks - 1]);
  }
  VSA_DEVICE static void release(typename Kernel::Shared& shared, uint32_t position) {
    shared.first.release(position);
    shared.second.release(position);
  }

  VSA_DEVICE void step(FineBackwardConsumer<Kernel>& self, const StageAt& at) {
    typename Kernel::Shared& shared = self.shared;
    typename Kernel::Resident& resident = shared.resident[self.consumer];
    auto &queries = shared.first.tile(at.position), &grad_outs = shared.second.tile(at.position);
    Scores scores, grads;
    shared.first.await(at.position);
    mma_fence();
    mma_ABt(scores, resident.first, queries, false);
    mma_commit();
    self.template settle<1>();
    shared.second.await(at.position);
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      ColumnVector delta;
      load(delta, shared.second.extra(at.position).rows + b * kCubeTokens);
#pragma unroll
      for (int i = 0; i < kBlockRegisters; i++) grads.data[b * kBlockRegisters + i] = -delta.of(i);
    }
    pin(grads);
    mma_fence();
    mma_ABt(grads, resident.second, grad_outs, true);
    mma_commit();
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
      ColumnVector lse;
      load(lse, shared.first.extra(at.position).rows + b * kCubeTokens);
      if (b == 1 && at.marked) fill(lse, INFINITY);  // the first block again: counts for nothing
      float* scores_of = scores.data + b * kBlockRegisters;
      if (b == 0) mma_wait<1>(scores);
#pragma unroll
      for (int i = 0; i < kBlockRegisters; i++) {
        scores_of[i] = exp2_approx(fmaf(scores_of[i], self.params.scale_log2, -kLog2E * lse.of(i)));
      }
      convert(probabilities[b], scores, b * kCubeTokens);
      mma_fence();
      mma_AB(grad_value, probabilities[b], grad_outs, true, b * kCubeTokens);
      mma_commit();
      if (b == 0) mma_wait<1>(grads);
#pragma unroll
      for (int i = 0; i < kBlockRegisters; i++) grads.data[b * kBlockRegisters + i] *= scores_of[i];
      convert(grad_scores[b], grads, b * kCubeTokens);
      mma_fence();
      mma_AB(grad_key, grad_scores[b], queries, true, b * kCubeTokens);
      mma_commit();
    }
    // Only the last product runs into the next step: ptxas finds no registers for more.
    if constexpr (kBlocks == 1) {
      mma_wait<1>(grad_value, probabilities[0]);
    } else {
      mma_wait<1>(grad_value, probabilities[0], grad_scores[0], probabilities[1]);
    }
  }

  VSA_DEVICE void store(const FineBackwardParams& params, const CubeAddress& address, int block) {
    uint64_t real = params.kv_grid.valid_slots(address.origin);
    PooledRows pooled(params, params.kv_grid, address, block, real);
    scale_and_add_rows(grad_key, params.scale, static_cast<const T*>(params.dk_pooled), pooled);
    scale_and_add_rows(grad_value, 1.0f, static_cast<const T*>(params.dv_pooled), pooled);
    // Rows of pads: whatever they were computed from, NaN included.
    if (params.block_sizes) real &= CubeGrid::ones(__ldg(params.block_sizes + block));
    fill_rows(grad_key, real, 0.0f);
    fill_rows(grad_value, real, 0.0f);
    store_tokens<T>(grad_key, params.grad_key, params.kv_grid, address);
    store_tokens<T>(grad_value, params.grad_value, params.kv_grid, address);
  }
};

struct FineBackwardKvMaps {
  CUtensorMap query, key, value, grad_out;
};

template <int kHeadDim, class T>
struct FineBackwardKv
    : FineBackward<kHeadDim, T, fine_backward_kv_stage_blocks(kHeadDim), fine_backward_kv_stages(kHeadDim),
                   QueryRows<fine_backward_kv_stage_blocks(kHeadDim)>,
                   QueryRows<fine_backward_kv_stage_blocks(kHeadDim)>> {
  static constexpr int kBlocks = fine_backward_kv_stage_blocks(kHeadDim);
  using Base = FineBackward<kHeadDim, T, kBlocks, fine_backward_kv_stages(kHeadDim), QueryRows<kBlocks>,
                            QueryRows<kBlocks>>;
  using Maps = FineBackwardKvMaps;
  using Pass = FineBackwardKvPass<FineBackwardKv>;
  // At head_dim 128 consumers need all that can be had.
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 24 : Base::kProducerRegisters;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 240 : Base::kConsumerRegisters;
  using typename Base::Shared;
  static constexpr int kHeldStages =
      Base::kStages.first < Base::kStages.second ? Base::kStages.first : Base::kStages.second;
  static_assert(sizeof(Shared) == fine_backward_kv_shared_bytes(kHeadDim));

  VSA_DEVICE static const CubeGrid& grid(const FineBackwardParams& params) { return params.kv_grid; }
  VSA_DEVICE static ListedBlocks listed(const FineBackwardParams& params) {
    return {params.q_grid, params.q_block_sizes};
  }
  VSA_DEVICE static bool mark(const Stage& stage) { return kBlocks == 2 && is_padded(stage); }

  VSA_DEVICE static void load_resident(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    fine_backward_load_resident<FineBackwardKv>(shared, {maps.key, params.key}, {maps.value, params.value},
                                                params);
  }
  VSA_DEVICE static void load_first(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    load_queries(shared.first, {maps.query, params.query}, params.lse, params);
  }
  VSA_DEVICE static void load_second(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    load_queries(shared.second, {maps.grad_out, params.grad_out}, params.delta, params);
  }

 private:
  // Tiles of Q or dO, and their `rows` [batch * heads, num_q_blocks, 64].
  template <class Ring>
  VSA_DEVICE static void load_queries(Ring& ring, const MappedTokens& tokens, const float* rows,
                                      const FineBackwardParams& params) {
    auto load = [&ring, &tokens, rows, &params](const Task& task, const typename Base::Run&,
                                                const Stage& stage, int slot, Barrier& full) {
      full.arrive_expect(Base::StageTile::kBytes + kBlocks * kBackwardRowBytes);
      load_blocks<kBlocks>(ring.tiles[slot], tokens.map, tokens.at, params.q_grid, task, stage, full);
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        int64_t row =
            task.head_row * params.q_grid.num_cubes() + stage_block(b ? stage.second : stage.first);
        load_async(ring.extras[slot].rows + b * kCubeTokens, rows + row * kCubeTokens, kBackwardRowBytes,
                   full);
      }
    };
    fine_backward_fill<FineBackwardKv>(ring, params, load);
  }
};

}  // namespace vsa
