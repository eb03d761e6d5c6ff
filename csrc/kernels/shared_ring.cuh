// A ring of tile pairs that one producer warp fills in the order of a merged list and several consumer
// warpgroups read: keys and values for a query-stationary kernel, queries and output gradients for a
// key-stationary one.
//
// Barriers of a stage. full: kArrivals by the producer plus the bytes of both tiles. empty: one arrival by
// each warp of each consumer, member or not, in ring order; skipping a round would alias the phase bit.
#pragma once

#include "kernels/cube_tile.cuh"
#include "kernels/merged_list.cuh"
#include "kernels/shared_ring.h"
#include "tiles/register_tile.cuh"

namespace vsa {

struct StageInfo {
  uint64_t valid;    // bit per row of the tiles: a real token
  uint32_t members;  // bit per consumer; 0: the lists have ended
};
static_assert(sizeof(StageInfo) == kStageInfoBytes);

// Info: StageInfo, or a struct that adds more loads of a stage to it. kSeparate: the two tiles of a stage are
// released, and loaded again, one by one.
template <class Tile, int kStages_, int kConsumers_, class Info = StageInfo, bool kSeparate_ = false>
struct SharedRing {
  static constexpr bool kSeparate = kSeparate_;
  static constexpr int kArrivals =
      kSeparate ? 2 : 1;  // of the producer on `full`: with each tile, or with both
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;

  Tile first[kStages], second[kStages];
  Info info[kStages];
  Barrier full[kStages],
      empty[kStages * (kSeparate ? 2 : 1)];  // kSeparate: of the first tiles, then the second
  Barrier landed;                            // of a stage whose pads the producer clears before it publishes

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init() {
    for (int i = 0; i < kStages; i++) {
      full[i].init(kArrivals);
    }
    for (Barrier& barrier : empty) barrier.init(kConsumers * kWarpgroupThreads / kWarpThreads);
    landed.init(kArrivals);
  }

  // One thread of the producer: a stage whose contents no copy reports.
  VSA_DEVICE void publish(int stage) {
    for (int i = 0; i < kArrivals; i++) full[stage].arrive();
  }

  // One warp of a consumer has finished with a stage. What its wgmma read is read: the caller waited for
  // that.
  VSA_DEVICE void release(int stage) {
    __syncwarp();
    if (elect_one()) {
      empty[stage].arrive();
      if constexpr (kSeparate) empty[kStages + stage].arrive();
    }
  }

  VSA_DEVICE void release_first(int stage) {
    static_assert(kSeparate);
    __syncwarp();
    if (elect_one()) empty[stage].arrive();
  }

  VSA_DEVICE void release_second(int stage) {
    static_assert(kSeparate);
    __syncwarp();
    if (elect_one()) empty[kStages + stage].arrive();
  }
};

// Where the tiles of a ring come from.
struct RingSource {
  const CUtensorMap& first_map;
  const CUtensorMap& second_map;
  const CubeCoordinates& first_at;
  const CubeCoordinates& second_at;
  int batch, head;
};

// Where a producer stands; kept from one task of a CTA to the next.
template <class Ring>
struct RingProducer {
  RingPosition<Ring::kStages> at;
  uint32_t landed_phase = 0;
};

// The whole producer warp: one task's tiles, then a stage without members. `extra(stage, block, full)` runs
// in one thread after the tiles' loads are issued and may add loads; it returns nothing, their bytes are
// `extra_bytes`.
template <class Ring, int kLists, class Extra>
VSA_DEVICE void produce(Ring& ring, RingProducer<Ring>& producer, MergedList<kLists>& lists,
                        const RingSource& source, int extra_bytes, Extra extra) {
  RingPosition<Ring::kStages>& at = producer.at;
  ListEntry entry;
  while (uint32_t members = lists.next(entry)) {
    CubeAddress cube{source.batch, source.head, entry.origin};
    StageInfo info{entry.valid, members};
    bool clear = entry.prefix < kCubeTokens;
    Barrier& arrives = clear ? ring.landed : ring.full[at.stage];

    ring.empty[at.stage].wait(at.phase ^ 1);
    if (elect_one()) {
      static_cast<StageInfo&>(ring.info[at.stage]) = info;
      arrives.arrive_expect(Ring::kSeparate ? sizeof(ring.first[0])
                                            : 2 * sizeof(ring.first[0]) + extra_bytes);
      load_cube(ring.first[at.stage], source.first_map, source.first_at, cube, arrives);
    }
    if constexpr (Ring::kSeparate) ring.empty[Ring::kStages + at.stage].wait(at.phase ^ 1);
    if (elect_one()) {
      if constexpr (Ring::kSeparate) arrives.arrive_expect(sizeof(ring.second[0]) + extra_bytes);
      load_cube(ring.second[at.stage], source.second_map, source.second_at, cube, arrives);
      extra(at.stage, entry.block, arrives);
    }
    __syncwarp();
    if (clear) {
      // Pads hold real memory, perhaps NaN, and 0 * NaN would spoil the products.
      ring.landed.wait(producer.landed_phase);
      producer.landed_phase ^= 1;
      zero_rows(ring.first[at.stage], entry.prefix);
      zero_rows(ring.second[at.stage], entry.prefix);
      fence_async_shared();  // wgmma reads the zeros through the async proxy
      __syncwarp();
      if (elect_one()) ring.publish(at.stage);
      __syncwarp();
    }
    at.advance();
  }
  ring.empty[at.stage].wait(at.phase ^ 1);
  // Here too, though nothing is loaded: consumers release every stage, one round after the other.
  if constexpr (Ring::kSeparate) ring.empty[Ring::kStages + at.stage].wait(at.phase ^ 1);
  if (elect_one()) {
    static_cast<StageInfo&>(ring.info[at.stage]) = StageInfo{0, 0};
    ring.publish(at.stage);
  }
  __syncwarp();
  at.advance();
}

}  // namespace vsa
