// A ring of tile pairs that two producer warps, one a tile, fill in the order of the consumers' lists; a
// third keeps a queue for each consumer warpgroup that tells it which stages it is a member of. A consumer
// has nothing to do with the others: while it is busy, it holds only what it needs itself.
//
// Barriers. full, of a stage: the producer's arrival and the bytes of all its loads. empty, of a stage: an
// arrival by each warp of each consumer; the third producer arrives for those that are no members. listed, of
// a place in a queue: its arrival. resident: the same for the tiles that a consumer keeps.
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
  static constexpr int kProducers = 2;                             // of tiles
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

// What a producer warp does: load the first or the second tiles, or tell the consumers of their stages. One
// warp for all takes longer for a stage than the consumers of head_dim 64.
enum class RingRole { kFirst, kSecond, kLists };

// A whole producer warp, over all blocks of the lists. `extra(stage, block, full)` runs in one thread of the
// producer of the second tiles and may add loads; their bytes are `extra_bytes`.
template <class Ring, class Extra>
VSA_DEVICE void fill_ring(Ring& ring, RingRole role, BlockSets<Ring::kConsumers>& lists,
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
    if (role == RingRole::kLists) {
      if (elect_one()) {
        static_cast<TileInfo&>(ring.info[at.stage]) =
            TileInfo{source.grid.valid_slots(cube.origin) & CubeGrid::ones(prefix)};
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
      at.advance();
      continue;
    }
    if (elect_one()) {
      if (role == RingRole::kFirst) {
        arrives.arrive_expect(sizeof(ring.first[0]));
        load_cube(ring.first[at.stage], source.first_map, source.first_at, cube, arrives);
      } else {
        arrives.arrive_expect(sizeof(ring.second[0]) + extra_bytes);
        load_cube(ring.second[at.stage], source.second_map, source.second_at, cube, arrives);
        extra(at.stage, block, arrives);
      }
    }
    __syncwarp();
    if (clear) {
      // Pads hold real memory, perhaps NaN, and 0 * NaN would spoil the products.
      ring.landed.wait(landed_phase);
      landed_phase ^= 1;
      zero_rows(role == RingRole::kFirst ? ring.first[at.stage] : ring.second[at.stage], prefix);
      fence_async_shared();  // wgmma reads the zeros through the async proxy
      __syncwarp();
      if (elect_one()) ring.full[at.stage].arrive();
      __syncwarp();
    }
    at.advance();
  }
  if (role != RingRole::kLists) return;
#pragma unroll
  for (int i = 0; i < Ring::kConsumers; i++) {
    if (elect_one()) ring.enlist(i, place[i].stage, {Ring::kEnd, 0});
    __syncwarp();
  }
}

}  // namespace vsa
