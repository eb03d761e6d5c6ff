#pragma once

#include "kernels/gate.h"
#include "launch/plan.h"
#include "launch/plan_fine_forward.h"

namespace vsa {

// Addresses and tensors: 0 where absent. See kernels/combine_backward_params.h for the shapes.
struct CombineBackwardArguments {
  TokenTensor grad_out, out_fine;
  CubeGrid q_grid;
  CubeGrid coarse_grid;  // of q_grid's tokens
  uint64_t block_sizes = 0;
  StridedTensor grad_lse;
  uint64_t coarse = 0;
  Gate gate_fine{}, gate_coarse{};
  uint64_t grad_fine = 0, delta = 0, grad_coarse = 0, grad_gate_fine = 0, grad_gate_coarse = 0;
  uint64_t scalar_fine = 0, scalar_coarse = 0;
};

LaunchPlan plan_combine_backward(const CombineBackwardArguments& arguments);

}  // namespace vsa
