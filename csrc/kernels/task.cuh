// What a CTA of a fine kernel works on at a time, and where its stages lie.
#pragma once

#include <climits>

#include "kernels/cube_tile.cuh"
#include "kernels/schedule.h"

namespace vsa {

// The blocks at `blocks` positions from `first` on, in the order along time, of one head; a consumer each.
struct Task {
  int batch, head, first, blocks;
  int64_t head_row;  // batch * heads + head

  VSA_DEVICE int block(const CubeGrid& grid, int consumer) const {
    return grid.cube_along_time(first + consumer);
  }
  VSA_DEVICE CubeAddress address(const CubeGrid& grid, int block) const {
    return {batch, head, grid.origin(block)};
  }
};

// `groups` of blocks in a head. The first `whole_tasks` tasks are a group each, those after them a block; of
// a head's last group, which may have fewer than kConsumers, some may be none.
template <int kConsumers>
VSA_DEVICE Task task_at(const CubeGrid& grid, int heads, int groups, int whole_tasks, int index) {
  int group = index, consumer = 0, most = kConsumers;
  if (index >= whole_tasks) {
    int rest = index - whole_tasks;
    group = whole_tasks + rest / kConsumers;
    consumer = rest % kConsumers;
    most = 1;
  }
  int row = uint32_t(group) / uint32_t(groups);
  int first = (group - row * groups) * kConsumers + consumer;
  int blocks = max(0, min(most, grid.num_cubes() - first));
  return {row / heads, row % heads, blocks ? first : 0, blocks, row};
}

// Number i of a task's stages lies at index(i) in Schedule::stages.
struct StagePlaces {
  int64_t first;
  int split, skip;  // those from `split` on lie `skip` further

  VSA_DEVICE int64_t index(int i) const { return first + i + (i >= split ? skip : 0); }
};

// kBlocks: of a stage.
template <int kConsumers, int kBlocks>
VSA_DEVICE StagePlaces stage_places(const Schedule& schedule, const CubeGrid& grid, const Task& task,
                                    int index) {
  if (kConsumers != 2 || !schedule.offsets) return {index * schedule.task_stages, INT_MAX, 0};
  int rows = grid.num_cubes();
  forget(rows);  // what depends on it takes no register between tasks
  const int32_t* offsets = schedule.offsets + task.head_row * (rows + int64_t(1));
  auto begin = [offsets](int row) { return first_stage(__ldg(offsets + row), row, kBlocks); };
  int first = task.block(grid, 0);
  int64_t at = task.head_row * schedule.head_stages + begin(first);
  if (task.blocks == 1) return {at, INT_MAX, 0};
  int second = task.block(grid, 1);
  int length = __ldg(offsets + first + 1) - __ldg(offsets + first);
  int split = ceil_div(length, kBlocks);
  return {at, split, int(begin(second) - begin(first)) - split};
}

}  // namespace vsa
