// A ring of tiles between a producer warp and the consumer warpgroups of a fine kernel, filled in the order
// of their schedule. A kernel has two, which its consumers go through side by side. Stages are numbered from
// the kernel's start: their "position".
//
// Barriers. full, of position % 64: one arrival by the producer and the bytes of its loads. empty, of a tile:
// an arrival by each warp of each consumer, once nothing of it reads the tile any more; the producer itself
// arrives for those that pass over the stage. landed: of a tile whose pads the producer clears before it
// publishes it.
//
// A consumer goes from one stage that it attends straight to the next, without a look at those between. It
// attends what it is a member of and, at the first ring only, every 32nd stage of a task. Nothing misleads it
// about the phase bit of a full barrier, which serves every 64th position:
// - A barrier is never a phase ahead: 64 positions after a stage that a consumer attends nothing is filled
//   before the consumer has released that stage.
// - The first ring's is never a phase behind. Of the stage attended before, at most 32 back, the consumer has
//   seen that it was full; so all that lie kStages further back had been emptied, hence filled.
// - Nor is the second ring's, whose tile of a stage is awaited after the first ring's of that stage: the
//   first is then emptied up to kStages back. Each member of the stage 64 back had awaited its second tile
//   before it released the first tile of any stage that it attended 32 + kStages later or after that (what it
//   leaves pending it finishes before that is kStages stages old); so that second tile had been filled.
//
// A paired ring is one of two, in the CTAs of a cluster, which hold the same tiles: each producer loads one
// half of a stage into both. Position by position, in both CTAs:
//
//   producer   | wait empty, full of the tile's last stage | arrive at the peer's ready | wait ready | load |
//
// ready, of a tile: an arrival by the peer's producer, when its own tile of that number may be written. So a
// CTA writes to both only when nobody of either reads, and consumers know of their own CTA alone. full gets
// the bytes of both halves. The peer's may come before they are expected, which leaves a count below zero for
// a while; the phase cannot end, as this producer's arrival is still to come.
// - Both CTAs go through the same number of stages, so that each arrival at ready is waited for. Nobody waits
//   for ready with a tile of an earlier position to announce, hence no circle.
// - A task may have no consumer at all. The producer then arrives at empty for all of them, perhaps before
//   the stage has landed; so it waits for full of the stage that it replaces, and at the end for the last
//   kStages (drain), lest a CTA exits while its peer's copies are on their way to it.
// - The second ring's full barriers are not a phase behind in such a task either, where no member links the
//   rings: the peer has a member of every stage, which does, and each ring's positions are at most kStages
//   apart in the two CTAs.
#pragma once

#include "kernels/stage_run.cuh"
#include "kernels/tile_ring.h"
#include "tiles/cluster.cuh"
#include "tiles/register_tile.cuh"

namespace vsa {

struct Nothing {};

template <class Tile_, int kStages_, int kConsumers_, class Extra_ = Nothing, bool kPaired_ = false>
struct TileRing {
  using Tile = Tile_;
  using Extra = Extra_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr bool kPaired = kPaired_;
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;  // of a consumer
  static_assert(kRingVisits + 2 * kStages <= kRingFullBarriers);

  Tile tiles[kStages];
  Extra extras[kStages];  // what the producer writes or loads beside a tile
  Barrier full[kRingFullBarriers], empty[kStages], landed;
  std::conditional_t<kPaired, Barrier, Nothing> ready[kStages];

  // Threads 0 to kRingFullBarriers - 1, each before fence_barrier_init, then __syncthreads; cluster_sync if
  // paired.
  VSA_DEVICE void init(int thread) {
    full[thread].init(1);
    if (thread < kStages) empty[thread].init(kConsumers * kWarps);
    if (thread == 0) landed.init(1);
    if constexpr (kPaired) {
      if (thread < kStages) ready[thread].init(1);
    }
  }

  VSA_DEVICE Tile& tile(uint32_t position) { return tiles[position % kStages]; }
  VSA_DEVICE Extra& extra(uint32_t position) { return extras[position % kStages]; }
  VSA_DEVICE bool try_await(uint32_t position) {
    return full[position % kRingFullBarriers].try_wait(position / kRingFullBarriers % 2);
  }
  VSA_DEVICE void await(uint32_t position) {
    while (!try_await(position)) {
    }
  }
  // A warp of a consumer has finished with a tile. What its wgmma read is read: the caller waited for that.
  VSA_DEVICE void release(uint32_t position) {
    __syncwarp();
    if (elect_one()) empty[position % kStages].arrive();
  }

  // Of a paired ring, the producer's warp when the tile is empty: returns when it is in both CTAs.
  VSA_DEVICE void meet(uint32_t position, const RingPosition<kStages>& at) {
    if (position >= kStages) await(position - kStages);
    if (elect_one()) arrive_remote(ready[at.stage], cluster_cta() ^ 1);
    __syncwarp();
    ready[at.stage].wait(at.phase);
  }
};

// fill_masked by masks beside a tile of a ring. Lane 0 alone reads them, the one that gives the tile back:
// racecheck follows no order between the lanes of a warp. Reduced, the compiler knows that all lanes have the
// same; after a shuffle it takes what depends on them for divergent (bench/NOTES.md).
template <int kCols>
VSA_DEVICE void fill_masked_beside(FloatTile<kCols>& tile, const uint64_t (&masks)[kCols / 64], float value) {
  uint64_t read[kCols / 64];
#pragma unroll
  for (int i = 0; i < kCols / 64; i++) {
    uint64_t mine = lane_id() == 0 ? masks[i] : 0;
    uint32_t low = __reduce_or_sync(0xffffffffu, uint32_t(mine));
    read[i] = uint64_t(__reduce_or_sync(0xffffffffu, uint32_t(mine >> 32))) << 32 | low;
  }
  fill_masked(tile, read, value);
}

// Both at once, so that one look at a barrier does not wait for the other.
template <class First, class Second>
VSA_DEVICE void await(First& first, uint32_t first_position, Second& second, uint32_t second_position) {
  bool first_full, second_full;
  do {
    first_full = first.try_await(first_position);
    second_full = second.try_await(second_position);
  } while (!first_full || !second_full);
}

// The producer of one ring; of the first one if kVisited. It keeps its place from task to task.
template <class Ring, int kBlocks, bool kVisited>
class TileProducer {
 public:
  VSA_DEVICE explicit TileProducer(Ring& ring) : ring_(ring) {}

  // A whole warp: the stages of one task. load(stage, slot, full), in one thread, arrives at `full`, expects
  // bytes and starts the copies. With `clears`, slots behind a block's valid prefix become zero: pads hold
  // real memory, perhaps NaN, and 0 * NaN would spoil a product.
  template <class Run, class Load>
  VSA_DEVICE void fill(const Run& run, bool clears, Load load) {
    for (int base = 0; base < run.count; base += kWarpThreads) {
      Stage window = run.load(base + lane_id());
      int count = min(kWarpThreads, run.count - base);
      for (int i = 0; i < count; i++) {
        Stage stage{__shfl_sync(0xffffffffu, window.first, i), __shfl_sync(0xffffffffu, window.second, i)};
        int others = Ring::kConsumers - __popc(stage_members(stage));
        if (kVisited && i % kRingVisits == 0) others = 0;
        int prefixes[2] = {kCubeTokens, kCubeTokens};
        if (clears) {
          prefixes[0] = run.blocks.prefix(stage_block(stage.first));
          prefixes[1] = run.blocks.prefix(stage_block(stage.second));
        }
        bool clear = min(prefixes[0], prefixes[1]) < kCubeTokens;
        Barrier& full = ring_.full[position_ % kRingFullBarriers];
        ring_.empty[at_.stage].wait(at_.phase ^ 1);
        if constexpr (Ring::kPaired) ring_.meet(position_, at_);
        if (elect_one()) {
          if (others > 0) ring_.empty[at_.stage].arrive(others * Ring::kWarps);
          load(stage, at_.stage, clear ? ring_.landed : full);
        }
        __syncwarp();
        if (clear) {
          ring_.landed.wait(landed_phase_);
          landed_phase_ ^= 1;
          auto& tile = ring_.tiles[at_.stage];
          for (int b = 0; b < kBlocks; b++) {
            zero_rows(tile, b * kCubeTokens + prefixes[b], (b + 1) * kCubeTokens);
          }
          fence_async_shared();  // wgmma reads the zeros through the async proxy
          __syncwarp();
          if (elect_one()) full.arrive();
          __syncwarp();
        }
        position_++;
        at_.advance();
      }
    }
  }

  // Until all that was loaded has landed.
  VSA_DEVICE void drain() {
    for (uint32_t i = min(position_, uint32_t(Ring::kStages)); i > 0; i--) ring_.await(position_ - i);
  }

 private:
  Ring& ring_;
  RingPosition<Ring::kStages> at_;
  uint32_t position_ = 0;
  uint32_t landed_phase_ = 0;
};

// One thread: a stage's blocks of one head into a tile of kBlocks * 64 rows. `full` gets the bytes. kPaired:
// one block in each CTA of a cluster, which goes to both of them.
template <int kBlocks, bool kPaired = false, class Tile>
VSA_DEVICE void load_blocks(Tile& tile, const CUtensorMap& map, const CubeCoordinates& at,
                            const CubeGrid& grid, const Task& task, const Stage& stage, Barrier& full) {
  static_assert(Tile::kRows == kBlocks * kCubeTokens && (!kPaired || kBlocks == 2));
#pragma unroll
  for (int i = 0; i < (kPaired ? 1 : kBlocks); i++) {
    int b = kPaired ? cluster_cta() : i;
    CubeAddress cube = task.address(grid, stage_block(b ? stage.second : stage.first));
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; panel++) {
      int32_t coordinates[5];
      box_coordinates(coordinates, at, cube, panel);
      auto* rows = tile.panel(panel) + b * kCubeTokens * Tile::kPanelCols;
      if constexpr (kPaired) {
        load_async(rows, map, coordinates, full, uint16_t(0b11));
      } else {
        load_async(rows, map, coordinates, full);
      }
    }
  }
}

// Boxes of a cube, and of a quarter of one, by the side that is a quarter.
struct ListedMaps {
  CUtensorMap cube, thin[3];
};

// One thread: a stage's blocks, or its thin cubes one after the other. kPaired: as load_blocks.
template <int kBlocks, bool kPaired = false, class Tile, class Run>
VSA_DEVICE void load_listed(Tile& tile, const ListedMaps& maps, const CubeCoordinates& at, const Task& task,
                            const Run& run, const Stage& stage, Barrier& full) {
  const CubeGrid& grid = run.blocks.grid;
  if constexpr (Run::kListed) {
    if (is_thin(stage)) {
      const ThinRow* rows = run.thin_rows(stage);
#pragma unroll 1
      for (int i = 0; i < kBlocks * kThinCubes; i++) {
        uint32_t word = __ldg(rows[i / kThinCubes].cubes + i % kThinCubes);
        CubeAddress cube = task.address(grid, stage_block(word));
        const CUtensorMap& map = maps.thin[word >> kStageBlockBits];
#pragma unroll
        for (int panel = 0; panel < Tile::kPanels; panel++) {
          int32_t coordinates[5];
          box_coordinates(coordinates, at, cube, panel);
          load_async(tile.panel(panel) + i * kThinTokens * Tile::kPanelCols, map, coordinates, full);
        }
      }
      return;
    }
  }
  load_blocks<kBlocks, kPaired>(tile, maps.cube, at, grid, task, stage, full);
}

// A stage that a consumer is a member of.
struct StageAt {
  uint32_t position;
  int index;            // in its task
  bool shared, marked;  // shared: all consumers are members
  bool turn;            // shared, or one of a round
  bool last;            // the consumer is a member of none after this, as far as it can tell
};

// A consumer's way through the stages of one task: self.step(StageAt) for each that it is a member of,
// `marked` as mark(Stage) says, and self.visit(position) for others that it attends. `window` is
// run.load(lane); `position` that of the task's first stage, then of the next task's. By vote: the compiler
// then knows that the warp stays whole. Whether there was a last one.
template <int kConsumers, class Run, class Consumer, class Mark>
VSA_DEVICE bool walk_stages(Consumer& self, const Run& run, Stage window, uint32_t& position, Mark mark) {
  bool ended = false;
  for (int base = 0; __any_sync(0xffffffffu, base < run.count); base += kWarpThreads) {
    uint32_t members = stage_members(window);
    uint32_t mine = __ballot_sync(0xffffffffu, members >> self.consumer & 1);
    uint32_t shared = __ballot_sync(0xffffffffu, members == (1u << kConsumers) - 1);
    uint32_t marked = __ballot_sync(0xffffffffu, mark(window));
    uint32_t turns = shared | __ballot_sync(0xffffffffu, window.first & kStageTurn);
    window = run.load(base + kWarpThreads + lane_id());
    static_assert(kRingVisits == kWarpThreads);
    bool final = __any_sync(0xffffffffu, base + kWarpThreads >= run.count);
    ended = final && mine;
    if (!(mine & 1)) self.visit(position);
    for (uint32_t todo = mine; todo; todo &= todo - 1) {
      int i = __ffs(todo) - 1;
      bool last = final && !(todo & (todo - 1));
      self.step(StageAt{position + i, base + i, bool(shared >> i & 1), bool(marked >> i & 1),
                        bool(turns >> i & 1), last});
    }
    position += min(kWarpThreads, run.count - base);
  }
  return ended;
}

// Where there are no lists, and a stage is one block: every stage is one of all consumers of a task.
template <int kConsumers, class Run, class Consumer>
VSA_DEVICE void walk_all_stages(Consumer& self, const Run& run, const Task& task, uint32_t& position) {
  bool shared = __any_sync(0xffffffffu, task.blocks == kConsumers);
  if (__any_sync(0xffffffffu, self.consumer < task.blocks)) {
    for (int i = 0; __any_sync(0xffffffffu, i < run.count); i++) {
      bool last = __any_sync(0xffffffffu, i + 1 == run.count);
      self.step(StageAt{position + i, i, shared, false, shared, last});
    }
  } else {
    for (int i = 0; i < run.count; i += kRingVisits) self.visit(position + i);
  }
  position += run.count;
}

}  // namespace vsa
