#pragma once

#include "launch/plan.h"

namespace vsa {

// For each query cube the `topk` key cubes with the largest scores query key^T * scale, ascending, into
// counts [batch, heads, num_cubes] and indices [batch, heads, num_cubes, topk]. `query` and `key` hold one
// token a cube.
LaunchPlan plan_select(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                       uint64_t counts, uint64_t indices);

// What plan_select takes for many cubes, and what for few (at most kSelectSmallCubes).
LaunchPlan plan_select_large(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                             uint64_t counts, uint64_t indices);
LaunchPlan plan_select_small(const TokenTensor& query, const TokenTensor& key, int64_t topk, double scale,
                             uint64_t counts, uint64_t indices);

}  // namespace vsa
