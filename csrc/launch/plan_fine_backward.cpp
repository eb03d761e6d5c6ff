#include "launch/plan_fine_backward.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/fine_backward_params.h"
#include "launch/check.h"

namespace vsa {

namespace {

// What all passes take. The maps come in the order of the kernels' map structs: query, key, value, grad_out.
// `fused`: the fused pass or a kernel beside it. `if_all`: which side of the device's choice it is.
FineBackwardParams start(LaunchPlan& plan, const FineBackwardArguments& arguments, const char* kernel,
                         bool fused, bool if_all) {
  const TokenTensor& query = arguments.query;
  check_same_heads(arguments.key, query, "key");
  check_same_heads(arguments.value, query, "value");
  check_same_heads(arguments.grad_out, query, "grad_fine");
  check_argument(arguments.lse != 0, "lse: got a null pointer, expected device memory");
  check_argument(arguments.delta != 0, "delta: got a null pointer, expected device memory");
  check_argument(arguments.row_terms != 0 && arguments.row_terms % 16 == 0,
                 "row_terms: got an address that is null or not 16-byte aligned, expected device memory");

  plan.kernel = kernel_name(kernel, query.head_dim, query.type);
  FineBackwardParams params{};
  params.q_grid = arguments.q_grid;
  params.kv_grid = arguments.kv_grid;
  params.block_sizes = pointer<const int32_t>(arguments.block_sizes);
  params.q_block_sizes = pointer<const int32_t>(arguments.q_block_sizes);
  params.lse = pointer<const float>(arguments.lse);
  params.delta = pointer<const float>(arguments.delta);
  params.row_terms = pointer<void>(arguments.row_terms);
  if (arguments.kv_schedule.thin) {
    int64_t rows = query.batch * query.heads * arguments.q_grid.num_cubes() * int64_t(kCubeTokens);
    params.no_terms = pointer<void>(arguments.row_terms + rows * kRowTermsBytes);
  }
  constexpr double kLog2OfE = 1.4426950408889634;
  params.scale = float(arguments.scale);
  params.scale_log2 = float(arguments.scale * kLog2OfE);
  check_argument(std::isfinite(params.scale_log2) && params.scale > 0, "scale: got ", arguments.scale,
                 ", expected a finite number above 0 in float32");
  params.heads = int32_t(query.heads);
  if (fused) {
    check_argument(
        arguments.grad_query_sums != 0 && arguments.grad_query_sums % 16 == 0,
        "grad_query_sums: got an address that is null or not 16-byte aligned, expected device memory");
    params.grad_query_sums = pointer<float>(arguments.grad_query_sums);
  }
  if (arguments.choose_by) {
    int64_t keys = arguments.kv_grid.num_cubes(), all = arguments.q_grid.num_cubes() * keys;
    check_argument(all <= std::numeric_limits<int32_t>::max(), "q_offsets: got ", all,
                   " pairs of blocks, expected at most 2^31 - 1");
    params.choice = {pointer<const int32_t>(arguments.choose_by) + keys, keys + 1,
                     int32_t(query.heads * query.batch), int32_t(all), if_all};
  }
  return params;
}

// One side of them is listed.
void add_inputs(LaunchPlan& plan, FineBackwardParams& params, const FineBackwardArguments& arguments,
                bool keys_listed) {
  auto& add_query_map = keys_listed ? add_cube_map : add_listed_maps;
  auto& add_key_map = keys_listed ? add_listed_maps : add_cube_map;
  params.query = add_query_map(plan, arguments.query, arguments.q_grid, "query");
  params.key = add_key_map(plan, arguments.key, arguments.kv_grid, "key");
  params.value = add_key_map(plan, arguments.value, arguments.kv_grid, "value");
  params.grad_out = add_query_map(plan, arguments.grad_out, arguments.q_grid, "grad_fine");
}

TokenRows gradient_rows(const TokenTensor& gradient, const TokenTensor& of, const CubeGrid& grid,
                        const char* argument) {
  check_same_heads(gradient, of, argument);
  return make_token_rows(gradient, grid, argument);
}

void set_pooled_grid(FineBackwardParams& params, const CubeGrid& pooled, const CubeGrid& grid,
                     const char* argument) {
  check_same_tokens(pooled, grid, argument);
  params.pooled_grid = pooled;
  params.pooled_on_own_grid = pooled == grid;
}

// Tasks of a head.
int64_t groups_of(const FineBackwardArguments& arguments, const CubeGrid& grid) {
  check_argument(arguments.num_sms > 0, "num_sms: got ", arguments.num_sms, ", expected at least 1");
  return ceil_div(grid.num_cubes(), kBackwardConsumers);
}

void set_shape(LaunchPlan& plan, FineBackwardParams& params, const FineBackwardArguments& arguments,
               int64_t groups) {
  params.groups = int32_t(groups);
  params.num_tasks = int32_t(
      checked_grid(params.groups * arguments.query.heads * arguments.query.batch, plan.kernel.c_str()));
  params.schedule.whole_tasks = params.num_tasks;
  int ctas = std::min(params.num_tasks, arguments.num_sms);
  plan.grid[0] = ctas - ctas % int(plan.cluster[0]);
  if (params.schedule.stages) params.next_task = params.schedule.counts + params.num_tasks;
  plan.block[0] = kBackwardThreads;
  plan.set_params(params);
}

// Of the query pass at head_dim 64 where every block has all blocks: what a task takes in a CTA of a pair,
// over what it takes otherwise (bench/NOTES.md).
constexpr double kPairedTime = 0.92;

// A pass that keeps keys.
LaunchPlan plan_key_pass(const FineBackwardArguments& arguments, const char* kernel, bool fused) {
  LaunchPlan plan;
  FineBackwardParams params = start(plan, arguments, kernel, fused, fused);
  add_inputs(plan, params, arguments, false);
  params.grad_key = gradient_rows(arguments.grad_key, arguments.query, arguments.kv_grid, "dk");
  params.grad_value = gradient_rows(arguments.grad_value, arguments.query, arguments.kv_grid, "dv");
  // What the device chooses for all pairs of blocks needs none.
  if (!fused || (fine_backward_fused_takes_lists(int(arguments.query.head_dim)) && !arguments.choose_by)) {
    params.schedule = arguments.kv_schedule;
    params.adds_directly = arguments.adds_directly;
  }
  set_pooled_grid(params, arguments.pooled_kv_grid, arguments.kv_grid, "pooled_kv_grid");
  params.dk_pooled = pointer<const void>(arguments.dk_pooled);
  params.dv_pooled = pointer<const void>(arguments.dv_pooled);
  set_shape(plan, params, arguments, groups_of(arguments, arguments.kv_grid));
  return plan;
}

void add_grad_query(FineBackwardParams& params, const FineBackwardArguments& arguments) {
  params.grad_query = gradient_rows(arguments.grad_query, arguments.query, arguments.q_grid, "dq");
  set_pooled_grid(params, arguments.pooled_q_grid, arguments.q_grid, "pooled_q_grid");
  params.dq_pooled = pointer<const void>(arguments.dq_pooled);
}

// A CTA a query block of a head.
void set_query_blocks(LaunchPlan& plan, const FineBackwardParams& params,
                      const FineBackwardArguments& arguments) {
  plan.grid[0] =
      checked_grid(int64_t(arguments.q_grid.num_cubes()) * arguments.query.heads * arguments.query.batch,
                   plan.kernel.c_str());
  plan.block[0] = kGradQueryThreads;
  plan.set_params(params);
}

}  // namespace

LaunchPlan plan_fine_backward_kv(const FineBackwardArguments& arguments) {
  LaunchPlan plan = plan_key_pass(arguments, "fine_backward_kv", false);
  plan.shared_bytes = fine_backward_kv_shared_bytes(arguments.query.head_dim);
  return plan;
}

LaunchPlan plan_fine_backward_q(const FineBackwardArguments& arguments) {
  LaunchPlan plan;
  bool all = !arguments.q_schedule.stages;
  int64_t rows = arguments.query.heads * arguments.query.batch,
          groups = groups_of(arguments, arguments.q_grid);
  // Not with block_sizes: tiles whose pads are to be cleared land at a barrier that knows of no peer.
  bool paired = arguments.query.head_dim == 64 && all && !arguments.block_sizes &&
                pays_in_pairs(rows, groups, arguments.num_sms, kPairedTime,
                              double(ceil_div(rows * groups, int64_t(arguments.num_sms))));
  FineBackwardParams params =
      start(plan, arguments, paired ? "fine_backward_q_dense" : "fine_backward_q", false, all);
  add_inputs(plan, params, arguments, true);
  add_grad_query(params, arguments);
  params.schedule = arguments.q_schedule;
  plan.cluster[0] = paired ? 2 : 1;
  set_shape(plan, params, arguments, paired ? 2 * ceil_div(groups, 2) : groups);
  plan.shared_bytes = fine_backward_q_shared_bytes(arguments.query.head_dim);
  return plan;
}

LaunchPlan plan_start_grad_query(const FineBackwardArguments& arguments) {
  LaunchPlan plan;
  FineBackwardParams params = start(plan, arguments, "start_grad_query", true, true);
  plan.kernel = text("start_grad_query_d", arguments.query.head_dim);  // it knows no 16-bit type
  set_query_blocks(plan, params, arguments);
  return plan;
}

LaunchPlan plan_fine_backward_fused(const FineBackwardArguments& arguments) {
  LaunchPlan plan = plan_key_pass(arguments, "fine_backward_fused", true);
  plan.shared_bytes = fine_backward_fused_shared_bytes(arguments.query.head_dim);
  return plan;
}

LaunchPlan plan_finish_grad_query(const FineBackwardArguments& arguments) {
  LaunchPlan plan;
  FineBackwardParams params = start(plan, arguments, "finish_grad_query", true, true);
  add_grad_query(params, arguments);
  set_query_blocks(plan, params, arguments);
  return plan;
}

}  // namespace vsa
