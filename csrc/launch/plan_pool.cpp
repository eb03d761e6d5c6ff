#include "launch/plan_pool.h"

#include "kernels/pool_params.h"
#include "launch/check.h"

namespace vsa {

LaunchPlan plan_pool(const std::array<TokenTensor, 3>& inputs, const CubeGrid& grid,
                     const std::array<uint64_t, 3>& outputs, int num_sms) {
  constexpr const char* kArguments[kPoolTensors] = {"query", "key", "value"};

  const TokenTensor& first = inputs[0];
  LaunchPlan plan;
  plan.kernel = kernel_name("pool", first.head_dim, first.type);
  PoolParams params{};
  params.grid = grid;
  params.batch = int32_t(first.batch);
  params.heads = int32_t(first.heads);
  int64_t tiles = int64_t(kPoolTensors) * first.batch * first.heads * grid.num_cubes();
  plan.grid[0] = equal_shares(tiles, kPoolCtasPerSm, num_sms, "pool");
  for (int i = 0; i < kPoolTensors; i++) {
    check_same_heads(inputs[i], first, kArguments[i]);
    CubeMap cube_map = make_cube_map(inputs[i], grid, kArguments[i]);
    plan.maps.push_back(cube_map.map);
    params.input[i] = cube_map.coordinates;
    params.output[i] = pointer<void>(outputs[i]);
    check_argument(outputs[i] != 0, "outputs[", i, "]: got a null pointer, expected device memory");
  }
  plan.set_params(params);

  plan.block[0] = pool_threads(first.head_dim);
  plan.shared_bytes = pool_shared_bytes(first.head_dim);
  return plan;
}

}  // namespace vsa
