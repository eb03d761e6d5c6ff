// What the passes of the backward that keep key cubes load: K and V of a consumer's cube, and of the query
// cubes that chose it, in the first ring Q with the queries' terms (row_terms.cuh), in the second dO. Rows
// are keys: S^T = K Q^T, dP^T = V dO^T, so that P^T and dS^T are matrix operands in registers; LSE and delta,
// which lie across the lanes then, come in as products.
#pragma once

#include "kernels/fine_backward.cuh"
#include "kernels/row_terms.cuh"

namespace vsa {

template <int kBlocks>
struct QueryTerms {
  RowTerms blocks[kBlocks];

  VSA_DEVICE void note(const Stage&, int64_t) {}
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

struct FineBackwardKeysMaps {
  ListedMaps query;
  CUtensorMap key, value;
  ListedMaps grad_out;
};

// One thread: the terms of a stage's queries, of a head's in `from`. Thin cubes have theirs in the order of
// thin_slot.
template <class Run, int kBlocks>
VSA_DEVICE void load_terms(RowTerms (&to)[kBlocks], const RowTerms* from, const void* no_terms,
                           const Run& run, const Stage& stage, Barrier& full) {
  if constexpr (Run::kListed) {
    if (is_thin(stage)) {
#pragma unroll 1
      for (int i = 0; i < kBlocks * kThinCubes; i++) {
        int block = stage_block(__ldg(run.thin_rows(stage)[i / kThinCubes].cubes + i % kThinCubes));
        const void* terms = block < run.blocks.grid.num_cubes() ? from + block : no_terms;
        load_async(&to[0].rows[i * kThinTokens], terms, kThinTokens * kRowTermsBytes, full);
      }
      return;
    }
  }
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
    load_async(&to[b], from + stage_block(b ? stage.second : stage.first), sizeof(RowTerms), full);
  }
}

template <int kHeadDim, class T, BackwardStages kStages_, class Extra, class Own, bool kListed = true>
struct FineBackwardKeys
    : FineBackward<kHeadDim, T, fine_backward_kv_stage_blocks(kHeadDim), kStages_, Extra, Own, kListed> {
  static constexpr int kBlocks = fine_backward_kv_stage_blocks(kHeadDim);
  using Base = FineBackward<kHeadDim, T, kBlocks, kStages_, Extra, Own, kListed>;
  using Maps = FineBackwardKeysMaps;
  // At head_dim 128 consumers need all that can be had.
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 24 : Base::kProducerRegisters;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 240 : Base::kConsumerRegisters;
  using typename Base::Shared;

  VSA_DEVICE static const CubeGrid& grid(const FineBackwardParams& params) { return params.kv_grid; }
  VSA_DEVICE static ListedBlocks listed(const FineBackwardParams& params) {
    return {params.q_grid, params.q_block_sizes};
  }
  VSA_DEVICE static bool mark(const Stage& stage) { return kBlocks == 2 && is_padded(stage); }

  // Of the block's tokens, as many count.
  VSA_DEVICE static int prefix(const FineBackwardParams& params, int block) {
    return params.block_sizes ? __ldg(params.block_sizes + block) : kCubeTokens;
  }

  template <class Kernel>
  VSA_DEVICE static void load_resident(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    fine_backward_load_resident<Kernel>(shared, {maps.key, params.key}, {maps.value, params.value}, params);
  }
  VSA_DEVICE static void load_first(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run& run, const Stage& stage,
                                          int slot, Barrier& full) {
      Extra& extra = shared.first.extras[slot];
      int64_t first_block = task.head_row * params.q_grid.num_cubes();
      extra.note(stage, first_block);
      full.arrive_expect(Base::StageTile::kBytes + sizeof(extra.blocks));
      load_listed<kBlocks>(shared.first.tiles[slot], maps.query, params.query, task, run, stage, full);
      load_terms(extra.blocks, static_cast<const RowTerms*>(params.row_terms) + first_block, params.no_terms,
                 run, stage, full);
    };
    fine_backward_fill<FineBackwardKeys, true>(shared.first, shared.queue, params, load);
  }
  VSA_DEVICE static void load_second(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run& run, const Stage& stage,
                                          int slot, Barrier& full) {
      full.arrive_expect(Base::StageTile::kBytes);
      load_listed<kBlocks>(shared.second.tiles[slot], maps.grad_out, params.grad_out, task, run, stage, full);
    };
    fine_backward_fill<FineBackwardKeys, false>(shared.second, shared.queue, params, load);
  }
};

}  // namespace vsa
