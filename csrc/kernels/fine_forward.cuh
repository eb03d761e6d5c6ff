// Fine stage, forward (VSA, section 2.2): every query cube attends, token by token, to the key cubes of its
// list.
//
// A CTA takes task after task; a task is a few neighbouring query cubes of one head, one consumer warpgroup
// each. Three producer warps load: one the queries, one the keys, one the values, the latter two in the order
// of the schedule; they run ahead over the end of a task, and the next one's tiles land during the epilogue.
// A consumer works on the stages it is a member of, 128 keys at a time. Per member stage:
//
//   tensor cores   | scores(i+1) = Q K^T | out += P(i) V(i) |
//   consumer       |        wait scores  | release K, exp(i+1), half | wait out | other half, P(i+1)
//
// The exponentials refer to the maximum of a row's first tile; only where they outgrow it is it raised.
// A consumer holds the values of its pending product for fewer than kStages stages, then finishes it alone:
// the ring always has room for the stage that everyone waits for, whatever the lists.
//
// Where every cube attends to all, tasks need the same keys: a variant pairs two CTAs in a cluster, each of
// which loads half of a stage for both (tile_ring.cuh). A pair takes neighbouring tasks of one head.
#pragma once

#include "kernels/fine_forward_params.h"
#include "kernels/gate.cuh"
#include "kernels/online_softmax.cuh"
#include "kernels/task_queue.cuh"
#include "kernels/tile_ring.cuh"
#include "kernels/token_rows.cuh"
#include "tiles/mma.cuh"

namespace vsa {

struct FineForwardMaps {
  CUtensorMap query;
  ListedMaps key, value;
};

struct ValidRows {
  uint64_t blocks[kForwardStageBlocks];  // bit per key: a real token; only of partial stages
};
static_assert(sizeof(ValidRows) == kValidRowsBytes);

// kPaired: without lists and block_sizes, in clusters of two CTAs.
template <int kHeadDim_, class T_, bool kPaired_>
struct FineForward {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kPaired = kPaired_;
  static constexpr int kConsumers = fine_forward_consumers(kHeadDim);
  static constexpr int kStages = fine_forward_stages(kHeadDim);
  static constexpr int kStageTokens = kForwardStageBlocks * kCubeTokens;
  // 504 of a lane of each warpgroup with three of them, 512 with four.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;

  using QueryTile = SharedTile<T, kCubeTokens, kHeadDim>;
  using Tile = SharedTile<T, kStageTokens, kHeadDim>;
  using KeyRing = TileRing<Tile, kStages, kConsumers, ValidRows, kPaired>;
  using ValueRing = TileRing<Tile, kStages, kConsumers, Nothing, kPaired>;
  using Run = StageRun<kForwardStageBlocks, !kPaired>;
  struct Shared {
    QueryTile query[kConsumers];
    KeyRing keys;
    ValueRing values;
    Barrier query_full[kConsumers];   // the producer's arrival and the tile's bytes
    Barrier query_empty[kConsumers];  // an arrival by each warp of the consumer, after its last product
    TaskQueue queue;
  };
  static constexpr int kReadingWarps = 3 + kConsumers * KeyRing::kWarps;  // of the queue
  static_assert(sizeof(Shared) == fine_forward_shared_bytes(kHeadDim));
};

template <class Kernel>
VSA_DEVICE Task fine_forward_task(const FineForwardParams& params, int index) {
  return task_at<Kernel::kConsumers>(params.q_grid, params.heads, params.groups, params.schedule.whole_tasks,
                                     index);
}

template <class Kernel>
VSA_DEVICE typename Kernel::Run fine_forward_run(const FineForwardParams& params, const Task& task,
                                                 int index) {
  ListedBlocks keys{params.kv_grid, params.block_sizes};
  auto run = stage_run<Kernel::kConsumers, kForwardStageBlocks, !Kernel::kPaired>(
      params.schedule, params.q_grid, keys, task, index);
  // The peer needs the halves of the stages that a task without a block loads.
  if (!Kernel::kPaired && task.blocks == 0) run.count = 0;
  return run;
}

// The warp that loads queries.
template <class Kernel>
VSA_DEVICE void fine_forward_load_queries(typename Kernel::Shared& shared, const FineForwardMaps& maps,
                                          const FineForwardParams& params) {
  uint32_t phases = 0;  // a bit a consumer
  int index;
  while ((index = next_task(shared.queue).index) < params.num_tasks) {
    Task task = fine_forward_task<Kernel>(params, index);
    for (int i = 0; i < task.blocks; i++) {
      shared.query_empty[i].wait(phases >> i & 1 ^ 1);
      phases ^= 1u << i;
      if (elect_one()) {
        CubeAddress cube = task.address(params.q_grid, task.block(params.q_grid, i));
        shared.query_full[i].arrive_expect(sizeof(shared.query[i]));
        load_cube(shared.query[i], maps.query, params.query, cube, shared.query_full[i]);
      }
      __syncwarp();
    }
  }
}

// The warp that loads keys and says which of them are real.
template <class Kernel>
VSA_DEVICE void fine_forward_load_keys(typename Kernel::KeyRing& ring, TaskQueue& queue,
                                       const FineForwardMaps& maps, const FineForwardParams& params) {
  TileProducer<typename Kernel::KeyRing, kForwardStageBlocks, true> producer(ring);
  int index;
  while ((index = next_task(queue).index) < params.num_tasks) {
    Task task = fine_forward_task<Kernel>(params, index);
    typename Kernel::Run run = fine_forward_run<Kernel>(params, task, index);
    auto load = [&ring, &maps, &params, &task, &run](const Stage& stage, int slot, Barrier& full) {
      if (is_partial(stage)) run.valid_masks(ring.extras[slot].blocks, stage);
      full.arrive_expect(Kernel::Tile::kBytes);
      load_listed<kForwardStageBlocks, Kernel::kPaired>(ring.tiles[slot], maps.key, params.key, task, run,
                                                        stage, full);
    };
    producer.fill(run, false, load);
  }
  if constexpr (Kernel::kPaired) producer.drain();
}

// The warp that loads values.
template <class Kernel>
VSA_DEVICE void fine_forward_load_values(typename Kernel::ValueRing& ring, TaskQueue& queue,
                                         const FineForwardMaps& maps, const FineForwardParams& params) {
  TileProducer<typename Kernel::ValueRing, kForwardStageBlocks, false> producer(ring);
  int index;
  while ((index = next_task(queue).index) < params.num_tasks) {
    Task task = fine_forward_task<Kernel>(params, index);
    typename Kernel::Run run = fine_forward_run<Kernel>(params, task, index);
    auto load = [&ring, &maps, &params, &task, &run](const Stage& stage, int slot, Barrier& full) {
      full.arrive_expect(Kernel::Tile::kBytes);
      load_listed<kForwardStageBlocks, Kernel::kPaired>(ring.tiles[slot], maps.value, params.value, task, run,
                                                        stage, full);
    };
    bool clears = !Kernel::kPaired && params.block_sizes;
    producer.fill(run, clears, load);
  }
  if constexpr (Kernel::kPaired) producer.drain();
}

// Where all consumers work on a stage, or on a round of stages of which each has one, they issue their
// products one after the other: the softmax of one then runs beside the products of the others, not beside
// theirs. A barrier for each consumer, which it waits at and its predecessor arrives at; the last consumer is
// the first one's. None waits in vain: one that waits holds no keys, and values of fewer than kStages stages
// back, so that all that its predecessor needs up to the same round can be loaded.
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

// A consumer's way through one task.
template <class Kernel>
struct FineForwardConsumer {
  using T = typename Kernel::T;
  using Scores = FloatTile<Kernel::kStageTokens>;
  using Turn = Turns<Kernel::kConsumers>;

  typename Kernel::Shared& shared;
  const FineForwardParams& params;
  const Task& task;
  const typename Kernel::Run& run;
  int consumer;
  OnlineSoftmax softmax;
  FloatTile<Kernel::kHeadDim> out;
  HalfTile<T, Kernel::kStageTokens> probabilities;  // of the pending stage
  bool pending;                                     // out += probabilities value is still to come
  uint32_t pending_position;                        // kStages back or more if nothing is

  // After the last product with it.
  VSA_DEVICE void release_query() {
    __syncwarp();
    if (elect_one()) shared.query_empty[consumer].arrive();
  }

  // What is pending may hold values that others wait to see replaced.
  VSA_DEVICE bool is_due(uint32_t position) const {
    return __any_sync(0xffffffffu, position - pending_position >= Kernel::kStages);
  }
  VSA_DEVICE void finish_pending() {
    if (__any_sync(0xffffffffu, pending)) finish();
  }

  VSA_DEVICE void visit(uint32_t position) {
    if (is_due(position)) finish_pending();
    shared.keys.await(position);
    shared.keys.release(position);
  }

  VSA_DEVICE void step(const StageAt& at) {
    if (is_due(at.position)) {
      finish_pending();
      multiply<false>(at);
    } else {
      multiply<true>(at);
    }
    pending = true;
    pending_position = at.position;
  }

  // scores = query key^T of this stage while the product of the pending one, out += probabilities value,
  // runs; leaves the probabilities of this one pending.
  template <bool kPending>
  VSA_DEVICE void multiply(const StageAt& at) {
    Scores scores;
    if constexpr (kPending) {
      await(shared.keys, at.position, shared.values, pending_position);
    } else {
      shared.keys.await(at.position);
    }
    if (at.turn) Turn::await(consumer);
    mma_fence();
    mma_ABt(scores, shared.query[consumer], shared.keys.tile(at.position), false);
    mma_commit();
    if constexpr (kPending) {
      mma_AB(out, probabilities, shared.values.tile(pending_position), true);
      mma_commit();
    }
    if (at.turn) Turn::pass(consumer);
    mma_wait<kPending ? 1 : 0>(scores);
    if (at.marked) fill_masked_beside(scores, shared.keys.extra(at.position).blocks, -INFINITY);
    shared.keys.release(at.position);
    pin(scores);  // first

    RowVector factor;
    RowChains sums;
    if constexpr (!kPending) {
      softmax.raise_to_maximum(scores, factor);
      mul_row(out, factor);
    }
    // The first half of the exponentials runs beside the pending product, which takes no longer; the second
    // beside the conversion, for which that product must have read the last probabilities.
    constexpr int kHalf = Kernel::kStageTokens / 2;
    softmax.template exponentiate<0, kHalf>(scores, sums);
    if constexpr (kPending) {
      RowVector so_far = sums.rows();  // not negative, but ptxas does not know
      keep_above_wait(__float_as_uint(so_far.data[0] + so_far.data[1]), 0xffffffffu);
      mma_wait<0>(out, probabilities);
      shared.values.release(pending_position);
    }
    softmax.template exponentiate<kHalf, Kernel::kStageTokens>(scores, sums);
    convert(probabilities, scores);
    if constexpr (kPending) {
      if (softmax.template exceeded<T>(sums.rows())) {
        start_again(scores, sums, factor, at.index);
        mul_row(out, factor);
        convert(probabilities, scores);
      }
    }
    if (at.last) release_query();
    softmax.add(sums.rows());
  }

  VSA_DEVICE void finish() {
    shared.values.await(pending_position);
    mma_fence();
    mma_AB(out, probabilities, shared.values.tile(pending_position), true);
    mma_commit();
    mma_wait<0>(out, probabilities);
    shared.values.release(pending_position);
    pending = false;
  }

  // Exponentials have outgrown their type, and the scores are gone. Computes them again, from global memory,
  // as the keys may have been replaced.
  VSA_DEVICE void start_again(Scores& scores, RowChains& sums, RowVector& factor, int index) {
    forget(index);  // nothing of this is worth a register in the loop
    Stage stage = run.load(index);
    uint64_t valid[2];
    run.valid_masks(valid, stage);
    auto key = [this, &stage, &valid](int first, int row) {
      int b = first / kCubeTokens, slot = first % kCubeTokens + row;
      if (!(valid[b] >> slot & 1)) return static_cast<const T*>(nullptr);
      return static_cast<const T*>(params.key_rows.at(task.batch, run.token(stage, b, slot), task.head));
    };
    mma_ABt_rows(scores, shared.query[consumer], key);
    fill_masked(scores, valid, -INFINITY);
    softmax.raise_to_maximum(scores, factor);
    sums = {};
    softmax.template exponentiate<0, Kernel::kStageTokens>(scores, sums);
  }
};

template <class Kernel>
VSA_DEVICE void fine_forward_epilogue(FloatTile<Kernel::kHeadDim>& out, OnlineSoftmax& softmax,
                                      const FineForwardParams& params, const CubeAddress& address, int cube) {
  using T = typename Kernel::T;
  int prefix = params.q_block_sizes ? __ldg(params.q_block_sizes + cube) : kCubeTokens;
  uint64_t valid = params.q_grid.valid_slots(address.origin) & CubeGrid::ones(prefix);
  int64_t row = (int64_t(address.batch) * params.heads + address.head) * params.q_grid.num_cubes() + cube;

  softmax.finish();
  RowVector normaliser;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    bool real = valid >> tile_row(half) & 1;
    normaliser.data[half] = softmax.normaliser(half);
    if (lane_id() % 4 == 0) {
      params.lse[row * kCubeTokens + tile_row(half)] = real ? softmax.lse(half) : INFINITY;
    }
  }
  mul_row(out, normaliser);
  fill_rows(out, valid, 0.0f);  // rows of pads: whatever they were computed from, NaN included

  if (params.combine) {
    if (params.store_out_fine) store_tokens<T>(out, params.out_fine, params.q_grid, address);
    multiply_gate<T>(out, params.gate_fine, params.q_grid, address);
    if (params.coarse) {
      int64_t first = (int64_t(address.batch) * params.heads + address.head) * params.coarse_grid.num_cubes();
      CoarseRows<T> coarse{static_cast<const T*>(params.coarse) + first * Kernel::kHeadDim,
                           params.coarse_grid, params.same_grid, cube};
      add_gated_coarse(out, coarse, params.gate_coarse, params.q_grid, address);
    }
  }
  store_tokens<T>(out, params.out, params.q_grid, address);
}

// One consumer warpgroup.
template <class Kernel>
VSA_DEVICE void fine_forward_consume(typename Kernel::Shared& shared, const FineForwardParams& params,
                                     int consumer) {
  uint32_t position = 0, query_phase = 0;
  int index;
  Turns<Kernel::kConsumers>::start(consumer);
  while (__any_sync(0xffffffffu, (index = next_task(shared.queue).index) < params.num_tasks)) {
    Task task = fine_forward_task<Kernel>(params, index);
    typename Kernel::Run run = fine_forward_run<Kernel>(params, task, index);
    Stage window = run.load(lane_id());
    bool exists = consumer < task.blocks;
    FineForwardConsumer<Kernel> self{shared, params, task, run, consumer, OnlineSoftmax(params.scale_log2)};
    self.pending_position = position - Kernel::kStages;
    zero(self.out);
    if (exists) {
      shared.query_full[consumer].wait(query_phase);
      query_phase ^= 1;
    }
    bool released = walk_stages<Kernel::kConsumers>(self, run, window, position, is_partial);
    if (!exists) continue;
    if (!released) self.release_query();
    self.finish_pending();
    int cube = task.block(params.q_grid, consumer);
    fine_forward_epilogue<Kernel>(self.out, self.softmax, params, task.address(params.q_grid, cube), cube);
  }
  Turns<Kernel::kConsumers>::finish(consumer);
}

template <int kHeadDim, class T, bool kPaired = false>
VSA_DEVICE void fine_forward(const FineForwardMaps& maps, const FineForwardParams& params) {
  using Kernel = FineForward<kHeadDim, T, kPaired>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  if (threadIdx.x < kRingFullBarriers) {
    shared.keys.init(threadIdx.x);
    shared.values.init(threadIdx.x);
    if (threadIdx.x < Kernel::kConsumers) {
      shared.query_full[threadIdx.x].init(1);
      shared.query_empty[threadIdx.x].init(kWarpgroupThreads / kWarpThreads);
    }
    if (threadIdx.x == 0) shared.queue.init(Kernel::kReadingWarps);
    fence_barrier_init();
  }
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.query, &maps.key.cube, &maps.value.cube}) prefetch_map(*map);
  }
  if constexpr (kPaired) {
    cluster_sync();  // before an arrival or bytes of the peer at a barrier that is none yet
  } else {
    __syncthreads();
  }

  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    int warp = warp_id() % 4;
    if (warp == 0) fine_forward_load_keys<Kernel>(shared.keys, shared.queue, maps, params);
    if (warp == 1) fine_forward_load_values<Kernel>(shared.values, shared.queue, maps, params);
    if (warp == 2) fine_forward_load_queries<Kernel>(shared, maps, params);
    if (warp == 3) fetch_tasks(shared.queue, params.next_task, {}, params.num_tasks);
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_forward_consume<Kernel>(shared, params, warpgroup);
  }
  if constexpr (kPaired) cluster_sync();  // the peer may still load into this CTA's tiles
}

}  // namespace vsa
