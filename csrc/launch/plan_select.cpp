#include "launch/plan_select.h"

#include <cmath>

#include "kernels/select_params.h"
#include "launch/check.h"

namespace vsa {

LaunchPlan plan_select(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                       uint64_t counts, uint64_t indices) {
  check_same_heads(key, query, "key");
  check_argument(topk >= 1 && topk <= query.tokens, "topk: got ", topk, ", expected 1 to ", query.tokens,
                 ", the number of cubes");
  check_argument(std::isfinite(float(scale)), "scale: got ", scale, ", expected a finite float32");
  check_argument(counts != 0, "counts: got a null pointer, expected device memory");
  check_argument(indices != 0, "indices: got a null pointer, expected device memory");

  CubeGrid grid = make_grid({1, 1, query.tokens}, {1, 1, kCubeTokens});
  CubeMap query_map = make_cube_map(query, grid, "query"), key_map = make_cube_map(key, grid, "key");
  SelectParams params{};
  params.query = query_map.coordinates;
  params.key = key_map.coordinates;
  params.counts = pointer<int32_t>(counts);
  params.indices = pointer<int32_t>(indices);
  params.heads = int32_t(query.heads);
  params.num_cubes = int32_t(query.tokens);
  params.topk = int32_t(topk);
  params.scale = float(scale);

  // One row group gives more CTAs; where these have to share SMs, two row groups read the keys half as often.
  int64_t heads = query.batch * query.heads;
  int row_groups = heads * ceil_div(query.tokens, kCubeTokens) > kSelectCtasOfOneRowGroup ? 2 : 1;
  LaunchPlan plan;
  plan.kernel = kernel_name(row_groups == 2 ? "select_wide" : "select", query.head_dim, query.type);
  plan.maps = {query_map.map, key_map.map};
  plan.set_params(params);
  plan.grid[0] = checked_grid(heads * ceil_div(query.tokens, row_groups * kCubeTokens), "select");
  plan.block[0] = select_threads(row_groups);
  plan.shared_bytes = select_shared_bytes(row_groups, query.head_dim);
  return plan;
}

}  // namespace vsa
