// Fine stage, forward (VSA, section 2.2): every query cube attends, token by token, to the key cubes of its
// list.
//
// A CTA takes task after task; a task is a few neighbouring query cubes of one head, one consumer warpgroup
// each. Three producer warps load: one the queries, one the keys, one the values. The latter two walk the
// consumers' merged lists in pairs of cubes that the same consumers chose, so that each is loaded once; they
// run ahead over the end of a task, and the next one's tiles land during the epilogue. A consumer works on
// the stages it is a member of, 128 keys at a time. Per member stage:
//
//   tensor cores   | scores(i+1) = Q K^T | out += P(i) V(i) |
//   consumer       |        wait scores  | exp(i+1), 1st half | wait out | exp(i+1), 2nd half, P(i+1)
//
// The exponentials refer to the maximum of a row's first tile; only where they outgrow it is it raised.
// A consumer holds the values of its pending product for at most kStages - 1 stages of others, then finishes
// it alone: the ring always has room for the stage that everyone waits for, whatever the lists.
#pragma once

#include "kernels/fine_forward_params.h"
#include "kernels/gate.cuh"
#include "kernels/online_softmax.cuh"
#include "kernels/pair_ring.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

struct FineForwardMaps {
  CUtensorMap query, key, value;
};

template <int kHeadDim_, class T_>
struct FineForward {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kForwardConsumers;
  static constexpr int kStages = fine_forward_stages(kHeadDim);
  static constexpr int kStageTokens = 2 * kCubeTokens;
  static constexpr int kProducerRegisters = 72;
  static constexpr int kConsumerRegisters = 216;

  using QueryTile = SharedTile<T, kCubeTokens, kHeadDim>;
  using Ring = PairRing<SharedTile<T, kStageTokens, kHeadDim>, kStages, kConsumers>;
  struct Shared {
    QueryTile query[kConsumers];
    Ring ring;
    Barrier query_full[kConsumers];   // the producer's arrival and the tile's bytes
    Barrier query_empty[kConsumers];  // an arrival by each warp of the consumer, after its last product
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

// The warp that loads queries.
template <class Kernel>
VSA_DEVICE void fine_forward_load_queries(typename Kernel::Shared& shared, const FineForwardMaps& maps,
                                          const FineForwardParams& params) {
  uint32_t phase[Kernel::kConsumers] = {};
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
#pragma unroll
    for (int i = 0; i < Kernel::kConsumers; i++) {
      if (i >= task.cubes) continue;
      shared.query_empty[i].wait(phase[i] ^ 1);
      phase[i] ^= 1;
      if (elect_one()) {
        CubeAddress cube{task.batch, task.head, params.q_grid.origin(task.cube(params.q_grid, i))};
        shared.query_full[i].arrive_expect(sizeof(shared.query[i]));
        load_cube(shared.query[i], maps.query, params.query, cube, shared.query_full[i]);
      }
      __syncwarp();
    }
  }
}

template <class Kernel>
VSA_DEVICE void fine_forward_start(BlockPairs<Kernel::kConsumers>& pairs, const FineForwardParams& params,
                                   const FineForwardTask& task) {
#pragma unroll
  for (int i = 0; i < Kernel::kConsumers; i++) {
    bool exists = i < task.cubes;
    int cube = task.cube(params.q_grid, exists ? i : 0);
    pairs.start(i, params.lists.list(task.batch, task.head, cube),
                exists ? params.lists.count(task.batch, task.head, cube) : 0);
  }
}

VSA_DEVICE int valid_prefix(const FineForwardParams& params, int block) {
  return params.block_sizes ? __ldg(params.block_sizes + block) : kCubeTokens;
}

VSA_DEVICE uint64_t valid_rows(const FineForwardParams& params, int block, const Extent3& origin) {
  return params.kv_grid.valid_slots(origin) & CubeGrid::ones(valid_prefix(params, block));
}

// The warp that loads keys and says what a stage holds.
template <class Kernel>
VSA_DEVICE void fine_forward_load_keys(typename Kernel::Ring& ring, const FineForwardMaps& maps,
                                       const FineForwardParams& params) {
  RingPosition<Kernel::kStages> at;
  BlockPairs<Kernel::kConsumers> pairs(ring.key_plan);
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
    fine_forward_start<Kernel>(pairs, params, task);
    BlockPair pair;
    do {
      pair = pairs.next();
      Extent3 origins[2] = {params.kv_grid.origin(pair.first), params.kv_grid.origin(pair.second)};
      PairInfo info{.members = pair.members, .last = pair.last};
      info.valid[0] = valid_rows(params, pair.first, origins[0]);
      info.valid[1] = pair.padded ? 0 : valid_rows(params, pair.second, origins[1]);
      info.partial = (info.valid[0] & info.valid[1]) != ~uint64_t(0);
      Barrier& full = ring.key_barriers.full[at.stage];
      ring.key_barriers.empty[at.stage].wait(at.phase ^ 1);
      if (elect_one()) {
        ring.info[at.stage] = info;
        if (pair.members) {
          full.arrive_expect(Kernel::Ring::Tile::kBytes);
          load_pair(ring.keys[at.stage], maps.key, params.key, task.batch, task.head, origins, full);
        } else {
          full.arrive();
        }
      }
      __syncwarp();
      at.advance();
    } while (!pair.last);
  }
}

// The warp that loads values.
template <class Kernel>
VSA_DEVICE void fine_forward_load_values(typename Kernel::Ring& ring, const FineForwardMaps& maps,
                                         const FineForwardParams& params) {
  RingPosition<Kernel::kStages> at;
  uint32_t landed_phase = 0;
  BlockPairs<Kernel::kConsumers> pairs(ring.value_plan);
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
    fine_forward_start<Kernel>(pairs, params, task);
    BlockPair pair;
    do {
      pair = pairs.next();
      Extent3 origins[2] = {params.kv_grid.origin(pair.first), params.kv_grid.origin(pair.second)};
      int prefixes[2] = {valid_prefix(params, pair.first), valid_prefix(params, pair.second)};
      bool clear = pair.members && min(prefixes[0], prefixes[1]) < kCubeTokens;
      auto& tile = ring.values[at.stage];
      Barrier& full = ring.value_barriers.full[at.stage];
      Barrier& arrives = clear ? ring.landed : full;
      ring.value_barriers.empty[at.stage].wait(at.phase ^ 1);
      if (elect_one()) {
        if (pair.members) {
          arrives.arrive_expect(Kernel::Ring::Tile::kBytes);
          load_pair(tile, maps.value, params.value, task.batch, task.head, origins, arrives);
        } else {
          full.arrive();
        }
      }
      __syncwarp();
      if (clear) {
        // Pads hold real memory, perhaps NaN, and 0 * NaN would spoil the products.
        ring.landed.wait(landed_phase);
        landed_phase ^= 1;
        for (int i = 0; i < 2; i++) zero_rows(tile, i * kCubeTokens + prefixes[i], (i + 1) * kCubeTokens);
        fence_async_shared();  // wgmma reads the zeros through the async proxy
        __syncwarp();
        if (elect_one()) full.arrive();
      }
      at.advance();
    } while (!pair.last);
  }
}

// A consumer's registers through the loop.
template <class Kernel>
struct FineForwardState {
  FloatTile<Kernel::kHeadDim> out;
  HalfTile<typename Kernel::T, Kernel::kStageTokens> probabilities;  // of the pending stage
  OnlineSoftmax softmax;
};

// Where all consumers work on a stage, they issue its products one after the other: the softmax of one then
// runs beside the products of the others, not beside theirs. A barrier for each consumer, which it waits at
// and its predecessor arrives at; the last consumer is the first one's.
template <int kConsumers>
struct Turns {
  static constexpr int kThreads = 2 * kWarpgroupThreads;

  // Before the first turn.
  VSA_DEVICE static void start(int consumer) {
    if (consumer == kConsumers - 1) pass(consumer);
  }
  // After the last: takes up the arrival that nobody has waited for.
  VSA_DEVICE static void finish(int consumer) {
    if (consumer == 0) await(consumer);
  }
  VSA_DEVICE static void await(int consumer) { named_barrier_sync(1 + consumer, kThreads); }
  VSA_DEVICE static void pass(int consumer) {
    named_barrier_arrive(1 + (consumer + 1 == kConsumers ? 0 : consumer + 1), kThreads);
  }
};

// Where a consumer stands in the ring. Its place among the values lags behind: it is that of the pending
// product, or the keys'.
template <int kStages>
struct ConsumerPosition {
  RingPosition<kStages> keys, values;
  int passed = 0;      // stages of others from `values` to `keys`, the pending one apart
  bool known = false;  // the next three are those of the stage at `keys`, which has landed
  bool last, member, all;

  // By vote: the compiler then knows that warps stay whole.
  template <class Ring>
  VSA_DEVICE void read(const Ring& ring, int consumer) {
    const PairInfo& info = ring.info[keys.stage];
    last = __any_sync(0xffffffffu, info.last);
    member = __any_sync(0xffffffffu, info.members >> consumer & 1);
    all = __any_sync(0xffffffffu, info.members == (1u << Ring::kConsumers) - 1);
    known = true;
  }

  template <class Ring>
  VSA_DEVICE void await(Ring& ring, int consumer) {
    if (known) return;
    ring.key_barriers.full[keys.stage].wait(keys.phase);
    read(ring, consumer);
  }

  // On to the next stage; what it holds, if it has landed.
  template <class Ring>
  VSA_DEVICE void advance(Ring& ring, int consumer) {
    keys.advance();
    known = false;
    if (__all_sync(0xffffffffu, ring.key_barriers.full[keys.stage].test(keys.phase))) read(ring, consumer);
  }

  // Values of others, up to the keys' place.
  template <class Ring>
  VSA_DEVICE void pass_values(Ring& ring) {
    for (; passed > 0; passed--) {
      ring.value_barriers.full[values.stage].wait(values.phase);
      ring.value_barriers.release(values.stage);
      values.advance();
    }
  }
};

// This warp's rows of scores = query key^T by plain arithmetic, where the products are gone: exponentials
// have overtaken the reference by 100 binary orders. Takes as long as dozens of steps.
template <class T, int kCols, int kK>
VSA_DEVICE void multiply_again(FloatTile<kCols>& scores, SharedTile<T, 64, kK>& query,
                               SharedTile<T, kCols, kK>& key) {
  int row = tile_row(0), column = tile_column();
  forget(row), forget(column);  // no address of this is worth a register in the loop
  zero(scores);
#pragma unroll 1
  for (int k = 0; k < kK; k += 2) {
    auto pair = [k](auto& tile, int row) {
      return unpack<T>(reinterpret_cast<const uint32_t*>(tile.chunk(row, k / 8))[k % 8 / 2]);
    };
    float2 q[2] = {pair(query, row), pair(query, row + 8)};
#pragma unroll
    for (int i = 0; i < kCols / 4; i++) {
      float2 x = pair(key, i / 2 * 8 + column + i % 2);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float& score = scores.data[i / 2 * 4 + 2 * half + i % 2];
        score = fmaf(q[half].x, x.x, fmaf(q[half].y, x.y, score));
      }
    }
  }
}

// scores = query key^T of the stage at `at`, while the product of the pending one, out += probabilities
// value, runs; leaves the probabilities of this one pending, and `at` at the next.
template <class Kernel, bool kPending>
VSA_DEVICE void fine_forward_step(FineForwardState<Kernel>& state, typename Kernel::QueryTile& query,
                                  typename Kernel::Ring& ring, ConsumerPosition<Kernel::kStages>& at,
                                  int consumer) {
  using Turn = Turns<Kernel::kConsumers>;
  const int stage = at.keys.stage;
  const bool all = at.all;
  const RingPosition<Kernel::kStages> pending = at.values;
  FloatTile<Kernel::kStageTokens> scores;
  if constexpr (kPending) ring.value_barriers.full[pending.stage].wait(pending.phase);
  if (all) Turn::await(consumer);
  mma_fence();
  mma_ABt(scores, query, ring.keys[stage], false);
  mma_commit();
  if constexpr (kPending) {
    mma_AB(state.out, state.probabilities, ring.values[pending.stage], true);
    mma_commit();
  }
  if (all) Turn::pass(consumer);
  at.advance(ring, consumer);
  if constexpr (kPending) {
    mma_wait<1>(scores);
  } else {
    mma_wait<0>(scores);
  }
  const PairInfo& info = ring.info[stage];
  if (info.partial) fill_masked(scores, info.valid, -INFINITY);
  constexpr int kEnd = Kernel::kStageTokens, kMiddle = kEnd / 2;
  RowVector sums{}, factor;
  if constexpr (!kPending) {
    state.softmax.raise_to_maximum(scores, factor);
    mul_row(state.out, factor);
  }
  // The pending product is done by the middle of the exponentials: its operand's registers are then free.
  state.softmax.template exponentiate<0, kMiddle>(scores, sums);
  if constexpr (kPending) {
    mma_wait<0>(state.out, state.probabilities);
    ring.value_barriers.release(pending.stage);
  }
  convert<0, kMiddle>(state.probabilities, scores);
  state.softmax.template exponentiate<kMiddle, kEnd>(scores, sums);
  if (kPending && state.softmax.template exceeded<typename Kernel::T>(sums)) {
    if (!state.softmax.raise_to_exponentials(scores, sums, factor)) {
      multiply_again(scores, query, ring.keys[stage]);
      if (info.partial) fill_masked(scores, info.valid, -INFINITY);
      state.softmax.raise_to_maximum(scores, factor);
      sums = {};
      state.softmax.template exponentiate<0, kEnd>(scores, sums);
    }
    mul_row(state.out, factor);
    convert<0, kMiddle>(state.probabilities, scores);
  }
  convert<kMiddle, kEnd>(state.probabilities, scores);
  state.softmax.add(sums);
  ring.key_barriers.release(stage);
}

template <class Kernel>
VSA_DEVICE void fine_forward_finish(FineForwardState<Kernel>& state, typename Kernel::Ring& ring,
                                    const RingPosition<Kernel::kStages>& pending) {
  ring.value_barriers.full[pending.stage].wait(pending.phase);
  mma_fence();
  mma_AB(state.out, state.probabilities, ring.values[pending.stage], true);
  mma_commit();
  mma_wait<0>(state.out, state.probabilities);
  ring.value_barriers.release(pending.stage);
}

// A consumer's way round the ring, for one task. True if the last product is still pending.
template <class Kernel>
VSA_DEVICE bool fine_forward_attend(FineForwardState<Kernel>& state, typename Kernel::QueryTile& query,
                                    typename Kernel::Ring& ring, ConsumerPosition<Kernel::kStages>& at,
                                    int consumer) {
  bool pending = false, last;
  do {
    at.await(ring, consumer);
    last = at.last;
    if (at.member && pending) {
      fine_forward_step<Kernel, true>(state, query, ring, at, consumer);
      at.values.advance();
      at.pass_values(ring);
    } else if (at.member) {
      fine_forward_step<Kernel, false>(state, query, ring, at, consumer);
      pending = true;
    } else {
      ring.key_barriers.release(at.keys.stage);
      at.passed++;
      if (pending && at.passed == Kernel::kStages - 1) {
        fine_forward_finish(state, ring, at.values);
        at.values.advance();
        pending = false;
      }
      if (!pending) at.pass_values(ring);
      at.advance(ring, consumer);
    }
  } while (!last);
  return pending;
}

// One consumer's rows to global memory. Slots outside the video have none.
template <class Kernel>
VSA_DEVICE void fine_forward_store(const FloatTile<Kernel::kHeadDim>& tile, const TokenRows& rows,
                                   const CubeGrid& grid, const CubeAddress& cube) {
  using T = typename Kernel::T;
  T* row[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int64_t token = grid.token(cube.origin, tile_row(half));
    row[half] = token < 0 ? nullptr : static_cast<T*>(rows.at(cube.batch, token, cube.head));
  }
  store_rows<T>(row, tile);
}

template <class Kernel>
VSA_DEVICE void fine_forward_epilogue(FineForwardState<Kernel>& state, const FineForwardParams& params,
                                      const CubeAddress& address, int cube) {
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
    if (params.store_out_fine) fine_forward_store<Kernel>(state.out, params.out_fine, params.q_grid, address);
    multiply_gate<typename Kernel::T>(state.out, params.gate_fine, params.q_grid, address, valid);
    if (params.coarse) {
      int64_t first = (int64_t(address.batch) * params.heads + address.head) * params.coarse_grid.num_cubes();
      const auto* coarse = static_cast<const typename Kernel::T*>(params.coarse) + first * Kernel::kHeadDim;
      add_gated_coarse(state.out, coarse, params.coarse_grid, params.gate_coarse, params.q_grid, address,
                       valid);
    }
  }
  fine_forward_store<Kernel>(state.out, params.out, params.q_grid, address);
}

// One consumer warpgroup.
template <class Kernel>
VSA_DEVICE void fine_forward_consume(typename Kernel::Shared& shared, const FineForwardParams& params,
                                     int consumer) {
  ConsumerPosition<Kernel::kStages> at;
  uint32_t query_phase = 0;
  Turns<Kernel::kConsumers>::start(consumer);
  for (int index = blockIdx.x; index < params.num_tasks; index += gridDim.x) {
    FineForwardTask task = fine_forward_task<Kernel>(params, index);
    bool exists = consumer < task.cubes;
    FineForwardState<Kernel> state{.softmax = OnlineSoftmax(params.scale_log2)};
    zero(state.out);
    if (exists) {
      shared.query_full[consumer].wait(query_phase);
      query_phase ^= 1;
    }
    bool pending = fine_forward_attend(state, shared.query[consumer], shared.ring, at, consumer);
    if (!exists) continue;
    __syncwarp();
    if (lane_id() == 0) shared.query_empty[consumer].arrive();
    if (pending) {
      fine_forward_finish(state, shared.ring, at.values);
      at.values.advance();
      at.pass_values(shared.ring);
    }
    int cube = task.cube(params.q_grid, consumer);
    fine_forward_epilogue(state, params, {task.batch, task.head, params.q_grid.origin(cube)}, cube);
  }
  Turns<Kernel::kConsumers>::finish(consumer);
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
    for (const CUtensorMap* map : {&maps.query, &maps.key, &maps.value}) prefetch_map(*map);
  }
  __syncthreads();

  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    int warp = warp_id() % 4;
    if (warp == 0) fine_forward_load_keys<Kernel>(shared.ring, maps, params);
    if (warp == 1) fine_forward_load_values<Kernel>(shared.ring, maps, params);
    if (warp == 2) fine_forward_load_queries<Kernel>(shared, maps, params);
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_forward_consume<Kernel>(shared, params, warpgroup);
  }
}

}  // namespace vsa
