#pragma once

#include "kernels/block_list.h"
#include "kernels/schedule.h"

namespace vsa {

// Lists as compressed rows, as transpose_index makes them.
struct CompressedLists {
  const int32_t* offsets;  // [batch * heads, rows + 1]; null where the lists are not compressed
  const int32_t* entries;  // [batch * heads, entries_per_head]
  int64_t entries_per_head;
};

struct ScheduleParams {
  BlockLists lists;
  CompressedLists compressed;  // instead of `lists`, where it has offsets
  CubeGrid grid;               // of the blocks that have lists
  CubeGrid listed_grid;        // of the blocks that lists name
  const int32_t* block_sizes;  // [listed blocks] valid prefix, or null
  Schedule schedule;           // to write
  int32_t heads;
  int32_t groups;  // of cubes in a head
  int32_t num_tasks;
  int64_t usual_entries;  // a task with more of them is early; schedule.early, where there is one, is zeros
  int32_t mark_words;     // of 32 listed blocks, a list; 0: of too many
};

constexpr int kScheduleWarps = 4;  // of a CTA; a task each
// Most listed blocks that have marks in shared memory: a bit each for each list of a warp.
constexpr int kMarkedBlocks = 1 << 14;
constexpr int schedule_mark_words(int blocks) { return blocks <= kMarkedBlocks ? ceil_div(blocks, 32) : 0; }
constexpr int schedule_shared_bytes(int lists, int blocks) {
  return kScheduleWarps * lists * schedule_mark_words(blocks) * int(sizeof(uint32_t));
}

}  // namespace vsa
