#include "launch/plan_fine_forward.h"

#include <algorithm>
#include <cmath>

#include "kernels/fine_forward_params.h"
#include "launch/check.h"

namespace vsa {

Gate make_gate(const StridedTensor& values, uint64_t scalar, float factor) {
  Gate gate{};
  gate.factor = factor;
  gate.scalar = pointer<const float>(scalar);
  gate.values = pointer<const void>(values.address);
  copy_strides(gate.strides, values, "gate", "[batch, tokens, heads, head_dim]");
  gate.vector_rows = values.address % 16 == 0 && gate.strides[3] == 1;
  for (int i = 0; i < 3; i++) gate.vector_rows = gate.vector_rows && gate.strides[i] % kVectorElements == 0;
  return gate;
}

namespace {

// Of head_dim 128 where every block has all blocks (bench/NOTES.md): what a group takes in a CTA of a pair,
// and what a block takes alone, over a group.
constexpr double kPairedTime = 0.95, kBlockTime = 0.77;

// Of CTAs on their own.
double rounds_alone(int64_t groups, int num_sms) {
  int64_t whole = whole_groups(groups, fine_forward_consumers(128), num_sms);
  return double(ceil_div(whole, int64_t(num_sms))) + (whole < groups ? kBlockTime : 0.0);
}

}  // namespace

LaunchPlan plan_fine_forward(const FineForwardArguments& arguments) {
  const TokenTensor& query = arguments.query;
  check_same_heads(arguments.key, query, "key");
  check_same_heads(arguments.value, query, "value");
  check_same_heads(arguments.out, query, "out");
  check_argument(arguments.lse != 0, "lse: got a null pointer, expected device memory");

  LaunchPlan plan;
  FineForwardParams params{};
  params.q_grid = arguments.q_grid;
  params.kv_grid = arguments.kv_grid;
  params.coarse_grid = arguments.coarse_grid;
  check_same_tokens(arguments.coarse_grid, arguments.q_grid, "coarse_grid");

  params.query = add_cube_map(plan, query, arguments.q_grid, "query");
  params.key = add_listed_maps(plan, arguments.key, arguments.kv_grid, "key");
  params.value = add_listed_maps(plan, arguments.value, arguments.kv_grid, "value");
  params.key_rows = make_token_rows(arguments.key, arguments.kv_grid, "key");
  params.out = make_token_rows(arguments.out, arguments.q_grid, "out");
  params.store_out_fine = arguments.store_out_fine;
  if (params.store_out_fine) {
    params.out_fine = make_token_rows(arguments.out_fine, arguments.q_grid, "out_fine");
  }

  params.schedule = arguments.schedule;
  params.block_sizes = pointer<const int32_t>(arguments.block_sizes);
  params.q_block_sizes = pointer<const int32_t>(arguments.q_block_sizes);
  params.lse = pointer<float>(arguments.lse);
  check_argument(arguments.coarse % 16 == 0,
                 "coarse: got an address that is not 16-byte aligned; copy the tensor");
  params.coarse = pointer<const void>(arguments.coarse);
  params.same_grid = arguments.coarse_grid == arguments.q_grid;
  params.gate_fine = arguments.gate_fine;
  params.gate_coarse = arguments.gate_coarse;
  const Gate& gate = params.gate_fine;
  params.combine = params.coarse || gate.values || gate.scalar || gate.factor != 1.0f;
  constexpr double kLog2E = 1.4426950408889634;
  params.scale_log2 = float(arguments.scale * kLog2E);
  check_argument(std::isfinite(params.scale_log2) && params.scale_log2 > 0, "scale: got ", arguments.scale,
                 ", expected a finite number above 0 in float32");
  params.heads = int32_t(query.heads);
  int head_dim = int(query.head_dim);
  check_argument(arguments.num_sms > 0, "num_sms: got ", arguments.num_sms, ", expected at least 1");
  int64_t rows = query.heads * query.batch;
  int64_t groups = ceil_div(arguments.q_grid.num_cubes(), fine_forward_consumers(head_dim));
  // Not with block_sizes: tiles whose pads are to be cleared land at a barrier that knows of no peer.
  bool paired = head_dim == 128 && !params.schedule.stages && !params.block_sizes &&
                pays_in_pairs(rows, groups, arguments.num_sms, kPairedTime,
                              rounds_alone(rows * groups, arguments.num_sms));
  plan.kernel = kernel_name(paired ? "fine_forward_dense" : "fine_forward", query.head_dim, query.type);
  plan.cluster[0] = paired ? 2 : 1;
  params.groups = int32_t(paired ? 2 * ceil_div(groups, 2) : groups);
  int64_t whole = params.schedule.whole_tasks, all = params.groups * rows;
  int consumers = fine_forward_consumers(head_dim);
  if (!params.schedule.stages) whole = paired ? all : whole_groups(all, consumers, arguments.num_sms);
  params.num_tasks = int32_t(checked_grid(tasks_of(all, whole, consumers), "fine_forward"));
  params.schedule.whole_tasks = int32_t(whole);
  if (params.schedule.stages) params.next_task = params.schedule.counts + params.num_tasks;
  plan.set_params(params);
  int ctas = std::min(params.num_tasks, arguments.num_sms);
  plan.grid[0] = ctas - ctas % int(plan.cluster[0]);
  plan.block[0] = fine_forward_threads(head_dim);
  plan.shared_bytes = fine_forward_shared_bytes(head_dim);
  return plan;
}

}  // namespace vsa
