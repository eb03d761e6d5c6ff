#include "launch/plan_select.h"

#include <algorithm>
#include <cmath>

#include "kernels/select_params.h"
#include "launch/check.h"

namespace vsa {

namespace {

void check_arguments(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                     uint64_t counts, uint64_t indices) {
  check_same_heads(key, query, "key");
  check_argument(query.batch >= 1 && query.heads >= 1, "query: got batch ", query.batch, ", heads ",
                 query.heads, ", expected at least 1 of each");
  check_argument(topk >= 1 && topk <= query.tokens, "topk: got ", topk, ", expected 1 to ", query.tokens,
                 ", the number of cubes");
  check_argument(std::isfinite(float(scale)), "scale: got ", scale, ", expected a finite float32");
  check_argument(counts != 0, "counts: got a null pointer, expected device memory");
  check_argument(indices != 0, "indices: got a null pointer, expected device memory");
}

// Kernel, grid, maps and params.
LaunchPlan plan_rows(const char* stem, const TokenTensor& query, const TokenTensor& key, int64_t topk,
                     double scale, uint64_t counts, uint64_t indices, int64_t rows_per_cta) {
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
  params.ctas_per_head = int32_t(ceil_div(query.tokens, rows_per_cta));
  params.rows_per_cta = int32_t(rows_per_cta);
  params.scale = float(scale);

  LaunchPlan plan;
  plan.kernel = kernel_name(stem, query.head_dim, query.type);
  plan.maps = {query_map.map, key_map.map};
  plan.set_params(params);
  plan.grid[0] = checked_grid(query.batch * query.heads * params.ctas_per_head, "select");
  return plan;
}

// The fewest rounds of CTAs on the SMs, one on each, and the smallest CTAs that make no more.
int64_t small_rows_per_cta(int64_t heads, int64_t cubes) {
  int64_t ctas_per_head = ceil_div(cubes, select_small_rows(int(cubes)));
  int64_t rounds = ceil_div(heads * ctas_per_head, kSelectSms);
  return ceil_div(cubes, std::max(ctas_per_head, rounds * kSelectSms / heads));
}

}  // namespace

LaunchPlan plan_select_large(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                             uint64_t counts, uint64_t indices) {
  check_arguments(query, key, topk, scale, counts, indices);
  // One row group gives more CTAs; where these have to share SMs, two row groups read the keys half as often.
  int64_t heads = query.batch * query.heads;
  int row_groups = heads * ceil_div(query.tokens, kCubeTokens) > kSelectSms ? 2 : 1;
  LaunchPlan plan = plan_rows(row_groups == 2 ? "select_wide" : "select", query, key, topk, scale, counts,
                              indices, row_groups * kCubeTokens);
  plan.block[0] = select_threads(row_groups);
  plan.shared_bytes = select_shared_bytes(row_groups, query.head_dim);
  return plan;
}

LaunchPlan plan_select_small(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                             uint64_t counts, uint64_t indices) {
  check_arguments(query, key, topk, scale, counts, indices);
  check_argument(query.tokens <= kSelectSmallCubes, "query: got ", query.tokens, " cubes, expected at most ",
                 kSelectSmallCubes);
  int64_t rows = small_rows_per_cta(query.batch * query.heads, query.tokens);
  LaunchPlan plan = plan_rows("select_small", query, key, topk, scale, counts, indices, rows);
  plan.block[0] = kSelectSmallThreads;
  plan.shared_bytes = select_small_shared_bytes(query.head_dim, query.tokens, rows);
  return plan;
}

LaunchPlan plan_select(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                       uint64_t counts, uint64_t indices) {
  auto plan = query.tokens <= kSelectSmallCubes ? plan_select_small : plan_select_large;
  return plan(query, key, topk, scale, counts, indices);
}

}  // namespace vsa
