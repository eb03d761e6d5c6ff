// Fine stage, backward, query side: dQ, written once.
//
// A CTA takes two or three query cubes, one consumer warpgroup each, which keeps Q and dO. The producer walks
// their merged lists and loads each K and V cube once. Rows are queries. Per member tile i:
//
//   tensor cores   | S(i)     | dP(i) - delta |          | dQ += dS(i) K | S(i+1)
//   consumer       | release i-1 | P(i) ------------ | dS(i) | go round the ring
//
// The other consumers' products fill the gaps.
#pragma once

#include "kernels/fine_backward.cuh"

namespace vsa {

struct FineBackwardQMaps {
  CUtensorMap query, key, value, grad_out, grad_query;
};

template <int kHeadDim, class T>
struct FineBackwardQ : FineBackward<kHeadDim, T, fine_backward_q_consumers(kHeadDim), TileInfo> {
  // Less traffic from shared memory, which bounds 64-wide products. Not dO too: with its registers ptxas
  // would wait for each product. Not at head_dim 64: there ptxas 13.0 writes over operands that the next tile
  // needs (wrong on an H200, right in the PTX; tests/test_machine_code.py).
  static constexpr bool kQueryInRegisters = kHeadDim == 128;
  static_assert(sizeof(typename FineBackwardQ::Shared) == fine_backward_q_shared_bytes(kHeadDim));
};

template <class Kernel>
VSA_DEVICE void fine_backward_q_produce(typename Kernel::Shared& shared, const FineBackwardQMaps& maps,
                                        const FineBackwardParams& params,
                                        const FineBackwardTask<Kernel::kConsumers>& task, RingRole role) {
  BlockSets<Kernel::kConsumers> lists;
#pragma unroll
  for (int i = 0; i < Kernel::kConsumers; i++) {
    bool exists = i < task.cubes;
    int cube = task.cube(params.q_grid, exists ? i : 0);
    lists.start(i, params.lists.list(task.batch, task.head, cube),
                exists ? params.lists.count(task.batch, task.head, cube) : 0);
    if (role == RingRole::kFirst && exists && elect_one()) {
      load_resident(shared, i, maps.query, params.query, maps.grad_out, params.grad_out,
                    task.address(params.q_grid, cube));
    }
    __syncwarp();
  }
  TileSource source{params.kv_grid, params.block_sizes, maps.key,   maps.value,
                    params.key,     params.value,       task.batch, task.head};
  fill_ring(shared.ring, role, lists, source, 0, [](int, int, Barrier&) {});
}

// A consumer's registers through the loop.
template <class Kernel>
struct FineBackwardQState {
  HalfTile<typename Kernel::T, Kernel::kHeadDim> query;  // with kQueryInRegisters
  FloatTile<Kernel::kHeadDim> grad_query;
  HalfTile<typename Kernel::T, kCubeTokens> grad_scores;  // of the pending stage
  RowVector lse_log2, minus_delta;

  // Until at most kPending products later than that of the pending stage are unfinished.
  template <int kPending>
  VSA_DEVICE void finish() {
    mma_wait<kPending>(grad_query, grad_scores);
  }
};

template <class Kernel>
VSA_DEVICE int fine_backward_q_step(FineBackwardQState<Kernel>& state, typename Kernel::Shared& shared,
                                    int consumer, float scale_log2, int stage, int pending) {
  auto& ring = shared.ring;
  uint64_t valid = ring.info[stage].valid;
  FloatTile<kCubeTokens> scores, grads;
  mma_fence();
  if constexpr (Kernel::kQueryInRegisters) {
    mma_ABt(scores, state.query, ring.first[stage], false);
  } else {
    mma_ABt(scores, shared.first[consumer], ring.first[stage], false);
  }
  mma_commit();
  keep_apart<1>(stage);
#pragma unroll
  for (int i = 0; i < grads.kRegisters; i++) grads.data[i] = state.minus_delta.data[(i / 2) % 2];
  pin(grads);
  mma_fence();
  mma_ABt(grads, shared.second[consumer], ring.second[stage], true);
  mma_commit();
  state.template finish<2>();
  if (pending != kNone) ring.release(pending);
  mma_wait<1>(scores);
#pragma unroll
  for (int i = 0; i < scores.kRegisters; i++) {
    scores.data[i] = exp2_approx(fmaf(scores.data[i], scale_log2, -state.lse_log2.data[(i / 2) % 2]));
  }
  settle(scores, scale_log2);
  mma_wait<0>(grads);
#pragma unroll
  for (int i = 0; i < grads.kRegisters; i++) grads.data[i] *= scores.data[i];
  if (valid != ~uint64_t(0)) fill_masked(grads, {valid}, 0.0f);
  convert(state.grad_scores, grads);
  mma_fence();
  mma_AB(state.grad_query, state.grad_scores, ring.first[stage], true);
  mma_commit();
  return stage;
}

template <class Kernel>
VSA_DEVICE void fine_backward_q_consume(typename Kernel::Shared& shared, const FineBackwardQMaps& maps,
                                        const FineBackwardParams& params,
                                        const FineBackwardTask<Kernel::kConsumers>& task, int consumer) {
  bool exists = consumer < task.cubes;
  int cube = exists ? task.cube(params.q_grid, consumer) : 0;
  int64_t row = (int64_t(task.batch) * params.heads + task.head) * params.q_grid.num_cubes() + cube;
  FineBackwardQState<Kernel> state;
  zero(state.grad_query);
  if (exists) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      state.lse_log2.data[half] = kLog2E * __ldg(params.lse + row * kCubeTokens + tile_row(half));
      state.minus_delta.data[half] = -__ldg(params.delta + row * kCubeTokens + tile_row(half));
    }
    shared.ring.resident[consumer].wait(0);
    if constexpr (Kernel::kQueryInRegisters) load(state.query, shared.first[consumer]);
  }
  auto step = [&state, &shared, consumer, &params](int stage, int pending) {
    return fine_backward_q_step<Kernel>(state, shared, consumer, params.scale_log2, stage, pending);
  };
  walk_ring(shared.ring, consumer, step, [&state] { state.template finish<0>(); });
  if (!exists) return;

  CubeAddress address = task.address(params.q_grid, cube);
  uint64_t real = params.q_grid.valid_slots(address.origin);
  PooledRows pooled(params, params.q_grid, address, cube, real);
  scale_and_add_rows(state.grad_query, params.scale, static_cast<const typename Kernel::T*>(params.dq_pooled),
                     pooled);
  // Rows of pads: whatever they were computed from, NaN included.
  if (params.q_block_sizes) real &= CubeGrid::ones(__ldg(params.q_block_sizes + cube));
  fill_rows(state.grad_query, real, 0.0f);
  store_gradient(state.grad_query, shared.first[consumer], consumer, maps.grad_query, params.grad_query,
                 address);
  store_wait_read<0>();  // shared memory outlives the last store's reading
}

template <int kHeadDim, class T>
VSA_DEVICE void fine_backward_q(const FineBackwardQMaps& maps, const FineBackwardParams& params) {
  using Kernel = FineBackwardQ<kHeadDim, T>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  if (threadIdx.x == 0) {
    shared.ring.init();
    fence_barrier_init();
  }
  __syncthreads();

  FineBackwardTask<Kernel::kConsumers> task(params.q_grid, params.heads);
  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    auto role = RingRole(warp_id() % Kernel::Ring::kWarps);
    if (role <= RingRole::kLists) fine_backward_q_produce<Kernel>(shared, maps, params, task, role);
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_backward_q_consume<Kernel>(shared, maps, params, task, warpgroup);
  }
}

}  // namespace vsa
