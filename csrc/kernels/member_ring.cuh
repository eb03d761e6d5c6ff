// A ring of tile pairs that two producer warps, one a tile, fill in the order of the consumers' lists. Each
// consumer warpgroup is told which stages it is a member of, by a queue of its own, and has nothing to do
// with the others: a consumer that is busy holds only what it needs itself.
//
// Barriers. full, of a stage: the producer's arrival and the bytes of all its loads. empty, of a stage: an
// arrival by each warp of each consumer; the producer arrives for those that are no members. listed, of a
// place in a queue: the first producer's arrival. resident: the same for the tiles that a consumer keeps.
//
// A queue has kStages + 1 places, which is enough without a barrier for empty places: an entry is written
// once its stage is empty, then the entry kStages places back has been read; the last has no stage, hence the
// + 1.
#pragma once

#include "kernels/block_sets.cuh"
#include "kernels/cube_tile.cuh"
#include "kernels/member_ring.h"
#include "tiles/register_tile.cuh"

namespace vsa {

struct alignas(16) TileInfo {
  uint64_t valid;  // bit per row of the tiles: a real token
};
static_assert(sizeof(TileInfo) == kTileInfoBytes);

// Info: TileInfo, or a struct that adds more loads of a stage to it.
template <class Tile, int kStages_, int kConsumers_, class Info>
struct MemberRing {
  static constexpr int kStages = kStages_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kPlaces = kStages + 1;
  static constexpr int kWarps = kWarpgroupThreads / kWarpThreads;  // of a consumer
  static constexpr int kProducers = 2;
  static constexpr int kEnd = -1;

  struct alignas(8) Entry {
    int stage;  // kEnd: the list has ended
    uint32_t phase;
  };
  static_assert(sizeof(Entry) == kRingEntryBytes);

  Tile first[kStages], second[kStages];
  Info info[kStages];
  Entry queue[kConsumers][kPlaces];
  Barrier full[kStages], empty[kStages], listed[kConsumers][kPlaces], resident[kConsumers];
  Barrier landed;  // of a stage whose pads the producer clears before it publishes

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init() {
    for (int i = 0; i < kStages; i++) {
      full[i].init(kProducers);
      empty[i].init(kConsumers * kWarps);
    }
    for (int i = 0; i < kConsumers; i++) {
      for (Barrier& barrier : listed[i]) barrier.init(1);
      resident[i].init(1);
    }
    landed.init(kProducers);
  }

  // One warp of a member has finished with a stage. What its wgmma read is read: the caller waited for that.
  VSA_DEVICE void release(int stage) {
    __syncwarp();
    if (elect_one()) empty[stage].arrive();
  }

  // One thread of the producer.
  VSA_DEVICE void enlist(int consumer, int place, const Entry& entry) {
    queue[consumer][place] = entry;
    listed[consumer][place].arrive();
  }
};

// Where the tiles of a ring come from. block_sizes [num_cubes] or null: the valid prefix of each block.
struct TileSource {
  const CubeGrid& grid;
  const int32_t* block_sizes;
  const CUtensorMap& first_map;
  const CUtensorMap& second_map;
  const CubeCoordinates& first_at;
  const CubeCoordinates& second_at;
  int batch, head;
};

// A whole producer warp, number `producer`: all first or all second tiles of the lists; the first producer
// also writes the queues. One warp for both takes longer for a stage than the consumers of head_dim 64.
// `extra(stage, block, full)` runs in one thread of the second producer and may add loads; their bytes are
// `extra_bytes`.
template <class Ring, class Extra>
VSA_DEVICE void fill_ring(Ring& ring, int producer, BlockSets<Ring::kConsumers>& lists,
                          const TileSource& source, int extra_bytes, Extra extra) {
  RingPosition<Ring::kStages> at;
  RingPosition<Ring::kPlaces> place[Ring::kConsumers];
  uint32_t landed_phase = 0;
  int block;
  while (uint32_t members = lists.next(block)) {
    CubeAddress cube{source.batch, source.head, source.grid.origin(block)};
    int prefix = source.block_sizes ? __ldg(source.block_sizes + block) : kCubeTokens;
    int others = Ring::kConsumers - __popc(members);
    bool clear = prefix < kCubeTokens;
    Barrier& arrives = clear ? ring.landed : ring.full[at.stage];

    ring.empty[at.stage].wait(at.phase ^ 1);
    if (producer == 0) {
      if (elect_one()) {
        static_cast<TileInfo&>(ring.info[at.stage]) =
            TileInfo{source.grid.valid_slots(cube.origin) & CubeGrid::ones(prefix)};
        arrives.arrive_expect(sizeof(ring.first[0]));
        load_cube(ring.first[at.stage], source.first_map, source.first_at, cube, arrives);
        if (others > 0) ring.empty[at.stage].arrive(others * Ring::kWarps);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < Ring::kConsumers; i++) {
        if (!(members >> i & 1)) continue;
        if (elect_one()) ring.enlist(i, place[i].stage, {at.stage, at.phase});
        __syncwarp();
        place[i].advance();
      }
    } else {
      if (elect_one()) {
        arrives.arrive_expect(sizeof(ring.second[0]) + extra_bytes);
        load_cube(ring.second[at.stage], source.second_map, source.second_at, cube, arrives);
        extra(at.stage, block, arrives);
      }
      __syncwarp();
    }
    if (clear) {
      // Pads hold real memory, perhaps NaN, and 0 * NaN would spoil the products.
      ring.landed.wait(landed_phase);
      landed_phase ^= 1;
      zero_rows(producer == 0 ? ring.first[at.stage] : ring.second[at.stage], prefix);
      fence_async_shared();  // wgmma reads the zeros through the async proxy
      __syncwarp();
      if (elect_one()) ring.full[at.stage].arrive();
      __syncwarp();
    }
    at.advance();
  }
  if (producer > 0) return;
#pragma unroll
  for (int i = 0; i < Ring::kConsumers; i++) {
    if (elect_one()) ring.enlist(i, place[i].stage, {Ring::kEnd, 0});
    __syncwarp();
  }
}

}  // namespace vsa
