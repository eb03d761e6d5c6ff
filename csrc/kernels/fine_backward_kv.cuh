// Fine stage, backward, key side: dK and dV, each written once.
//
// A consumer keeps K and V of a key cube and walks the query cubes that chose it, 128 queries at a time at
// head_dim 64, else 64 (fine_backward_keys.cuh). Per member stage i, block by block of its queries:
//
//   tensor cores   | dK(i-1) | S(i) | dP(i) - delta | dV += P(i)^T dO | dK += dS(i)^T Q ...
//   consumer       |  wait dK, release i-1 | P(i) ----- | dS(i) -----  | wait dV
//
// The other consumer's products fill the gaps.
#pragma once

#include "kernels/fine_backward_keys.cuh"

namespace vsa {

// A consumer's registers through the loop.
template <class Kernel>
struct FineBackwardKvPass {
  using T = typename Kernel::T;
  static constexpr int kBlocks = Kernel::kStageBlocks;
  static constexpr int kBlockRegisters = FloatTile<kCubeTokens>::kRegisters;
  using Scores = FloatTile<Kernel::kStageTokens>;
  static constexpr bool kPends = true, kReleasesResident = true;

  FloatTile<Kernel::kHeadDim> grad_key, grad_value;
  HalfTile<T, kCubeTokens> probabilities[kBlocks], grad_scores[kBlocks];  // the last of these is pending

  VSA_DEVICE void begin(const FineBackwardParams&, const Task&, int, bool) {
    zero(grad_key);
    zero(grad_value);
  }

  template <int kLater>
  VSA_DEVICE void wait() {
    mma_wait<kLater>(grad_key, grad_scores[kBlocks - 1]);
  }
  VSA_DEVICE void settled(FineBackwardConsumer<Kernel>& self, uint32_t position) {
    self.shared.first.release(position);
    self.shared.second.release(position);
  }

  VSA_DEVICE void step(FineBackwardConsumer<Kernel>& self, const StageAt& at) {
    typename Kernel::Shared& shared = self.shared;
    typename Kernel::Resident& resident = shared.resident[self.consumer];
    auto &queries = shared.first.tile(at.position), &grad_outs = shared.second.tile(at.position);
    auto& terms = shared.first.extra(at.position).blocks;
    Scores scores, grads;
    shared.first.await(at.position);
    mma_fence();
    mma_terms(scores, shared.own.lse, terms);
    mma_ABt(scores, resident.first, queries, true);
    mma_commit();
    self.template settle<1>();
    shared.second.await(at.position);
    mma_fence();
    mma_terms(grads, shared.own.delta, terms);
    mma_ABt(grads, resident.second, grad_outs, true);
    mma_commit();
    mma_wait<1>(scores);
    block_step<0>(self, scores, grads, {0.0f, 0.0f}, queries, grad_outs);
    // A padded stage's second block is its first one again: it counts for nothing.
    if constexpr (kBlocks == 2) {
      float shift = at.marked ? -INFINITY : 0.0f;
      block_step<1>(self, scores, grads, {shift, shift}, queries, grad_outs);
    }
    // Only the last product runs into the next step: ptxas finds no registers for more.
    if constexpr (kBlocks == 1) {
      mma_wait<1>(grad_value, probabilities[0]);
    } else {
      mma_wait<1>(grad_value, probabilities[0], grad_scores[0], probabilities[1]);
    }
    if (at.last) self.release_resident();
  }

  // P and dS of a stage's block of queries, and what it adds to dV and dK.
  template <int kBlock>
  VSA_DEVICE void block_step(FineBackwardConsumer<Kernel>& self, Scores& scores, Scores& grads,
                             const RowVector& shift, typename Kernel::StageTile& queries,
                             typename Kernel::StageTile& grad_outs) {
    constexpr int kBegin = kBlock * kBlockRegisters, kFirstToken = kBlock * kCubeTokens;
    exponentiate<kBegin, kBegin + kBlockRegisters>(scores, self.params.scale_log2, shift);
    convert(probabilities[kBlock], scores, kFirstToken);
    mma_fence();
    mma_AB(grad_value, probabilities[kBlock], grad_outs, true, kFirstToken);
    mma_commit();
    if (kBlock == 0) mma_wait<1>(grads);
#pragma unroll
    for (int i = kBegin; i < kBegin + kBlockRegisters; i++) grads.data[i] *= scores.data[i];
    convert(grad_scores[kBlock], grads, kFirstToken);
    self.pass.template publish<kBlock>(self);
    mma_fence();
    mma_AB(grad_key, grad_scores[kBlock], queries, true, kFirstToken);
    mma_commit();
  }

  VSA_DEVICE void enter(FineBackwardConsumer<Kernel>&, uint32_t) {}
  VSA_DEVICE void leave(FineBackwardConsumer<Kernel>&) {}
  template <int kBlock>
  VSA_DEVICE void publish(FineBackwardConsumer<Kernel>&) {}

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

template <int kHeadDim, class T>
struct FineBackwardKv : FineBackwardKeys<kHeadDim, T, fine_backward_kv_stages(kHeadDim),
                                         QueryTerms<fine_backward_kv_stage_blocks(kHeadDim)>, TermSelectors> {
  using Pass = FineBackwardKvPass<FineBackwardKv>;
  static constexpr BackwardStages kStages = fine_backward_kv_stages(kHeadDim);
  static constexpr bool kClearsResident = false;
  static constexpr int kHeldStages = kStages.first < kStages.second ? kStages.first : kStages.second;
  static_assert(sizeof(typename FineBackwardKv::Shared) == fine_backward_kv_shared_bytes(kHeadDim));
};

}  // namespace vsa
