#include "launch/plan_transpose_index.h"

#include <algorithm>
#include <limits>

#include "kernels/transpose_index_params.h"
#include "launch/check.h"

namespace vsa {

LaunchPlan plan_transpose_index(const TransposeIndexArguments& arguments) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  check_argument(arguments.lists.entries, "kv_indices: got a null pointer, expected device memory");
  check_argument(arguments.q_offsets != 0 && arguments.q_indices != 0,
                 "q_offsets, q_indices: got a null pointer, expected device memory");
  check_argument(arguments.num_kv_blocks >= 1 && arguments.num_kv_blocks < kMax, "num_kv_blocks: got ",
                 arguments.num_kv_blocks, ", expected 1 to 2^31 - 2");
  check_argument(arguments.num_q_blocks * arguments.max_blocks <= kMax, "kv_indices: got ",
                 arguments.num_q_blocks * arguments.max_blocks, " entries a head, expected at most 2^31 - 1");

  TransposeIndexParams params{};
  params.lists = arguments.lists;
  params.q_offsets = pointer<int32_t>(arguments.q_offsets);
  params.q_indices = pointer<int32_t>(arguments.q_indices);
  params.heads = int32_t(arguments.heads);
  params.num_q_blocks = int32_t(arguments.num_q_blocks);
  params.num_kv_blocks = int32_t(arguments.num_kv_blocks);
  params.max_blocks = int32_t(arguments.max_blocks);
  params.keys_per_pass = int32_t(std::min<int64_t>(arguments.num_kv_blocks, kTransposeMaxKeys));

  LaunchPlan plan;
  plan.kernel = "transpose_index";
  plan.set_params(params);
  plan.grid[0] = checked_grid(arguments.batch * arguments.heads * kTransposeCtas, "transpose_index");
  plan.cluster[0] = kTransposeCtas;
  plan.block[0] = kTransposeThreads;
  plan.shared_bytes = transpose_shared_bytes(params.keys_per_pass);
  return plan;
}

}  // namespace vsa
