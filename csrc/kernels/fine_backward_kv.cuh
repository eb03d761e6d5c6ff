// Fine stage, backward, key side: dK and dV, each written once.
//
// A consumer keeps K and V of a key cube and walks the query cubes that chose it, 128 queries at a time at
// head_dim 64, else 64: first ring Q with the queries' terms, second dO. Rows are keys: S^T = K Q^T, dP^T =
// V dO^T, so that P^T and dS^T are matrix operands in registers; LSE and delta, which lie across the lanes
// then, come in as products (row_terms.cuh). Per member stage i, block by block of its queries:
//
//   tensor cores   | dK(i-1) | S(i) | dP(i) - delta | dV += P(i)^T dO | dK += dS(i)^T Q ...
//   consumer       |  wait dK, release i-1 | P(i) ----- | dS(i) -----  | wait dV
//
// The other consumer's products fill the gaps.
#pragma once

#include "kernels/fine_backward.cuh"
#include "kernels/row_terms.cuh"

namespace vsa {

template <int kBlocks>
struct QueryTerms {
  RowTerms blocks[kBlocks];
};

struct TermSelectors {
  TermSelector lse, delta;

  VSA_DEVICE void init(int thread) {
    if (thread < 16) {
      lse.init(thread, 0);
      delta.init(thread, 2);
    }
    fence_async_shared();  // wgmma reads them through the async proxy
  }
};
static_assert(sizeof(TermSelectors) == kTermSelectorsBytes &&
              sizeof(RowTerms) == kCubeTokens * kRowTermsBytes);

// A consumer's registers through the loop.
template <class Kernel>
struct FineBackwardKvPass {
  using T = typename Kernel::T;
  static constexpr int kBlocks = Kernel::kStageBlocks;
  static constexpr int kBlockRegisters = FloatTile<kCubeTokens>::kRegisters;
  using Scores = FloatTile<Kernel::kStageTokens>;

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
  VSA_DEVICE static void release(typename Kernel::Shared& shared, uint32_t position) {
    shared.first.release(position);
    shared.second.release(position);
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
    block_step<0>(scores, grads, self.params.scale_log2, 0.0f, queries, grad_outs);
    // A padded stage's second block is its first one again: it counts for nothing.
    if constexpr (kBlocks == 2) {
      block_step<1>(scores, grads, self.params.scale_log2, at.marked ? -INFINITY : 0.0f, queries, grad_outs);
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
  VSA_DEVICE void block_step(Scores& scores, Scores& grads, float scale_log2, float shift,
                             typename Kernel::StageTile& queries, typename Kernel::StageTile& grad_outs) {
    constexpr int kBegin = kBlock * kBlockRegisters, kFirstToken = kBlock * kCubeTokens;
    exponentiate<kBegin, kBegin + kBlockRegisters>(scores, scale_log2, {shift, shift});
    convert(probabilities[kBlock], scores, kFirstToken);
    mma_fence();
    mma_AB(grad_value, probabilities[kBlock], grad_outs, true, kFirstToken);
    mma_commit();
    if (kBlock == 0) mma_wait<1>(grads);
#pragma unroll
    for (int i = kBegin; i < kBegin + kBlockRegisters; i++) grads.data[i] *= scores.data[i];
    convert(grad_scores[kBlock], grads, kFirstToken);
    mma_fence();
    mma_AB(grad_key, grad_scores[kBlock], queries, true, kFirstToken);
    mma_commit();
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
                   QueryTerms<fine_backward_kv_stage_blocks(kHeadDim)>, TermSelectors> {
  static constexpr int kBlocks = fine_backward_kv_stage_blocks(kHeadDim);
  using Base = FineBackward<kHeadDim, T, kBlocks, fine_backward_kv_stages(kHeadDim), QueryTerms<kBlocks>,
                            TermSelectors>;
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
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run&, const Stage& stage,
                                          int slot, Barrier& full) {
      QueryTerms<kBlocks>& terms = shared.first.extras[slot];
      full.arrive_expect(Base::StageTile::kBytes + sizeof(terms));
      load_blocks<kBlocks>(shared.first.tiles[slot], maps.query, params.query, params.q_grid, task, stage,
                           full);
#pragma unroll
      for (int b = 0; b < kBlocks; b++) {
        int64_t block =
            task.head_row * params.q_grid.num_cubes() + stage_block(b ? stage.second : stage.first);
        load_async(&terms.blocks[b], static_cast<const RowTerms*>(params.row_terms) + block, sizeof(RowTerms),
                   full);
      }
    };
    fine_backward_fill<FineBackwardKv, true>(shared.first, shared.queue, params, load);
  }
  VSA_DEVICE static void load_second(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run&, const Stage& stage,
                                          int slot, Barrier& full) {
      full.arrive_expect(Base::StageTile::kBytes);
      load_blocks<kBlocks>(shared.second.tiles[slot], maps.grad_out, params.grad_out, params.q_grid, task,
                           stage, full);
    };
    fine_backward_fill<FineBackwardKv, false>(shared.second, shared.queue, params, load);
  }
};

}  // namespace vsa
