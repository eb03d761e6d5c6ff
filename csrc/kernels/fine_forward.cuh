// Fine stage, forward (VSA, section 2.2): every query cube attends, token by token, to the key cubes of its
// list.
//
// A CTA takes task after task; a task is a few neighbouring query cubes of one head, one consumer warpgroup
// each. The producer warpgroup walks their merged lists and loads each key and value cube once into a ring;
// it runs ahead over the end of a task, so that the next one's tiles land during the epilogue. A consumer
// works on the stages it is a member of. Per member tile:
//
//   tensor cores   | scores(i+1) = Q K^T | out += P(i) V(i)  |
//   consumer       |        wait scores  | softmax(i+1) ---- | wait out, rescale, P(i+1), release values(i)
//
// A consumer holds the stage of its pending product for at most kStages - 2 stages of others, then finishes
// it alone: the ring always has room for the stage that everyone waits for, whatever the lists.
#pragma once

#include "kernels/fine_forward_params.h"
#include "kernels/gate.cuh"
#include "kernels/online_softmax.cuh"
#include "kernels/shared_ring.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

struct FineForwardMaps {
  CUtensorMap query, key, value, out, out_fine;
};

template <int kHeadDim_, class T_>
struct FineForward {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = fine_forward_consumers(kHeadDim);
  static constexpr int kStages = fine_forward_stages(kHeadDim);
  // Enough for the producer to keep its lists and coordinates: at 24 it took 1400 clocks a tile.
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 72 : 80;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 216 : 144;

  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  using Ring = SharedRing<Tile, kStages, kConsumers, StageInfo, true>;
  struct Shared {
    Tile query[kConsumers];
    Tile out[kConsumers];             // on its way to global memory
    Ring ring;                        // first: keys, second: values
    Barrier query_full[kConsumers];   // the producer's arrival and the tile's bytes
    Barrier query_empty[kConsumers];  // an arrival by each warp of the consumer, once it holds the tile in
                                      // registers
  };
  static_assert(sizeof(Shared) == fine_forward_shared_bytes(kHeadDim));
};

// Query cubes of one head: those at `cubes` positions from `first` on, in the order along time.
struct FineForwardTask {
  int batch, head, first, cubes;

  VSA_DEVICE int cube(const CubeGrid& grid, int consumer) const {
    return grid.cube_along_time(first + consumer);
  }
};

template <class Kernel>
VSA_DEVICE FineForwardTask fine_forward_task(const FineForwardParams& params, int index) {
  int groups = ceil_div(params.q_grid.num_cubes(), Kernel::kConsumers);
  int row = index / groups;
  int first = (index - row * groups) * Kernel::kConsumers;
  return {row / params.heads, row % params.heads, first,
          min(Kernel::kConsumers, params.q_grid.num_cubes() - first)};
}

// The whole producer warp.
template <class Kernel>
VSA_DEVICE void fine_forward_produce(typename Kernel::Shared& shared, const FineForwardMaps& maps,
                                     const FineForwardParams& params) {
  RingProducer<typename Kernel::Ring> producer;
  uint32_t query_phase[Kernel::kConsumers] = {};
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
    MergedList<Kernel::kConsumers> lists(params.kv_grid, params.block_sizes);
#pragma unroll
    for (int i = 0; i < Kernel::kConsumers; i++) {
      bool exists = i < task.cubes;
      int cube = task.cube(params.q_grid, exists ? i : 0);
      lists.start(i, params.lists.list(task.batch, task.head, cube),
                  exists ? params.lists.count(task.batch, task.head, cube) : 0);
      if (!exists) continue;
      shared.query_empty[i].wait(query_phase[i] ^ 1);
      query_phase[i] ^= 1;
      if (elect_one()) {
        shared.query_full[i].arrive_expect(sizeof(shared.query[i]));
        load_cube(shared.query[i], maps.query, params.query,
                  {task.batch, task.head, params.q_grid.origin(cube)}, shared.query_full[i]);
      }
      __syncwarp();
    }
    RingSource source{maps.key, maps.value, params.key, params.value, task.batch, task.head};
    produce(shared.ring, producer, lists, source, 0, [](int, int, Barrier&) {});
  }
}

// A consumer's registers through the loop.
template <class Kernel>
struct FineForwardState {
  HalfTile<typename Kernel::T, Kernel::kHeadDim> query;
  FloatTile<Kernel::kHeadDim> out;
  HalfTile<typename Kernel::T, kCubeTokens> probabilities;  // of the pending stage
  OnlineSoftmax softmax;
};

// scores = query key^T of `stage`, while the pending product out += probabilities value of stage `pending`
// runs; leaves the probabilities of `stage` pending.
template <class Kernel, bool kPending>
VSA_DEVICE void fine_forward_step(FineForwardState<Kernel>& state, typename Kernel::Ring& ring, int stage,
                                  int pending, uint64_t valid) {
  FloatTile<kCubeTokens> scores;
  mma_fence();
  mma_ABt(scores, state.query, ring.first[stage], false);
  mma_commit();
  if constexpr (kPending) {
    mma_AB(state.out, state.probabilities, ring.second[pending], true);
    mma_commit();
    mma_wait<1>(scores);
  } else {
    mma_wait<0>(scores);
  }
  ring.release_first(stage);
  if (valid != ~uint64_t(0)) fill_masked(scores, valid, -INFINITY);
  RowVector factor;
  bool rescale = state.softmax.update(scores, factor);
  if constexpr (kPending) {
    mma_wait<0>(state.out, state.probabilities);
    ring.release_second(pending);
  }
  if (rescale) mul_row(state.out, factor);
  convert(state.probabilities, scores);
}

template <class Kernel>
VSA_DEVICE void fine_forward_finish(FineForwardState<Kernel>& state, typename Kernel::Ring& ring,
                                    int pending) {
  mma_fence();
  mma_AB(state.out, state.probabilities, ring.second[pending], true);
  mma_commit();
  mma_wait<0>(state.out, state.probabilities);
  ring.release_second(pending);
}

// A consumer's way round the ring, for one task.
template <class Kernel>
VSA_DEVICE void fine_forward_attend(FineForwardState<Kernel>& state, typename Kernel::Ring& ring,
                                    RingPosition<Kernel::kStages>& at, int consumer) {
  constexpr int kNone = -1;
  int pending = kNone, passed = 0;
  uint32_t members;
  do {
    ring.full[at.stage].wait(at.phase);
    StageInfo info = ring.info[at.stage];
    members = info.members;
    if (members >> consumer & 1) {
      if (pending == kNone) {
        fine_forward_step<Kernel, false>(state, ring, at.stage, pending, info.valid);
      } else {
        fine_forward_step<Kernel, true>(state, ring, at.stage, pending, info.valid);
      }
      pending = at.stage;
      passed = 0;
    } else {
      ring.release(at.stage);
      if (pending != kNone && (members == 0 || ++passed == Kernel::kStages - 2)) {
        fine_forward_finish(state, ring, pending);
        pending = kNone;
      }
    }
    at.advance();
  } while (members != 0);
}

// One consumer's tile through shared memory to global.
template <class Kernel>
VSA_DEVICE void fine_forward_store(const FloatTile<Kernel::kHeadDim>& tile, typename Kernel::Tile& staging,
                                   int consumer, const CUtensorMap& map, const CubeCoordinates& at,
                                   const CubeAddress& cube) {
  bool first_thread = threadIdx.x % kWarpgroupThreads == 0;
  HalfTile<typename Kernel::T, Kernel::kHeadDim> rounded;
  convert(rounded, tile);
  if (first_thread) store_wait_read<0>();  // the copy engine has read the tile that was here before
  named_barrier_sync(1 + consumer, kWarpgroupThreads);
  store(staging, rounded);
  fence_async_shared();  // the copy engine reads what this warpgroup wrote
  named_barrier_sync(1 + consumer, kWarpgroupThreads);
  if (first_thread) {
    store_cube(map, at, cube, staging);
    store_commit();
  }
}

template <class Kernel>
VSA_DEVICE void fine_forward_epilogue(FineForwardState<Kernel>& state, typename Kernel::Tile& staging,
                                      int consumer, const FineForwardMaps& maps,
                                      const FineForwardParams& params, const CubeAddress& address, int cube) {
  int prefix = params.q_block_sizes ? __ldg(params.q_block_sizes + cube) : kCubeTokens;
  uint64_t valid = params.q_grid.valid_slots(address.origin) & CubeGrid::ones(prefix);
  int64_t row = (int64_t(address.batch) * params.heads + address.head) * params.q_grid.num_cubes() + cube;

  state.softmax.finish();
  RowVector normaliser;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    bool real = valid >> tile_row(half) & 1;
    normaliser.data[half] = state.softmax.normaliser(half);
    if (lane_id() % 4 == 0) {
      params.lse[row * kCubeTokens + tile_row(half)] = real ? state.softmax.lse(half) : INFINITY;
    }
  }
  mul_row(state.out, normaliser);
  fill_rows(state.out, valid, 0.0f);  // rows of pads: whatever they were computed from, NaN included

  if (params.combine) {
    if (params.store_out_fine) {
      fine_forward_store<Kernel>(state.out, staging, consumer, maps.out_fine, params.out_fine, address);
    }
    multiply_gate<typename Kernel::T>(state.out, params.gate_fine, params.q_grid, address, valid);
    if (params.coarse) {
      int64_t first = (int64_t(address.batch) * params.heads + address.head) * params.coarse_grid.num_cubes();
      const auto* coarse = static_cast<const typename Kernel::T*>(params.coarse) + first * Kernel::kHeadDim;
      add_gated_coarse(state.out, coarse, params.coarse_grid, params.gate_coarse, params.q_grid, address,
                       valid);
    }
  }
  fine_forward_store<Kernel>(state.out, staging, consumer, maps.out, params.out, address);
}

// One consumer warpgroup.
template <class Kernel>
VSA_DEVICE void fine_forward_consume(typename Kernel::Shared& shared, const FineForwardMaps& maps,
                                     const FineForwardParams& params, int consumer) {
  RingPosition<Kernel::kStages> at;
  uint32_t query_phase = 0;
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
    bool exists = consumer < task.cubes;
    FineForwardState<Kernel> state{.softmax = OnlineSoftmax(params.scale_log2)};
    zero(state.out);
    if (exists) {
      shared.query_full[consumer].wait(query_phase);
      query_phase ^= 1;
      load(state.query, shared.query[consumer]);
      __syncwarp();
      if (elect_one()) shared.query_empty[consumer].arrive();
    }
    fine_forward_attend(state, shared.ring, at, consumer);
    if (exists) {
      int cube = task.cube(params.q_grid, consumer);
      CubeAddress address{task.batch, task.head, params.q_grid.origin(cube)};
      fine_forward_epilogue(state, shared.out[consumer], consumer, maps, params, address, cube);
    }
  }
  if (threadIdx.x % kWarpgroupThreads == 0)
    store_wait_read<0>();  // shared memory outlives the last store's reading
}

template <int kHeadDim, class T>
VSA_DEVICE void fine_forward(const FineForwardMaps& maps, const FineForwardParams& params) {
  using Kernel = FineForward<kHeadDim, T>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  if (threadIdx.x == 0) {
    shared.ring.init();
    for (Barrier& barrier : shared.query_full) barrier.init(1);
    for (Barrier& barrier : shared.query_empty) barrier.init(kWarpgroupThreads / kWarpThreads);
    fence_barrier_init();
    for (const CUtensorMap* map : {&maps.query, &maps.key, &maps.value, &maps.out}) prefetch_map(*map);
  }
  __syncthreads();

  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    if (warp_in_warpgroup() == 0) fine_forward_produce<Kernel>(shared, maps, params);
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_forward_consume<Kernel>(shared, maps, params, warpgroup);
  }
}

}  // namespace vsa
