#include "launch/plan_combine_backward.h"

#include "kernels/combine_backward_params.h"
#include "launch/check.h"

namespace vsa {

LaunchPlan plan_combine_backward(const CombineBackwardArguments& arguments) {
  const TokenTensor& grad_out = arguments.grad_out;
  check_same_heads(arguments.out_fine, grad_out, "out_fine");
  check_argument(arguments.delta != 0, "delta: got a null pointer, expected device memory");
  check_argument(arguments.coarse % 16 == 0,
                 "coarse: got an address that is not 16-byte aligned; copy the tensor");

  CombineBackwardParams params{};
  check_same_tokens(arguments.coarse_grid, arguments.q_grid, "coarse_grid");
  params.q_grid = arguments.q_grid;
  params.coarse_grid = arguments.coarse_grid;
  params.same_grid = arguments.coarse_grid == arguments.q_grid;
  params.grad_out = make_token_rows(grad_out, arguments.q_grid, "grad_out");
  params.out_fine = make_token_rows(arguments.out_fine, arguments.q_grid, "out_fine");
  params.block_sizes = pointer<const int32_t>(arguments.block_sizes);
  params.grad_lse = pointer<const float>(arguments.grad_lse.address);
  copy_strides(params.grad_lse_strides, arguments.grad_lse, "grad_lse", "[batch, heads, num_q_blocks, 64]");
  params.coarse = pointer<const void>(arguments.coarse);
  params.gate_fine = arguments.gate_fine;
  params.gate_coarse = arguments.gate_coarse;
  params.grad_fine = pointer<void>(arguments.grad_fine);
  params.delta = pointer<float>(arguments.delta);
  params.grad_coarse = pointer<void>(arguments.grad_coarse);
  params.grad_gate_fine = pointer<void>(arguments.grad_gate_fine);
  params.grad_gate_coarse = pointer<void>(arguments.grad_gate_coarse);
  params.scalar_fine = pointer<float>(arguments.scalar_fine);
  params.scalar_coarse = pointer<float>(arguments.scalar_coarse);
  params.heads = int32_t(grad_out.heads);

  LaunchPlan plan;
  plan.kernel = kernel_name("combine_backward", grad_out.head_dim, grad_out.type);
  plan.set_params(params);
  plan.grid[0] = checked_grid(int64_t(arguments.coarse_grid.num_cubes()) * grad_out.heads * grad_out.batch,
                              "combine_backward");
  plan.block[0] = combine_threads(grad_out.head_dim);
  return plan;
}

}  // namespace vsa
