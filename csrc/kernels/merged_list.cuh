// Several ascending block lists walked as one: each block comes once, with a bit for every list that holds
// it. This is how the consumers of a CTA share the tiles that more than one of them chose.
#pragma once

#include "kernels/block_list.h"
#include "kernels/cube_grid.h"
#include "tiles/common.cuh"

namespace vsa {

// A block and what loading it takes.
struct ListEntry {
  int block;
  Extent3 origin;
  uint64_t valid;  // bit per slot: a real token, and within the block's valid prefix
  int prefix;      // slots before the block's pads
};

// Walked by a whole warp: lane l holds entry l of the next 32 of each list with its origin and validity,
// computed 32 at a time, since one producer warp must keep up with several consumers. A step is a few
// shuffles.
template <int kLists>
class MergedList {
 public:
  // block_sizes [num_cubes] or null: the valid prefix of each block.
  VSA_DEVICE MergedList(const CubeGrid& grid, const int32_t* block_sizes)
      : grid_(grid), block_sizes_(block_sizes) {}

  // `count` blocks from `first` on, or blocks 0 to count - 1 where `first` is null.
  VSA_DEVICE void start(int list, const int32_t* first, int count) {
    first_[list] = first;
    count_[list] = count;
    position_[list] = 0;
    fetch(list);
  }

  // The lowest block not yet given; returns its members, 0 at the end.
  VSA_DEVICE uint32_t next(ListEntry& result) {
    int front[kLists], owner = 0;
    result.block = kEnd;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      front[i] = __shfl_sync(0xffffffffu, lanes_[i].block, position_[i] % kWarpThreads);
      if (front[i] < result.block) owner = i;
      result.block = min(result.block, front[i]);
    }
    if (result.block == kEnd) return 0;

    ListEntry mine = lanes_[0];
    int lane = position_[0] % kWarpThreads;
#pragma unroll
    for (int i = 1; i < kLists; i++) {
      if (owner == i) {
        mine = lanes_[i];
        lane = position_[i] % kWarpThreads;
      }
    }
    result.origin = {__shfl_sync(0xffffffffu, mine.origin.t, lane),
                     __shfl_sync(0xffffffffu, mine.origin.h, lane),
                     __shfl_sync(0xffffffffu, mine.origin.w, lane)};
    result.valid = __shfl_sync(0xffffffffu, mine.valid, lane);
    result.prefix = __shfl_sync(0xffffffffu, mine.prefix, lane);

    uint32_t members = 0;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      if (front[i] != result.block) continue;
      members |= 1u << i;
      if (++position_[i] % kWarpThreads == 0) fetch(i);
    }
    return members;
  }

 private:
  static constexpr int kEnd = 0x7fffffff;

  // The 32 entries from position_ on, one a lane; kEnd beyond the list.
  VSA_DEVICE void fetch(int list) {
    ListEntry& mine = lanes_[list];
    int index = position_[list] + lane_id();
    if (index >= count_[list]) {
      mine.block = kEnd;
      return;
    }
    mine.block = first_[list] ? __ldg(first_[list] + index) : index;
    mine.origin = grid_.origin(mine.block);
    mine.prefix = block_sizes_ ? __ldg(block_sizes_ + mine.block) : kCubeTokens;
    mine.valid = grid_.valid_slots(mine.origin) & CubeGrid::ones(mine.prefix);
  }

  const CubeGrid& grid_;
  const int32_t* block_sizes_;
  const int32_t* first_[kLists];
  int count_[kLists], position_[kLists];
  ListEntry lanes_[kLists];
};

}  // namespace vsa
