// Fine stage, backward in one pass: dK and dV, each written once, and what goes into the sums of dQ.
//
// As the key pass (fine_backward_kv.cuh), and dQ += dS K besides: S and dP are computed once for all three, 5
// matrix products. dS goes through shared memory, where its other operand lies; a 64 x 64 tile of dQ at a
// time is written from registers to shared memory, and added to global memory by the copy engine, or
// (adds_directly) straight from registers. Of a stage that both consumers chose each computes one tile, over
// the keys of both: its half of the columns at head_dim 128, its block of queries at head_dim 64. Of other
// stages the member computes both. Stage i:
//
//   tensor cores   | S(i) | dP(i) - delta | dV += P(i)^T dO | dK += dS(i)^T Q | dQ(i)    |
//   consumer       |      | P(i) -------- | dS(i) --------- | both dS there?  | release  | add dQ(i)
//
// The other consumer's products fill the gaps.
//
// Named barriers. Of a stage that one chose: its dS is there, or has been read (kOwnReady + consumer). Of a
// stage that both chose: both dS are there (kBothReady); a consumer's dS and K have been read by the other
// (kFree + consumer), which the other announces once its dQ is done, and the consumer awaits before it writes
// its next dS or gives K back. Nobody holds back a tile of a ring while it waits, but those of the stage
// itself.
//
// Which of two sums comes first changes from run to run, and with it the last bits of dQ. At head_dim 128 the
// kernel takes no lists, which keeps it within its registers: it would lose to the two passes on them (L2 has
// no room for the sums, or no time for those of tiles that nobody shares; bench/NOTES.md). Additions from
// registers are the faster way where few stages are shared, the copy engine's where most are; a launch has
// but one of the two, as additions through different proxies are not atomic to each other.
#pragma once

#include "kernels/fine_backward_keys.cuh"
#include "kernels/fine_backward_kv.cuh"

namespace vsa {

template <int kBlocks>
struct ListedQueryTerms : QueryTerms<kBlocks> {
  static_assert(kBlocks <= 2);
  int64_t listed[2];  // the stage's blocks among those of all heads

  VSA_DEVICE void note(const Stage& stage, int64_t first_block) {
    listed[0] = first_block + stage_block(stage.first);
    listed[1] = first_block + stage_block(stage.second);
  }
  // Of a stage's tile of dQ among those of all heads; for lane 0, which alone needs it.
  VSA_DEVICE int64_t place(int tile, int panels) const {
    if (lane_id() != 0) return 0;
    return kBlocks == 2 ? listed[tile] : listed[0] * panels + tile;
  }
};

template <class T, int kBlocks>
struct FineBackwardFusedOwn : TermSelectors {
  SharedTile<T, kCubeTokens, 64> grad_scores[kBackwardConsumers][kBlocks];  // dS^T: [keys, queries]
  float4 sums[kBackwardConsumers][kGradQueryTile / 4];                      // [warp][8 columns][lane]
};

template <class Kernel>
struct FineBackwardFusedPass : FineBackwardKvPass<Kernel> {
  using Base = FineBackwardKvPass<Kernel>;
  using Consumer = FineBackwardConsumer<Kernel>;
  using Base::grad_key, Base::grad_scores, Base::grad_value, Base::kBlocks, Base::probabilities;
  using typename Base::Scores;
  static constexpr bool kPends = false;
  static constexpr bool kReleasesResident = false;  // the other consumer reads K, too
  static constexpr int kPanels = Kernel::kHeadDim / 64;
  static_assert(kBackwardConsumers == 2 && kBlocks * kPanels == 2);  // tiles of dQ of a stage
  static constexpr int kBothReady = 1, kOwnReady = 2, kFree = kOwnReady + kBackwardConsumers;
  static constexpr int kBothThreads = kBackwardConsumers * kWarpgroupThreads;
  using GradQueryTile = FloatTile<64>;
  // Scores of the next stage are made while dQ of this one is added: where it is known which one is next.
  static constexpr bool kAhead = !Kernel::kListed;

  Scores ahead;         // of the stage to come, where kAhead
  RowVector key_shift;  // -inf for a pad
  bool both;            // the other consumer takes part in the stage before

  // Pads of the key block have no probability; load_resident made numbers of what lies there.
  VSA_DEVICE void begin(const FineBackwardParams& params, const Task& task, int block, bool exists) {
    Base::begin(params, task, block, exists);
    both = false;
    uint64_t real = params.kv_grid.valid_slots(params.kv_grid.origin(block));
    if (params.block_sizes) real &= CubeGrid::ones(__ldg(params.block_sizes + block));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      key_shift.data[half] = real >> tile_row(half) & 1 ? 0.0f : -INFINITY;
    }
  }

  VSA_DEVICE void enter(Consumer& self, uint32_t position) {
    if constexpr (kAhead) {
      Scores scores;
      make_scores(self, scores, position);
      mma_wait<0>(scores);
      ahead = scores;
    }
  }
  VSA_DEVICE void leave(Consumer& self) {
    await_free(self);
    if (lane_id() == 0) store_wait_read<0>();
  }

  VSA_DEVICE void step(Consumer& self, const StageAt& at) {
    typename Kernel::Shared& shared = self.shared;
    typename Kernel::Resident& resident = shared.resident[self.consumer];
    auto &queries = shared.first.tile(at.position), &grad_outs = shared.second.tile(at.position);
    auto& extra = shared.first.extra(at.position);
    Scores scores, grads;
    if constexpr (kAhead) {
      scores = ahead;
    } else {
      make_scores(self, scores, at.position);
    }
    shared.second.await(at.position);
    mma_fence();
    mma_terms(grads, shared.own.delta, extra.blocks);
    mma_ABt(grads, resident.second, grad_outs, true);
    mma_commit();
    if constexpr (!kAhead) mma_wait<1>(scores);
    this->template block_step<0>(self, scores, grads, key_shift, queries, grad_outs);
    // A padded stage's second block is its first one again: it counts for nothing.
    if constexpr (kBlocks == 2) {
      RowVector shift = key_shift;
      if (at.marked) shift = {-INFINITY, -INFINITY};
      this->template block_step<1>(self, scores, grads, shift, queries, grad_outs);
    }
    fence_async_shared();  // wgmma reads dS through the async proxy
    both = at.shared;
    if (at.shared) {
      named_barrier_sync(kBothReady, kBothThreads);
      int64_t place = extra.place(self.consumer, kPanels);
      GradQueryTile grad_query;
      mma_fence();
      multiply(grad_query, self, self.consumer, 0, false);
      multiply(grad_query, self, self.consumer, 1, true);
      mma_commit();
      go_on(self, at);
      mma_wait<kAhead ? 1 : 0>(grad_query);
      named_barrier_arrive(kFree + 1 - self.consumer, kBothThreads);
      add(self, grad_query, place);
    } else {
      // A padded stage's second tile adds zeros.
      named_barrier_sync(kOwnReady + self.consumer, kWarpgroupThreads);
      int64_t places[2] = {extra.place(0, kPanels), extra.place(1, kPanels)};
      GradQueryTile first, second;
      mma_fence();
      multiply(first, self, 0, self.consumer, false);
      mma_commit();
      mma_wait<0>(first);
      add(self, first, places[0]);
      mma_fence();
      multiply(second, self, 1, self.consumer, false);
      mma_commit();
      go_on(self, at);
      mma_wait<kAhead ? 1 : 0>(second);
      add(self, second, places[1]);
    }
    if constexpr (kAhead) {
      mma_wait<0>(ahead);
      shared.first.release(at.position);
    }
  }

  // dS of a block, before the product that reads the same registers.
  template <int kBlock>
  VSA_DEVICE void publish(Consumer& self) {
    if (kBlock == 0 && !await_free(self)) {
      // Each warp has waited for its own part of the dQ that reads the tile.
      named_barrier_sync(kOwnReady + self.consumer, kWarpgroupThreads);
    }
    vsa::store(self.shared.own.grad_scores[self.consumer][kBlock], grad_scores[kBlock]);
  }

 private:
  // Until the other consumer has read this one's dS and K, if it took part in the stage before.
  VSA_DEVICE bool await_free(Consumer& self) {
    bool shared = __any_sync(0xffffffffu, both);
    if (shared) named_barrier_sync(kFree + self.consumer, kBothThreads);
    both = false;
    return shared;
  }

  VSA_DEVICE void make_scores(Consumer& self, Scores& scores, uint32_t position) {
    typename Kernel::Shared& shared = self.shared;
    shared.first.await(position);
    mma_fence();
    mma_terms(scores, shared.own.lse, shared.first.extra(position).blocks);
    mma_ABt(scores, shared.resident[self.consumer].first, shared.first.tile(position), true);
    mma_commit();
  }

  // While no product but dQ's is unfinished.
  VSA_DEVICE void go_on(Consumer& self, const StageAt& at) {
    mma_wait<1>(grad_value, grad_key);
#pragma unroll
    for (int i = 0; i < kBlocks; i++) {
      pin(probabilities[i]);
      pin(grad_scores[i]);
    }
    self.shared.second.release(at.position);
    if constexpr (kAhead) {
      // After the last stage its own scores again, for nothing: a branch would serialise the products.
      Scores scores;
      make_scores(self, scores, at.last ? at.position : at.position + 1);
      ahead = scores;
    } else {
      self.shared.first.release(at.position);
    }
  }

  // A stage's tile number `tile` of dQ, over the keys of `consumer`.
  VSA_DEVICE void multiply(GradQueryTile& grad_query, Consumer& self, int tile, int consumer,
                           bool accumulate) {
    int block = kBlocks == 2 ? tile : 0, panel = kBlocks == 2 ? 0 : tile;
    mma_AtB(grad_query, self.shared.own.grad_scores[consumer][block],
            self.shared.resident[consumer].first.panel_tile(panel), accumulate);
  }

  // Adds it to tile number `place` of global memory (lane 0's): each warp's rows in the order of their
  // registers.
  VSA_DEVICE void add(Consumer& self, const GradQueryTile& grad_query, int64_t place) {
    constexpr int kWarpFloats = kGradQueryTile / 4;
    if constexpr (Kernel::kListed) {
      if (self.params.adds_directly) {
        place = __shfl_sync(0xffffffffu, place, 0);
        float* to = self.params.grad_query_sums + place * kGradQueryTile + warp_in_warpgroup() * kWarpFloats;
#pragma unroll
        for (int j = 0; j < grad_query.kCols / 8; j++) {
          const float* x = grad_query.data + 4 * j;
          atomicAdd(reinterpret_cast<float4*>(to) + j * kWarpThreads + lane_id(),
                    float4{x[0], x[1], x[2], x[3]});
        }
        return;
      }
    }
    float4* sums = self.shared.own.sums[self.consumer] + warp_in_warpgroup() * (kWarpFloats / 4);
    if (lane_id() == 0) store_wait_read<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < grad_query.kCols / 8; j++) {
      const float* x = grad_query.data + 4 * j;
      sums[j * kWarpThreads + lane_id()] = {x[0], x[1], x[2], x[3]};
    }
    fence_async_shared();  // the copy engine reads them
    __syncwarp();
    if (lane_id() == 0) {
      float* to = self.params.grad_query_sums + place * kGradQueryTile + warp_in_warpgroup() * kWarpFloats;
      add_async(to, reinterpret_cast<const float*>(sums), kWarpFloats * sizeof(float));
      store_commit();
    }
  }
};

template <int kHeadDim, class T>
struct FineBackwardFused : FineBackwardKeys<kHeadDim, T, fine_backward_fused_stages(kHeadDim),
                                            ListedQueryTerms<fine_backward_kv_stage_blocks(kHeadDim)>,
                                            FineBackwardFusedOwn<T, fine_backward_kv_stage_blocks(kHeadDim)>,
                                            fine_backward_fused_takes_lists(kHeadDim)> {
  using Pass = FineBackwardFusedPass<FineBackwardFused>;
  static constexpr int kHeldStages = fine_backward_fused_stages(kHeadDim).first;
  static constexpr bool kClearsResident = true;
  static_assert(sizeof(typename FineBackwardFused::Shared) == fine_backward_fused_shared_bytes(kHeadDim));
};

}  // namespace vsa
