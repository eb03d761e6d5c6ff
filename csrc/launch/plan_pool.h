#pragma once

#include "launch/plan.h"

namespace vsa {

// Means of query, key and value over the cubes of `grid`, into arrays [batch, heads, num_cubes, head_dim], on
// a device of num_sms multiprocessors.
LaunchPlan plan_pool(const std::array<TokenTensor, 3>& inputs, const CubeGrid& grid,
                     const std::array<uint64_t, 3>& outputs, int num_sms);

}  // namespace vsa
