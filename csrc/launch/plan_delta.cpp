#include "launch/plan_delta.h"

#include "kernels/delta_params.h"
#include "launch/check.h"

namespace vsa {

LaunchPlan plan_delta(const DeltaArguments& arguments) {
  const TokenTensor &grad_out = arguments.grad_out, &out = arguments.out;
  check_same_heads(out, grad_out, "out");
  check_argument(arguments.delta != 0, "delta: got a null pointer, expected device memory");

  LaunchPlan plan;
  plan.kernel = kernel_name("delta", grad_out.head_dim, grad_out.type);
  DeltaParams params{};
  params.grid = arguments.grid;
  plan.grid[0] = equal_shares(grad_out.batch * grad_out.heads * arguments.grid.num_cubes(),
                              delta_ctas_per_sm(int(grad_out.head_dim)), arguments.num_sms, "delta");
  CubeMap grad_map = make_cube_map(grad_out, arguments.grid, "grad_out");
  CubeMap out_map = make_cube_map(out, arguments.grid, "out");
  plan.maps = {grad_map.map, out_map.map};
  params.grad_out = grad_map.coordinates;
  params.out = out_map.coordinates;
  params.block_sizes = pointer<const int32_t>(arguments.block_sizes);
  params.grad_lse = pointer<const float>(arguments.grad_lse.address);
  copy_strides(params.grad_lse_strides, arguments.grad_lse, "grad_lse", "[batch, heads, num_cubes, 64]");
  params.delta = pointer<float>(arguments.delta);
  params.batch = int32_t(grad_out.batch);
  params.heads = int32_t(grad_out.heads);
  plan.set_params(params);

  plan.block[0] = kDeltaThreads;
  plan.shared_bytes = delta_shared_bytes(int(grad_out.head_dim));
  return plan;
}

}  // namespace vsa
