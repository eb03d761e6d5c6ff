#include "launch/plan_schedule.h"

#include <algorithm>
#include <limits>

#include "kernels/fine_backward_params.h"
#include "kernels/fine_forward_params.h"
#include "launch/check.h"

namespace vsa {

namespace {

struct Grouping {
  int consumers, stage_blocks;
};

Grouping grouping(const ScheduleArguments& arguments) {
  int head_dim = int(arguments.head_dim);
  switch (arguments.pass) {
    case FinePass::kForward:
      return {fine_forward_consumers(head_dim), kForwardStageBlocks};
    case FinePass::kBackwardKv:
    case FinePass::kBackwardFused:
      return {kBackwardConsumers, fine_backward_kv_stage_blocks(head_dim)};
    default:
      return {kBackwardConsumers, kBackwardQStageBlocks};
  }
}

int64_t head_groups(const ScheduleArguments& arguments) {
  return ceil_div(arguments.grid.num_cubes(), grouping(arguments).consumers);
}

int64_t all_groups(const ScheduleArguments& arguments) {
  return head_groups(arguments) * arguments.heads * arguments.batch;
}

int64_t whole_tasks(const ScheduleArguments& arguments) {
  int64_t groups = all_groups(arguments);
  if (arguments.pass != FinePass::kForward) return groups;
  return whole_groups(groups, grouping(arguments).consumers, arguments.num_sms);
}

int64_t head_stages(const ScheduleArguments& arguments) {
  return most_head_stages(arguments.compressed.entries_per_head, arguments.grid.num_cubes(),
                          grouping(arguments).stage_blocks);
}

int64_t set_thin_rows(const ScheduleArguments& arguments) {
  return most_thin_rows(std::min(arguments.max_blocks, num_thin_cubes(arguments.listed_grid)));
}

int64_t head_thin_rows(const ScheduleArguments& arguments) {
  return first_thin_row(arguments.compressed.entries_per_head, arguments.grid.num_cubes());
}

int64_t all_thin_rows(const ScheduleArguments& arguments) {
  if (arguments.compressed.offsets) return head_thin_rows(arguments) * arguments.heads * arguments.batch;
  return num_tasks(arguments) * thin_sets(grouping(arguments).consumers) * set_thin_rows(arguments);
}

// Whether thin cubes stand apart. Not where block_sizes may leave less of them, nor in the fused pass, which
// adds to dQ block by block, nor where a stage cannot name all rows.
bool thin_apart(const ScheduleArguments& arguments) {
  return arguments.pass != FinePass::kBackwardFused && !arguments.block_sizes &&
         num_thin_cubes(arguments.listed_grid) > 0 && all_thin_rows(arguments) < int64_t(kStageThin);
}

// Whether tasks with long lists come first: of key blocks, which queries of real video choose unlike often,
// and only if there are few tasks. Those of all heads then come side by side, and in L2 find fewer of the
// queries that they share with their heads' others: if there are many tasks, or the fused pass adds to dQ
// there, that costs more than the ends of the last tasks (bench/NOTES.md).
bool long_lists_first(const ScheduleArguments& arguments) {
  constexpr int64_t kFewRounds = 32;
  return arguments.compressed.offsets && arguments.pass != FinePass::kBackwardFused &&
         num_tasks(arguments) <= kFewRounds * arguments.num_sms;
}

int64_t task_stages(const ScheduleArguments& arguments) {
  auto [consumers, stage_blocks] = grouping(arguments);
  return most_stages(consumers, arguments.max_blocks, stage_blocks, thin_apart(arguments));
}

}  // namespace

BlockLists make_block_lists(const StridedTensor& counts, const StridedTensor& entries, int64_t num_blocks) {
  BlockLists lists{};
  lists.num_blocks = int32_t(num_blocks);
  if (entries.address == 0) return lists;
  check_argument(counts.address != 0 && counts.strides.size() == 3,
                 "kv_num_blocks: got no tensor of 3 dimensions, expected [batch, heads, num_q_blocks] int32");
  check_argument(
      entries.strides.size() == 4 && entries.strides[3] == 1,
      "kv_indices: got no tensor of 4 dimensions with the last one contiguous, expected [batch, heads, "
      "num_q_blocks, max_blocks] int32");
  lists.counts = pointer<const int32_t>(counts.address);
  lists.entries = pointer<const int32_t>(entries.address);
  for (int i = 0; i < 3; i++) {
    lists.count_strides[i] = counts.strides[i];
    lists.entry_strides[i] = entries.strides[i];
  }
  return lists;
}

FinePass fine_pass(const std::string& name) {
  if (name == "fine_forward") return FinePass::kForward;
  if (name == "fine_backward_kv") return FinePass::kBackwardKv;
  if (name == "fine_backward_fused") return FinePass::kBackwardFused;
  check_argument(name == "fine_backward_q", "pass: got ", name,
                 ", expected fine_forward, fine_backward_kv, fine_backward_q or fine_backward_fused");
  return FinePass::kBackwardQ;
}

int64_t num_tasks(const ScheduleArguments& arguments) {
  return tasks_of(all_groups(arguments), whole_tasks(arguments), grouping(arguments).consumers);
}

int64_t num_stages(const ScheduleArguments& arguments) {
  if (arguments.compressed.offsets) return head_stages(arguments) * arguments.heads * arguments.batch;
  return num_tasks(arguments) * task_stages(arguments);
}

int64_t num_counts(const ScheduleArguments& arguments) {
  int64_t tasks = num_tasks(arguments);
  return tasks + 1 + (long_lists_first(arguments) ? 1 + 2 * tasks : 0);
}

int64_t num_thin(const ScheduleArguments& arguments) {
  return thin_apart(arguments) ? all_thin_rows(arguments) : 0;
}

Schedule make_schedule(const ScheduleArguments& arguments) {
  Schedule schedule{};
  schedule.stages = pointer<Stage>(arguments.stages);
  schedule.counts = pointer<int32_t>(arguments.stage_counts);
  schedule.offsets = arguments.compressed.offsets;
  if (long_lists_first(arguments) && schedule.counts) {
    int64_t tasks = num_tasks(arguments);
    int32_t* count = schedule.counts + tasks + 1;
    schedule.early = {count, count + 1, count + 1 + tasks};
  }
  schedule.whole_tasks = int32_t(whole_tasks(arguments));
  schedule.task_stages = task_stages(arguments);
  if (thin_apart(arguments)) schedule.thin = pointer<ThinRow>(arguments.thin);
  schedule.set_thin_rows = int32_t(set_thin_rows(arguments));
  schedule.head_thin_rows = arguments.compressed.offsets ? head_thin_rows(arguments) : 0;
  schedule.head_stages = arguments.compressed.offsets ? head_stages(arguments) : 0;
  return schedule;
}

LaunchPlan plan_schedule(const ScheduleArguments& arguments) {
  auto [consumers, stage_blocks] = grouping(arguments);
  check_argument(!arguments.lists.entries != !arguments.compressed.offsets,
                 "kv_indices, q_offsets: got both or neither, expected one of the two");
  check_argument(!arguments.compressed.offsets == !arguments.compressed.entries,
                 "q_offsets, q_indices: got one of the two, expected both");
  check_argument(!arguments.compressed.offsets || consumers == 2, "q_offsets: got compressed lists for ",
                 consumers, " consumers, expected 2");
  check_argument(arguments.compressed.entries_per_head <= std::numeric_limits<int32_t>::max(),
                 "q_indices: got ", arguments.compressed.entries_per_head,
                 " entries a head, expected at most 2^31 - 1");
  check_argument(arguments.num_sms > 0, "num_sms: got ", arguments.num_sms, ", expected at least 1");
  check_argument(arguments.stages != 0 && arguments.stage_counts != 0,
                 "stages, counts: got a null pointer, expected device memory");
  check_argument(arguments.thin != 0 || !thin_apart(arguments),
                 "thin: got a null pointer, expected device memory");

  ScheduleParams params{};
  params.lists = arguments.lists;
  params.compressed = arguments.compressed;
  params.grid = arguments.grid;
  params.listed_grid = arguments.listed_grid;
  params.block_sizes = pointer<const int32_t>(arguments.block_sizes);
  params.schedule = make_schedule(arguments);
  params.heads = int32_t(arguments.heads);
  params.groups = int32_t(head_groups(arguments));
  params.num_tasks = int32_t(checked_grid(num_tasks(arguments), "schedule"));
  // Half as many again as on average, where no list is shorter than it may be.
  params.usual_entries =
      3 * consumers * arguments.compressed.entries_per_head / (2 * arguments.grid.num_cubes());
  params.mark_words = schedule_mark_words(arguments.listed_grid.num_cubes());

  LaunchPlan plan;
  plan.shared_bytes = uint32_t(schedule_shared_bytes(consumers, arguments.listed_grid.num_cubes()));
  plan.kernel = text(stage_blocks == 2 ? "schedule_pairs_of_" : "schedule_singles_of_", consumers);
  plan.set_params(params);
  plan.grid[0] = uint32_t(ceil_div(params.num_tasks, kScheduleWarps));
  plan.block[0] = kScheduleWarps * 32;
  return plan;
}

}  // namespace vsa
