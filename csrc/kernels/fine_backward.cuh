// What the passes of the fine stage's backward share. Per pair of blocks, with S = Q K^T:
//
//   P = exp2(scale_log2 S - log2(e) LSE)     dP = dO V^T     dS = P (dP - delta)
//   dV += P^T dO     dK += dS^T Q     dQ += dS K     and at the end dK, dQ times scale
//
// A pass keeps what belongs to a consumer's cube (two resident tiles) and walks two rings of the other side's
// tiles, in the order of its schedule. Two passes, one for dQ and one for dK and dV, need no reduction
// between CTAs, so that every run gives the same bits; S and dP are computed twice for that, 7 matrix
// products instead of 5. The fused pass takes 5, and sums dQ over CTAs (fine_backward_fused.cuh).
//
// A CTA takes task after task. Three producer warps load: one the first ring, one the second, one the
// resident tiles of the next task. A fourth fetches tasks.
#pragma once

#include "kernels/fine_backward_params.h"
#include "kernels/task_queue.cuh"
#include "kernels/tile_ring.cuh"
#include "kernels/token_rows.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

constexpr float kLog2E = 1.4426950408889634f;

// A pass without shared memory of its own.
struct NothingOwn {
  VSA_DEVICE void init(int) {}
};

// Extra: beside a tile of the first ring. Own: shared memory of the pass, with init(thread) for threads 0
// to 63. kListed: it takes lists. kPaired: in clusters of two CTAs, without lists and block_sizes.
template <int kHeadDim_, class T_, int kStageBlocks_, BackwardStages kStages_, class Extra, class Own,
          bool kListed_ = true, bool kPaired_ = false>
struct FineBackward {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kConsumers = kBackwardConsumers;
  static constexpr int kStageBlocks = kStageBlocks_;
  static constexpr int kStageTokens = kStageBlocks * kCubeTokens;
  static constexpr BackwardStages kStages = kStages_;
  static constexpr bool kListed = kListed_, kPaired = kPaired_;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;  // with the producers' 504 of a lane of each warpgroup

  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  using StageTile = SharedTile<T, kStageTokens, kHeadDim>;
  using FirstRing = TileRing<StageTile, kStages.first, kConsumers, Extra, kPaired>;
  using SecondRing = TileRing<StageTile, kStages.second, kConsumers, Nothing, kPaired>;
  using Run = StageRun<kStageBlocks, kListed>;
  struct Resident {
    Tile first, second;
  };
  struct Shared {
    Resident resident[kConsumers];
    // Before the rings: compute-sanitizer holds an operand without strides (TermSelectors) for one of 2 KB,
    // which must not reach beyond the CTA's memory.
    [[no_unique_address]] Own own;
    FirstRing first;
    SecondRing second;
    Barrier resident_full[kConsumers];   // each task: the producer's arrival and the bytes of both tiles
    Barrier resident_landed;             // of tiles whose pads the producer clears before it publishes them
    Barrier resident_empty[kConsumers];  // an arrival by each warp of the consumer, after its last product
    TaskQueue queue;
  };
  static constexpr int kReadingWarps = 3 + kConsumers * FirstRing::kWarps;  // of the queue
};

// All threads of a CTA.
VSA_DEVICE bool is_chosen(const PassChoice& choice) {
  if (!choice.ends) return true;
  bool all = true;
  for (int row = threadIdx.x; all && row < choice.rows; row += blockDim.x) {
    all = __ldg(choice.ends + row * choice.row_stride) == choice.all;
  }
  return bool(__syncthreads_and(all)) == choice.if_all;
}

// One map of the copy engine with its coordinates.
struct MappedTokens {
  const CUtensorMap& map;
  const CubeCoordinates& at;
};

template <class Kernel>
VSA_DEVICE Task fine_backward_task(const FineBackwardParams& params, int index) {
  return task_at<Kernel::kConsumers>(Kernel::grid(params), params.heads, params.groups,
                                     params.schedule.whole_tasks, index);
}

template <class Kernel>
VSA_DEVICE typename Kernel::Run fine_backward_run(const FineBackwardParams& params, const Task& task,
                                                  int index) {
  return stage_run<Kernel::kConsumers, Kernel::kStageBlocks, Kernel::kListed>(
      params.schedule, Kernel::grid(params), Kernel::listed(params), task, index);
}

// The warp that loads the tiles which consumers keep. With kClearsResident rows of pads become zero.
template <class Kernel>
VSA_DEVICE void fine_backward_load_resident(typename Kernel::Shared& shared, const MappedTokens& first,
                                            const MappedTokens& second, const FineBackwardParams& params) {
  const CubeGrid& grid = Kernel::grid(params);
  uint32_t landed_phase = 0;
  NextTask next;
  while ((next = next_task(shared.queue)).index < params.num_tasks) {
    Task task = fine_backward_task<Kernel>(params, next.index);
    for (int i = 0; i < Kernel::kConsumers; i++) {
      bool exists = i < task.blocks;
      int block = task.block(grid, exists ? i : 0);
      int prefix = kCubeTokens;
      if constexpr (Kernel::kClearsResident) {
        if (exists) prefix = Kernel::prefix(params, block);
      }
      shared.resident_empty[i].wait(next.phase ^ 1);
      if (elect_one()) {
        Barrier& full = prefix < kCubeTokens ? shared.resident_landed : shared.resident_full[i];
        if (exists) {
          full.arrive_expect(sizeof(shared.resident[i]));
          load_cube(shared.resident[i].first, first.map, first.at, task.address(grid, block), full);
          load_cube(shared.resident[i].second, second.map, second.at, task.address(grid, block), full);
        } else {
          full.arrive();
        }
      }
      __syncwarp();
      if (prefix < kCubeTokens) {
        shared.resident_landed.wait(landed_phase);
        landed_phase ^= 1;
        zero_rows(shared.resident[i].first, prefix);
        zero_rows(shared.resident[i].second, prefix);
        fence_async_shared();  // wgmma reads the zeros through the async proxy
        __syncwarp();
        if (elect_one()) shared.resident_full[i].arrive();
        __syncwarp();
      }
    }
  }
}

// A warp that fills one ring, of the two the first if kFirst; load(task, run, stage, slot, full) as
// TileProducer's.
template <class Kernel, bool kFirst, class Ring, class Load>
VSA_DEVICE void fine_backward_fill(Ring& ring, TaskQueue& queue, const FineBackwardParams& params,
                                   Load load) {
  TileProducer<Ring, Kernel::kStageBlocks, kFirst> producer(ring);
  int index;
  while ((index = next_task(queue).index) < params.num_tasks) {
    Task task = fine_backward_task<Kernel>(params, index);
    typename Kernel::Run run = fine_backward_run<Kernel>(params, task, index);
    auto load_stage = [&task, &run, &load](const Stage& stage, int slot, Barrier& full) {
      load(task, run, stage, slot, full);
    };
    producer.fill(run, !Kernel::kPaired && run.blocks.sizes, load_stage);
  }
  if constexpr (Kernel::kPaired) producer.drain();
}

// Registers kBegin to kEnd - 1 of `scores` become exp2(scale * scores + shift), a shift a row.
template <int kBegin, int kEnd, int kCols>
VSA_DEVICE void exponentiate(FloatTile<kCols>& scores, float scale, const RowVector& shift) {
#pragma unroll
  for (int i = kBegin; i < kEnd; i++) {
    scores.data[i] = exp2_approx(fmaf(scores.data[i], scale, shift.data[i / 2 % 2]));
  }
}

// What a lane's two tokens get of the pooled gradients: a row of them, the token's cube's, over its tokens.
struct PooledRows {
  int64_t row[2];
  float share[2];

  // `real` tokens of cube number `cube` of the pass's `grid`.
  VSA_DEVICE PooledRows(const FineBackwardParams& params, const CubeGrid& grid, const CubeAddress& address,
                        int cube, uint64_t real) {
    const CubeGrid& pooled = params.pooled_grid;
    int64_t first = (int64_t(address.batch) * params.heads + address.head) * pooled.num_cubes();
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int from = cube, tokens = __popcll(real);
      if (!params.pooled_on_own_grid) {
        // A slot without a token takes any row: its gradient is not stored.
        from = pooled.cube_of(max(grid.token(address.origin, tile_row(half)), int64_t(0)));
        Extent3 side = pooled.sides(pooled.origin(from));
        tokens = side.t * side.h * side.w;
      }
      row[half] = first + from;
      share[half] = 1.0f / tokens;
    }
  }
};

// tile = tile * scale + pooled * share; pooled [cubes of all heads, kCols] or null.
template <class T, int kCols>
VSA_DEVICE void scale_and_add_rows(FloatTile<kCols>& tile, float scale, const T* pooled,
                                   const PooledRows& from) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const T* row = pooled + from.row[half] * kCols + tile_column();
#pragma unroll
    for (int j = 0; j < kCols / 8; j++) {
      float2 add{0.0f, 0.0f};
      if (pooled) add = unpack<T>(__ldg(reinterpret_cast<const uint32_t*>(row + 8 * j)));
      float &x = tile.data[4 * j + 2 * half], &y = tile.data[4 * j + 2 * half + 1];
      x = fmaf(x, scale, from.share[half] * add.x);
      y = fmaf(y, scale, from.share[half] * add.y);
    }
  }
}

// A query cube's rows of dQ, of which `grad_query` is the sum, in global memory.
template <class T, int kHeadDim>
VSA_DEVICE void store_grad_query(FloatTile<kHeadDim>& grad_query, const FineBackwardParams& params,
                                 const CubeAddress& address, int block) {
  uint64_t real = params.q_grid.valid_slots(address.origin);
  PooledRows pooled(params, params.q_grid, address, block, real);
  scale_and_add_rows(grad_query, params.scale, static_cast<const T*>(params.dq_pooled), pooled);
  // Rows of pads: whatever they were computed from, NaN included.
  if (params.q_block_sizes) real &= CubeGrid::ones(__ldg(params.q_block_sizes + block));
  fill_rows(grad_query, real, 0.0f);
  store_tokens<T>(grad_query, params.grad_query, params.q_grid, address);
}

// A consumer's way through one task. What is the pass's own: begin() sets its registers; step() works on a
// stage, of which its last product may stay pending (kPends); wait<n>() waits for that, until at most n later
// ones are unfinished, and settled() gives back what it read; enter() begins where all resident tiles are
// there, leave() ends what a task shares with the other consumer's; store() writes the gradients.
// kReleasesResident: the last step gives the resident tiles back.
template <class Kernel>
struct FineBackwardConsumer {
  typename Kernel::Shared& shared;
  const FineBackwardParams& params;
  int consumer;
  typename Kernel::Pass pass;
  uint32_t pending;  // a stage's position + 1; 0: none

  // After the last products with the resident tiles.
  VSA_DEVICE void release_resident() {
    __syncwarp();
    if (elect_one()) shared.resident_empty[consumer].arrive();
  }

  // What is pending holds tiles that others may wait to see replaced.
  VSA_DEVICE void finish_before(uint32_t position) {
    bool due = pending && position + 1 - pending >= Kernel::kHeldStages;
    if (__any_sync(0xffffffffu, due)) finish();
  }

  VSA_DEVICE void visit(uint32_t position) {
    finish_before(position);
    shared.first.await(position);
    shared.first.release(position);
  }

  VSA_DEVICE void step(const StageAt& at) {
    finish_before(at.position);
    pass.step(*this, at);
    if (Kernel::Pass::kPends) pending = at.position + 1;
  }

  // Until at most kLater products later than the pending ones are unfinished.
  template <int kLater>
  VSA_DEVICE void settle() {
    pass.template wait<kLater>();
    if (__any_sync(0xffffffffu, pending != 0)) pass.settled(*this, pending - 1);
  }
  VSA_DEVICE void finish() {
    settle<0>();
    pending = 0;
  }
};

// All stages of a task.
template <class Kernel>
VSA_DEVICE void fine_backward_attend(FineBackwardConsumer<Kernel>& self, const NextTask& next,
                                     uint32_t& position) {
  typename Kernel::Shared& shared = self.shared;
  Task task = fine_backward_task<Kernel>(self.params, next.index);
  typename Kernel::Run run = fine_backward_run<Kernel>(self.params, task, next.index);
  Stage window = run.load(lane_id());
  bool exists = self.consumer < task.blocks;
  self.pass.begin(self.params, task, task.block(Kernel::grid(self.params), exists ? self.consumer : 0),
                  exists);
  shared.resident_full[self.consumer].wait(next.phase);
  if (__any_sync(0xffffffffu, exists)) self.pass.enter(self, position);
  bool ended = true;
  if constexpr (Kernel::kListed || Kernel::kStageBlocks > 1) {
    ended = walk_stages<Kernel::kConsumers>(self, run, window, position, Kernel::mark);
  } else {
    walk_all_stages<Kernel::kConsumers>(self, run, task, position);
  }
  self.finish();
  self.pass.leave(self);
  if (!ended || !Kernel::Pass::kReleasesResident) self.release_resident();
}

template <class Kernel>
VSA_DEVICE void fine_backward_consume(typename Kernel::Shared& shared, const FineBackwardParams& params,
                                      int consumer) {
  uint32_t position = 0;
  NextTask next;
  while (__any_sync(0xffffffffu, (next = next_task(shared.queue)).index < params.num_tasks)) {
    FineBackwardConsumer<Kernel> self{shared, params, consumer};
    fine_backward_attend<Kernel>(self, next, position);
    int same = next.index;
    forget(same);  // what store() needs of the task is not worth registers in the loop
    Task task = fine_backward_task<Kernel>(params, same);
    if (consumer >= task.blocks) continue;
    int block = task.block(Kernel::grid(params), consumer);
    self.pass.store(params, task.address(Kernel::grid(params), block), block);
  }
}

template <class Kernel>
VSA_DEVICE void fine_backward(const typename Kernel::Maps& maps, const FineBackwardParams& params) {
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  if (!is_chosen(params.choice)) return;
  if (threadIdx.x < kRingFullBarriers) {
    shared.first.init(threadIdx.x);
    shared.second.init(threadIdx.x);
    if (threadIdx.x < Kernel::kConsumers) {
      shared.resident_full[threadIdx.x].init(1);
      shared.resident_empty[threadIdx.x].init(kWarpgroupThreads / kWarpThreads);
    }
    if (threadIdx.x == 0) {
      shared.resident_landed.init(1);
      shared.queue.init(Kernel::kReadingWarps);
    }
    shared.own.init(threadIdx.x);
    fence_barrier_init();
  }
  if constexpr (Kernel::kPaired) {
    cluster_sync();  // before an arrival or bytes of the peer at a barrier that is none yet
  } else {
    __syncthreads();
  }

  int warpgroup = warpgroup_id();
  if (warpgroup == Kernel::kConsumers) {
    register_decrease<Kernel::kProducerRegisters>();
    int warp = warp_id() % 4;
    if (warp == 0) {
      Kernel::load_first(shared, maps, params);
    } else if (warp == 1) {
      Kernel::load_second(shared, maps, params);
    } else if (warp == 2) {
      Kernel::template load_resident<Kernel>(shared, maps, params);
    } else {
      fetch_tasks(shared.queue, params.next_task, params.schedule.early, params.num_tasks);
    }
  } else {
    register_increase<Kernel::kConsumerRegisters>();
    fine_backward_consume<Kernel>(shared, params, warpgroup);
  }
  if constexpr (Kernel::kPaired) cluster_sync();  // the peer may still load into this CTA's tiles
}

}  // namespace vsa
