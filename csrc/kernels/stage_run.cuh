// The stages of a task as the warps of a fine kernel read them: 32 at a time, a lane each.
#pragma once

#include "kernels/task.cuh"

namespace vsa {

VSA_DEVICE int stage_block(uint32_t word) { return word & ((1u << kStageBlockBits) - 1); }
VSA_DEVICE uint32_t stage_members(const Stage& stage) {
  return stage.first >> kStageBlockBits & ((1u << kMostMembers) - 1);
}
VSA_DEVICE bool is_thin(const Stage& stage) { return stage.second & kStageThin; }
VSA_DEVICE bool is_padded(const Stage& stage) { return stage.second & kStagePadded; }
VSA_DEVICE bool is_partial(const Stage& stage) { return (stage.first | stage.second) & kStagePartial; }

// The blocks that the lists of a kernel name.
struct ListedBlocks {
  const CubeGrid& grid;
  const int32_t* sizes;  // [blocks] valid prefix, or null

  VSA_DEVICE int prefix(int block) const { return sizes ? __ldg(sizes + block) : kCubeTokens; }
  VSA_DEVICE uint32_t partial_flag(int block) const {
    return prefix(block) < kCubeTokens || !grid.is_full(grid.origin(block)) ? kStagePartial : 0;
  }
  // Bit per slot of the block: a real token.
  VSA_DEVICE uint64_t valid_rows(int block) const {
    return grid.valid_slots(grid.origin(block)) & CubeGrid::ones(prefix(block));
  }
};

// Without a schedule a stage holds the next blocks of all, for every consumer. kListed: there may be one.
template <int kBlocks, bool kListed_ = true>
struct StageRun {
  static constexpr bool kListed = kListed_;

  const Schedule& schedule;
  ListedBlocks blocks;
  StagePlaces places;
  int count;
  uint32_t everyone;  // members of a stage without a schedule

  // Stage number i; of no member from `count` on.
  VSA_DEVICE Stage load(int i) const {
    if (i >= count) return {0, 0};
    if (kListed && schedule.stages) {
      uint2 words = __ldg(reinterpret_cast<const uint2*>(schedule.stages + places.index(i)));
      return {words.x, words.y};
    }
    uint32_t first = kBlocks * i, second = first;
    if (kBlocks > 1) second = min(kBlocks * i + kBlocks - 1, blocks.grid.num_cubes() - 1);
    return {first | everyone << kStageBlockBits | blocks.partial_flag(first),
            second | (second == first ? kStagePadded | kStagePartial : blocks.partial_flag(second))};
  }

  // A thin stage's kBlocks rows.
  VSA_DEVICE const ThinRow* thin_rows(const Stage& stage) const {
    int first = stage.second % kStageThin;
    forget(first);  // an address takes no register before it is needed
    return schedule.thin + first;
  }

  // Bit per row of a stage of two blocks: a real token.
  VSA_DEVICE void valid_masks(uint64_t (&masks)[2], const Stage& stage) const {
    if (is_thin(stage)) {
      const ThinRow* rows = thin_rows(stage);
      for (int i = 0; i < 2; i++) masks[i] = __ldg(reinterpret_cast<const uint64_t*>(rows[i].valid));
    } else {
      masks[0] = blocks.valid_rows(stage_block(stage.first));
      masks[1] = is_padded(stage) ? 0 : blocks.valid_rows(stage_block(stage.second));
    }
  }

  // The token in a row that has one: number `slot` of half `half` of a stage of two blocks.
  VSA_DEVICE int64_t token(const Stage& stage, int half, int slot) const {
    if (!is_thin(stage)) {
      return blocks.grid.token(blocks.grid.origin(stage_block(half ? stage.second : stage.first)), slot);
    }
    uint32_t cube = __ldg(thin_rows(stage)[half].cubes + slot / kThinTokens);
    CubeGrid thinned = blocks.grid.thinned(cube >> kStageBlockBits);
    return thinned.token(blocks.grid.origin(stage_block(cube)), slot % kThinTokens);
  }
};

template <int kConsumers, int kBlocks, bool kListed = true>
VSA_DEVICE StageRun<kBlocks, kListed> stage_run(const Schedule& schedule, const CubeGrid& grid,
                                                const ListedBlocks& blocks, const Task& task, int index) {
  StageRun<kBlocks, kListed> run{schedule, blocks};
  if (kListed && schedule.stages) {
    run.places = stage_places<kConsumers, kBlocks>(schedule, grid, task, index);
    run.count = __ldg(schedule.counts + index);
  } else {
    run.count = ceil_div(blocks.grid.num_cubes(), kBlocks);
    run.everyone = (1u << task.blocks) - 1;
  }
  return run;
}

}  // namespace vsa
