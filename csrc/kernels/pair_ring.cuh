// The ring of key and value tiles between the producer warps and the consumer warpgroups of the forward. A
// stage holds two cubes; its keys and its values are loaded, waited for and released one by one. Each consumer
// is told which stages it is a member of by a queue of its own, and has nothing to do with the others.
//
// Barriers of a tile. full: one arrival by the producer warp and the bytes. empty: an arrival by each warp of
// each consumer; the producer arrives for those that are no members. Barriers of a place in a queue. listed:
// an arrival by the producer of the keys, once their tile was empty. taken: an arrival by each warp of the
// consumer that has read the entry. values_listed, which counts stages only: an arrival by the producer of the
// values, once their tile was empty. Who has waited for a list cannot mistake an earlier round of the tile's
// barriers for this one. values_listed needs no barrier against overtaking: kStages + 1 stages of a consumer
// on, the tile that is filled next has been released by it, and so has the stage that had this place.
#pragma once

#include "kernels/block_pairs.cuh"
#include "kernels/cube_tile.cuh"
#include "kernels/pair_ring.h"

namespace vsa {

struct PairInfo {
  uint64_t valid[2];  // bit per row of each cube: a real token
  uint32_t partial;   // some row is no real token
};
static_assert(sizeof(PairInfo) == kPairInfoBytes);

// A stage as a consumer hears of it, in one register: its number and phase, whether every consumer is a
// member, and its place and phase in values_listed.
struct StageEntry {
  int32_t bits;

  // kEnd: the task has no more. kRest: finish the pending product, the ring needs its stage.
  static constexpr int32_t kNone = -1, kEnd = -2, kRest = -3;
  template <int kStages, int kPlaces>
  VSA_DEVICE static StageEntry of(const RingPosition<kStages>& stage, const RingPosition<kPlaces>& place,
                                  bool all) {
    static_assert(kStages <= 256 && kPlaces <= 256);
    return {int32_t(stage.stage | place.stage << 8 | stage.phase << 16 | place.phase << 17 |
                    uint32_t(all) << 18)};
  }
  VSA_DEVICE bool exists() const { return bits >= 0; }
  VSA_DEVICE int stage() const { return bits & 0xff; }
  VSA_DEVICE int place() const { return bits >> 8 & 0xff; }
  VSA_DEVICE uint32_t phase() const { return bits >> 16 & 1; }
  VSA_DEVICE uint32_t place_phase() const { return bits >> 17 & 1; }
  VSA_DEVICE bool all() const { return bits >> 18 & 1; }
};
static_assert(sizeof(StageEntry) == kStageEntryBytes);

constexpr int kConsumerWarps = kWarpgroupThreads / kWarpThreads;

template <int kStages, int kConsumers>
struct TileBarriers {
  Barrier full[kStages], empty[kStages];

  VSA_DEVICE void init() {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) barrier.init(kConsumers * kConsumerWarps);
  }

  // One warp of a member has finished with a tile. What its wgmma read is read: the caller waited for that.
  VSA_DEVICE void release(int stage) {
    __syncwarp();
    if (lane_id() == 0) empty[stage].arrive();
  }

  // One thread of the producer, for those that are no members.
  VSA_DEVICE void release_others(int stage, uint32_t members) {
    int others = kConsumers - __popc(members);
    if (others > 0) empty[stage].arrive(others * kConsumerWarps);
  }
};

template <class Tile_, int kStages_, int kConsumers_>
struct PairRing {
  using Tile = Tile_;
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kPlaces = kStages + 1;

  Tile keys[kStages], values[kStages];
  PairInfo info[kStages];  // written with the keys, and theirs to overwrite
  StageEntry queue[kConsumers][kPlaces];
  TileBarriers<kStages, kConsumers> key_barriers, value_barriers;
  Barrier listed[kConsumers][kPlaces], values_listed[kConsumers][kPlaces], taken[kConsumers][kPlaces];
  Barrier landed;  // of values whose pads the producer clears before it publishes them
  PairPlan<kConsumers> key_plan, value_plan;

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init() {
    key_barriers.init();
    value_barriers.init();
    for (int i = 0; i < kConsumers; i++) {
      for (Barrier& barrier : listed[i]) barrier.init(1);
      for (Barrier& barrier : values_listed[i]) barrier.init(1);
      for (Barrier& barrier : taken[i]) barrier.init(kConsumerWarps);
    }
    landed.init(1);
  }

  // A consumer, before it multiplies the values of a stage.
  VSA_DEVICE void wait_values(int consumer, StageEntry entry) {
    values_listed[consumer][entry.place()].wait(entry.place_phase());
    value_barriers.full[entry.stage()].wait(entry.phase());
  }
};

// The place of the producer of the keys in each consumer's queue.
template <class Ring>
struct QueuePlaces {
  RingPosition<Ring::kPlaces> at[Ring::kConsumers], values_at[Ring::kConsumers];
  int since[Ring::kConsumers] = {};  // stages since the consumer's last one, from 1 on; 0: it holds none

  // The whole warp. Before it waits for the next stage of the ring: who holds that one's values to multiply
  // them beside its own next scores has to do so now, or nobody could go on.
  VSA_DEVICE void make_room(Ring& ring) {
#pragma unroll
    for (int i = 0; i < Ring::kConsumers; i++) {
      if (since[i] == Ring::kStages) list(ring, i, {StageEntry::kRest}, 0);
      since[i] += since[i] > 0;
    }
  }

  VSA_DEVICE void list_stage(Ring& ring, uint32_t members, const RingPosition<Ring::kStages>& stage) {
    bool all = members == (1u << Ring::kConsumers) - 1;
#pragma unroll
    for (int i = 0; i < Ring::kConsumers; i++) {
      if (!(members >> i & 1)) continue;
      list(ring, i, StageEntry::of(stage, values_at[i], all), 1);
      values_at[i].advance();
    }
  }

  VSA_DEVICE void list_end(Ring& ring) {
#pragma unroll
    for (int i = 0; i < Ring::kConsumers; i++) list(ring, i, {StageEntry::kEnd}, 0);
  }

 private:
  VSA_DEVICE void list(Ring& ring, int consumer, StageEntry entry, int stages) {
    auto& place = at[consumer];
    ring.taken[consumer][place.stage].wait(place.phase ^ 1);
    if (lane_id() == 0) {
      ring.queue[consumer][place.stage] = entry;
      ring.listed[consumer][place.stage].arrive();
    }
    __syncwarp();
    place.advance();
    since[consumer] = stages;
  }
};

// One thread: two cubes of one head into a tile of 128 rows. `full` gets the bytes.
template <class Tile>
VSA_DEVICE void load_pair(Tile& tile, const CUtensorMap& map, const CubeCoordinates& at, int batch, int head,
                          const Extent3 (&origins)[2], Barrier& full) {
  static_assert(Tile::kRows == 2 * kCubeTokens);
#pragma unroll
  for (int i = 0; i < 2; i++) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; panel++) {
      int32_t coordinates[5];
      box_coordinates(coordinates, at, {batch, head, origins[i]}, panel);
      load_async(tile.panel(panel) + i * kCubeTokens * Tile::kPanelCols, map, coordinates, full);
    }
  }
}

}  // namespace vsa
