// Fine stage, backward, query side: dQ, written once.
//
// Runs before the key side. A consumer keeps Q and dO of a query cube and walks the key cubes of its list,
// 128 keys at a time: first ring K, second V. Rows are queries. Per member stage i:
//
//   tensor cores   | dQ += dS(i-1) K | S(i)    | dP(i)         |            | dQ += dS(i) K ...
//   consumer       |      wait dQ, release K(i-1) | P(i) ------ | dS(i), release V(i) |
//
// The other consumer's products fill the gaps.
//
// Where every query cube has every key cube, a variant pairs two CTAs, as the forward does (tile_ring.cuh).
#pragma once

#include "kernels/fine_backward.cuh"
#include "kernels/row_terms.cuh"

namespace vsa {

struct ValidMasks {
  uint64_t blocks[kBackwardQStageBlocks];  // bit per key: a real token; only of partial stages
};
static_assert(sizeof(ValidMasks) == kBackwardQStageBlocks * kValidMaskBytes);

// A consumer's registers through the loop.
template <class Kernel>
struct FineBackwardQPass {
  using T = typename Kernel::T;
  using Scores = FloatTile<Kernel::kStageTokens>;
  static constexpr bool kPends = true, kReleasesResident = true;

  FloatTile<Kernel::kHeadDim> grad_query;
  HalfTile<T, Kernel::kStageTokens> grad_scores;  // of the pending stage
  RowVector minus_lse_log2, minus_delta;

  // Leaves the rows' terms for the key pass.
  VSA_DEVICE void begin(const FineBackwardParams& params, const Task& task, int block, bool exists) {
    zero(grad_query);
    int64_t first_row = (task.head_row * params.q_grid.num_cubes() + block) * kCubeTokens;
    Extent3 origin = params.q_grid.origin(block);
    bool thin = params.no_terms && params.q_grid.thin_side(origin) >= 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int64_t row = first_row + tile_row(half);
      float lse = __ldg(params.lse + row), delta = __ldg(params.delta + row);
      minus_lse_log2.data[half] = -kLog2E * lse;
      minus_delta.data[half] = -delta;
      int place = thin ? params.q_grid.thin_slot(origin, tile_row(half)) : tile_row(half);
      if (exists && lane_id() % 4 == 0 && place >= 0) {
        static_cast<uint4*>(params.row_terms)[first_row + place] = row_terms(lse / params.scale, delta);
      }
      if (exists && first_row == 0 && params.no_terms && tile_row(half) < kThinTokens) {
        static_cast<uint4*>(params.no_terms)[tile_row(half)] = row_terms(INFINITY, 0.0f);
      }
    }
  }

  template <int kLater>
  VSA_DEVICE void wait() {
    mma_wait<kLater>(grad_query, grad_scores);
  }
  VSA_DEVICE void settled(FineBackwardConsumer<Kernel>& self, uint32_t position) {
    self.shared.first.release(position);
  }

  VSA_DEVICE void step(FineBackwardConsumer<Kernel>& self, const StageAt& at) {
    typename Kernel::Shared& shared = self.shared;
    typename Kernel::Resident& resident = shared.resident[self.consumer];
    Scores scores, grads;
    shared.first.await(at.position);
    mma_fence();
    mma_ABt(scores, resident.first, shared.first.tile(at.position), false);
    mma_commit();
    self.template settle<1>();
    shared.second.await(at.position);
    mma_fence();
    mma_ABt(grads, resident.second, shared.second.tile(at.position), false);
    mma_commit();
    mma_wait<1>(scores);
    exponentiate<0, Scores::kRegisters>(scores, self.params.scale_log2, minus_lse_log2);
    keep_above_wait(scores);
    mma_wait<0>(grads);
    shared.second.release(at.position);
    if (at.last) self.release_resident();
#pragma unroll
    for (int i = 0; i < grads.kRegisters; i++) {
      grads.data[i] = scores.data[i] * (grads.data[i] + minus_delta.data[i / 2 % 2]);
    }
    if (at.marked) fill_masked_beside(grads, shared.first.extra(at.position).blocks, 0.0f);
    convert(grad_scores, grads);
    mma_fence();
    mma_AB(grad_query, grad_scores, shared.first.tile(at.position), true);
    mma_commit();
  }

  VSA_DEVICE void enter(FineBackwardConsumer<Kernel>&, uint32_t) {}
  VSA_DEVICE void leave(FineBackwardConsumer<Kernel>&) {}
  VSA_DEVICE void store(const FineBackwardParams& params, const CubeAddress& address, int block) {
    store_grad_query<T>(grad_query, params, address, block);
  }
};

struct FineBackwardQMaps {
  CUtensorMap query;
  ListedMaps key, value;
  CUtensorMap grad_out;
};

template <int kHeadDim, class T, bool kPaired = false>
struct FineBackwardQ : FineBackward<kHeadDim, T, kBackwardQStageBlocks, fine_backward_q_stages(kHeadDim),
                                    ValidMasks, NothingOwn, !kPaired, kPaired> {
  using Base = FineBackward<kHeadDim, T, kBackwardQStageBlocks, fine_backward_q_stages(kHeadDim), ValidMasks,
                            NothingOwn, !kPaired, kPaired>;
  using Maps = FineBackwardQMaps;
  using Pass = FineBackwardQPass<FineBackwardQ>;
  using typename Base::Shared;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = 224;
  static constexpr bool kClearsResident = false;
  static constexpr int kHeldStages = Base::kStages.first;
  static_assert(sizeof(Shared) == fine_backward_q_shared_bytes(kHeadDim));

  VSA_DEVICE static const CubeGrid& grid(const FineBackwardParams& params) { return params.q_grid; }
  VSA_DEVICE static ListedBlocks listed(const FineBackwardParams& params) {
    return {params.kv_grid, params.block_sizes};
  }
  VSA_DEVICE static bool mark(const Stage& stage) { return is_partial(stage); }

  template <class Kernel>
  VSA_DEVICE static void load_resident(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    fine_backward_load_resident<Kernel>(shared, {maps.query, params.query}, {maps.grad_out, params.grad_out},
                                        params);
  }
  VSA_DEVICE static void load_first(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run& run, const Stage& stage,
                                          int slot, Barrier& full) {
      if (is_partial(stage)) run.valid_masks(shared.first.extras[slot].blocks, stage);
      full.arrive_expect(Base::StageTile::kBytes);
      load_listed<kBackwardQStageBlocks, kPaired>(shared.first.tiles[slot], maps.key, params.key, task, run,
                                                  stage, full);
    };
    fine_backward_fill<FineBackwardQ, true>(shared.first, shared.queue, params, load);
  }
  VSA_DEVICE static void load_second(Shared& shared, const Maps& maps, const FineBackwardParams& params) {
    auto load = [&shared, &maps, &params](const Task& task, const typename Base::Run& run, const Stage& stage,
                                          int slot, Barrier& full) {
      full.arrive_expect(Base::StageTile::kBytes);
      load_listed<kBackwardQStageBlocks, kPaired>(shared.second.tiles[slot], maps.value, params.value, task,
                                                  run, stage, full);
    };
    fine_backward_fill<FineBackwardQ, false>(shared.second, shared.queue, params, load);
  }
};

}  // namespace vsa
