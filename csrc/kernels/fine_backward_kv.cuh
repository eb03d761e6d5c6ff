// Fine stage, backward, key side: dK and dV, each written once.
//
// A CTA takes two key cubes, one consumer warpgroup each, which keeps K and V. The producer walks the merged
// lists of the query cubes that chose them and loads each one's Q and dO once, with its LSE and delta. Rows
// are keys: S^T = K Q^T, dP^T = V dO^T, so that P^T and dS^T are matrix operands in registers. Per member
// tile i:
//
//   tensor cores   | S(i)     | dP(i) - delta |      | dV += P(i)^T dO | dK += dS(i)^T Q | S(i+1)
//   consumer       | release i-1 | P(i) -------- | dS(i) ----------- | go round the ring
//
// The other consumer's products fill the gaps. At head_dim 128 a step waits for dK and releases its own
// stage.
#pragma once

#include "kernels/fine_backward.cuh"

namespace vsa {

struct FineBackwardKvMaps {
  CUtensorMap query, key, value, grad_out, grad_key, grad_value;
};

struct alignas(16) QueryInfo : TileInfo {
  float lse[kCubeTokens], delta[kCubeTokens];  // alike +inf and 0 in slots without a token
};
static_assert(sizeof(QueryInfo) == kTileInfoBytes + kBackwardRowBytes);

template <int kHeadDim, class T>
struct FineBackwardKv : FineBackward<kHeadDim, T, kBackwardKvConsumers, QueryInfo> {
  // Into the next step: dV and dK of a stage run beside S of the next. At head_dim 128 the registers do not
  // do for that.
  static constexpr bool kStaysPending = kHeadDim == 64;
  static_assert(sizeof(typename FineBackwardKv::Shared) == fine_backward_kv_shared_bytes(kHeadDim));
};

template <class Kernel>
VSA_DEVICE void fine_backward_kv_produce(typename Kernel::Shared& shared, const FineBackwardKvMaps& maps,
                                         const FineBackwardParams& params,
                                         const FineBackwardTask<Kernel::kConsumers>& task, RingRole role) {
  int64_t row = int64_t(task.batch) * params.heads + task.head;
  const int32_t* offsets =
      params.q_offsets ? params.q_offsets + row * (params.kv_grid.num_cubes() + 1) : nullptr;
  const int32_t* indices = params.q_indices + row * params.q_indices_per_head;
  BlockSets<Kernel::kConsumers> lists;
#pragma unroll
  for (int i = 0; i < Kernel::kConsumers; i++) {
    bool exists = i < task.cubes;
    int cube = task.cube(params.kv_grid, exists ? i : 0);
    int begin = offsets ? __ldg(offsets + cube) : 0;
    int end = offsets ? __ldg(offsets + cube + 1) : params.q_grid.num_cubes();
    lists.start(i, offsets ? indices + begin : nullptr, exists ? end - begin : 0);
    if (role == RingRole::kFirst && exists && elect_one()) {
      load_resident(shared, i, maps.key, params.key, maps.value, params.value,
                    task.address(params.kv_grid, cube));
    }
    __syncwarp();
  }
  TileSource source{params.q_grid, params.q_block_sizes, maps.query, maps.grad_out,
                    params.query,  params.grad_out,      task.batch, task.head};
  int64_t first_row = row * params.q_grid.num_cubes();
  auto load_rows = [&shared, &params, first_row](int stage, int block, Barrier& full) {
    QueryInfo& info = shared.ring.info[stage];
    int64_t first = (first_row + block) * kCubeTokens;
    load_async(info.lse, params.lse + first, sizeof(info.lse), full);
    load_async(info.delta, params.delta + first, sizeof(info.delta), full);
  };
  fill_ring(shared.ring, role, lists, source, kBackwardRowBytes, load_rows);
}

// A consumer's registers through the loop. K and V stay in shared memory: see FineBackwardQ.
template <class Kernel>
struct FineBackwardKvState {
  FloatTile<Kernel::kHeadDim> grad_key, grad_value;
  HalfTile<typename Kernel::T, kCubeTokens> probabilities, grad_scores;  // of the pending stage

  // Until at most kPending products later than those of the pending stage are unfinished.
  template <int kPending>
  VSA_DEVICE void finish() {
    mma_wait<kPending>(grad_value, grad_key, probabilities, grad_scores);
  }
};

// A number for each column, of which a lane holds those of its columns: 2j, 2j + 1 of group j.
struct ColumnVector {
  static constexpr int kRegisters = kCubeTokens / 4;
  float data[kRegisters];

  VSA_DEVICE float of(int i) const { return data[i / 4 * 2 + i % 2]; }  // of a tile's register i
};

VSA_DEVICE void load(ColumnVector& result, const float (&row)[kCubeTokens]) {
#pragma unroll
  for (int j = 0; j < kCubeTokens / 8; j++) {
    float2 pair = *reinterpret_cast<const float2*>(row + 8 * j + tile_column());
    result.data[2 * j] = pair.x;
    result.data[2 * j + 1] = pair.y;
  }
}

template <class Kernel>
VSA_DEVICE int fine_backward_kv_step(FineBackwardKvState<Kernel>& state, typename Kernel::Shared& shared,
                                     int consumer, float scale_log2, int stage, int pending) {
  auto& queries = shared.ring.first[stage];
  auto& grad_outs = shared.ring.second[stage];
  const QueryInfo& info = shared.ring.info[stage];
  FloatTile<kCubeTokens> scores, grads;
  ColumnVector lse, delta;
  // Asked for well before they are needed: they queue up behind the operands of whatever products run.
  load(lse, info.lse);
  load(delta, info.delta);
  mma_fence();
  mma_ABt(scores, shared.first[consumer], queries, false);
  mma_commit();
  keep_apart<1>(stage);
#pragma unroll
  for (int i = 0; i < grads.kRegisters; i++) grads.data[i] = -delta.of(i);
  pin(grads);
  mma_fence();
  mma_ABt(grads, shared.second[consumer], grad_outs, true);
  mma_commit();
  if constexpr (Kernel::kStaysPending) {
    state.template finish<2>();
    if (pending != kNone) shared.ring.release(pending);
  }
  keep_apart<2>(stage);
#pragma unroll
  for (float& x : lse.data) x *= -kLog2E;
  settle(lse, scale_log2);
  mma_wait<1>(scores);
#pragma unroll
  for (int i = 0; i < scores.kRegisters; i++) {
    scores.data[i] = exp2_approx(fmaf(scores.data[i], scale_log2, lse.of(i)));
  }
  convert(state.probabilities, scores);
  mma_fence();
  mma_AB(state.grad_value, state.probabilities, grad_outs, true);
  mma_commit();
  mma_wait<1>(grads);
#pragma unroll
  for (int i = 0; i < grads.kRegisters; i++) grads.data[i] *= scores.data[i];
  convert(state.grad_scores, grads);
  mma_fence();
  mma_AB(state.grad_key, state.grad_scores, queries, true);
  mma_commit();
  if constexpr (Kernel::kStaysPending) return stage;
  state.template finish<0>();
  shared.ring.release(stage);
  return kNone;
}

template <class Kernel>
VSA_DEVICE void fine_backward_kv_consume(typename Kernel::Shared& shared, const FineBackwardKvMaps& maps,
                                         const FineBackwardParams& params,
                                         const FineBackwardTask<Kernel::kConsumers>& task, int consumer) {
  FineBackwardKvState<Kernel> state;
  zero(state.grad_key);
  zero(state.grad_value);
  if (consumer < task.cubes) shared.ring.resident[consumer].wait(0);
  auto step = [&state, &shared, consumer, &params](int stage, int pending) {
    return fine_backward_kv_step(state, shared, consumer, params.scale_log2, stage, pending);
  };
  walk_ring(shared.ring, consumer, step, [&state] { state.template finish<0>(); });
  if (consumer >= task.cubes) return;

  int cube = task.cube(params.kv_grid, consumer);
  CubeAddress address = task.address(params.kv_grid, cube);
  uint64_t real = params.kv_grid.valid_slots(address.origin);
  using T = typename Kernel::T;
  PooledRows pooled(params, params.kv_grid, address, cube, real);
  scale_and_add_rows(state.grad_key, params.scale, static_cast<const T*>(params.dk_pooled), pooled);
  scale_and_add_rows(state.grad_value, 1.0f, static_cast<const T*>(params.dv_pooled), pooled);
  // Rows of pads: whatever they were computed from, NaN included.
  if (params.block_sizes) real &= CubeGrid::ones(__ldg(params.block_sizes + cube));
  fill_rows(state.grad_key, real, 0.0f);
  fill_rows(state.grad_value, real, 0.0f);
  store_gradient(state.grad_key, shared.first[consumer], consumer, maps.grad_key, params.grad_key, address);
  store_gradient(state.grad_value, shared.second[consumer], consumer, maps.grad_value, params.grad_value,
                 address);
  store_wait_read<0>();  // shared memory outlives the last store's reading
}

template <int kHeadDim, class T>
VSA_DEVICE void fine_backward_kv(const FineBackwardKvMaps& maps, const FineBackwardParams& params) {
  using Kernel = FineBackwardKv<kHeadDim, T>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  if (threadIdx.x == 0) {
    shared.ring.init();
    fence_barrier_init();
  }
  __syncthreads();

  FineBackwardTask<Kernel::kConsumers> task(params.kv_grid, params.heads);
  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    auto role = RingRole(warp_id() % Kernel::Ring::kWarps);
    if (role <= RingRole::kLists) fine_backward_kv_produce<Kernel>(shared, maps, params, task, role);
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_backward_kv_consume<Kernel>(shared, maps, params, task, warpgroup);
  }
}

}  // namespace vsa
