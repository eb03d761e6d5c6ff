#pragma once

#include "kernels/schedule_params.h"
#include "launch/plan.h"

namespace vsa {

// counts [batch, heads, rows], entries [batch, heads, rows, max_blocks]; with entries absent every row has
// all blocks.
BlockLists make_block_lists(const StridedTensor& counts, const StridedTensor& entries, int64_t num_blocks);

// The kernels that walk block lists.
enum class FinePass { kForward, kBackwardKv, kBackwardQ, kBackwardFused };

FinePass fine_pass(const std::string& name);

struct ScheduleArguments {
  FinePass pass = FinePass::kForward;
  int64_t batch = 0, heads = 0, head_dim = 0;
  CubeGrid grid, listed_grid;    // of the blocks that have lists, and of those that lists name
  uint64_t block_sizes = 0;      // int32 [blocks of listed_grid], or 0
  BlockLists lists;              // absent with compressed lists
  int64_t max_blocks = 0;        // of one list
  CompressedLists compressed{};  // of the key side
  int num_sms = 1;               // of the device
  // Where the schedule goes: int32 [num_stages, 2], [num_counts] (zeros, with compressed lists) and
  // [num_thin, 6].
  uint64_t stages = 0, stage_counts = 0, thin = 0;
};

int64_t num_stages(const ScheduleArguments& arguments);
int64_t num_tasks(const ScheduleArguments& arguments);
// Stages of each task and a counter; of EarlyTasks, where some may be, their count, numbers and marks.
int64_t num_counts(const ScheduleArguments& arguments);
int64_t num_thin(const ScheduleArguments& arguments);
Schedule make_schedule(const ScheduleArguments& arguments);
LaunchPlan plan_schedule(const ScheduleArguments& arguments);

}  // namespace vsa
