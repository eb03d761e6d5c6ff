// The order in which the consumers of a fine kernel's CTA work through their block lists, for host plans and
// kernels: schedule.cuh makes it, tile_ring.cuh reads it.
#pragma once

#include "kernels/cube_grid.h"

namespace vsa {

// A CTA's task: a group of blocks of one head that are neighbours along time, one a consumer, or a block. Its
// lists are cut into stages of one or two blocks which the same consumers chose: these are loaded once and
// shared. Of thin cubes a stage holds more, in a row of the task's `thin`.
struct Stage {
  // block or nothing | members (a bit a consumer) << kStageBlockBits | kStageTurn | kStagePartial
  uint32_t first;
  // block or the first of its thin rows | kStageThin | kStagePadded | kStagePartial
  uint32_t second;
};
constexpr int kStageBlockBits = 25;
constexpr int kMostMembers = 4;
// One of a round: of stages next to each other of which every consumer is a member of one.
constexpr uint32_t kStageTurn = 1u << 29;
constexpr uint32_t kStageThin = 1u << 29;
constexpr uint32_t kStagePadded = 1u << 30;  // no second block: the first one again, which counts for nothing
constexpr uint32_t kStagePartial = 1u << 31;  // some slot of the block holds no token
// What a stage holds of thin cubes in the place of a block. Where there are fewer, the others lie behind the
// last block, at a side that has a quarter, and arrive as zeros.
constexpr int kThinCubes = kCubeTokens / kThinTokens;
struct alignas(8) ThinRow {
  uint32_t cubes[kThinCubes];  // block | thin_side << kStageBlockBits
  uint16_t valid[kThinCubes];  // bit per slot: a real token
};

// Of `groups` of blocks, those that are a task each. The last partial round of CTAs has the blocks of the
// others, a task each, where that gives no CTA a second one: a block takes less than a group.
constexpr int64_t whole_groups(int64_t groups, int consumers, int64_t num_sms) {
  int64_t last = groups % num_sms;
  return last * consumers <= num_sms ? groups - last : groups;
}
constexpr int64_t tasks_of(int64_t groups, int64_t whole, int consumers) {
  return whole + (groups - whole) * consumers;
}

// Tasks that come before the others; those follow as they are numbered.
struct EarlyTasks {
  int32_t* count;     // null: there are none
  int32_t* tasks;     // [tasks] which
  int32_t* is_early;  // [tasks] 0 or 1
};

// The stages of all tasks. With `offsets`, task by task along the compressed rows of its lists (the list of
// the task's first block, then the second's); else `task_stages` apart.
struct Schedule {
  Stage* stages;           // null: every block has all blocks
  int32_t* counts;         // [tasks + 1] stages of each task, and a counter for fetch_tasks
  EarlyTasks early;        // those with long lists
  const int32_t* offsets;  // [batch * heads, blocks + 1] of the compressed lists, or null
  int32_t whole_tasks;     // tasks of a group of blocks each; those after them have a block each
  int64_t task_stages;     // from one task's stages to the next one's
  int64_t head_stages;     // with offsets: from one head's stages to the next one's
  // By the set of lists that have the cubes (bit masks from 1 on): [tasks, sets, set_thin_rows], or along the
  // compressed rows, each with room for the cubes of two sets. Null: thin cubes are blocks like others.
  ThinRow* thin;
  int32_t set_thin_rows;
  int64_t head_thin_rows;  // with offsets: from one head's to the next one's
};

constexpr int thin_sets(int lists) { return (1 << lists) - 1; }

// A list of n blocks is a member of exactly ceil(n / blocks_per_stage) stages, so that a task has at most the
// sum of these over its lists. If thin cubes stand apart, a list may have one block without a partner more,
// and each set of lists a row that is not full.
constexpr int64_t most_stages(int64_t lists, int64_t longest, int blocks_per_stage, bool thin) {
  return lists * ceil_div(longest, blocks_per_stage) + (thin ? lists + thin_sets(int(lists)) : 0);
}

// Rows for so many thin cubes of a set, whole stages of them; and where those of compressed list number
// `row`, which begins at `offset`, begin.
constexpr int64_t most_thin_rows(int64_t cubes) { return cubes / kThinCubes + 2; }
VSA_HOST_DEVICE constexpr int64_t first_thin_row(int64_t offset, int64_t row) {
  return 2 * (offset / kThinCubes + 2 * row);
}

// Where the stages of compressed list number `row`, which begins at `offset`, may begin.
VSA_HOST_DEVICE constexpr int64_t first_stage(int64_t offset, int64_t row, int blocks_per_stage) {
  return blocks_per_stage == 1 ? offset : (offset + row) / 2 + 2 * row;
}
constexpr int64_t most_head_stages(int64_t entries, int64_t rows, int blocks_per_stage) {
  return first_stage(entries, rows, blocks_per_stage) + 1;
}

}  // namespace vsa
