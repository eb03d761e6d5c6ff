#pragma once

#include "launch/plan.h"

namespace vsa {

// Addresses: 0 where absent. See kernels/delta_params.h for the shapes.
struct DeltaArguments {
  TokenTensor grad_out, out;
  CubeGrid grid;
  uint64_t block_sizes = 0;
  StridedTensor grad_lse;
  uint64_t delta = 0;
  int num_sms = 0;
};

LaunchPlan plan_delta(const DeltaArguments& arguments);

}  // namespace vsa
