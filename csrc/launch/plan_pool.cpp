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
  check_argument(num_sms > 0, "num_sms: got ", num_sms, ", expected at least 1");
  // As many CTAs as run at once, with equal shares: no second round that is not full.
  int64_t tiles = checked_grid(int64_t(kPoolTensors) * first.batch * first.heads * grid.num_cubes(), "pool");
  params.tiles_per_cta = int32_t(ceil_div(tiles, int64_t(num_sms) * kPoolCtasPerSm));
  for (int i = 0; i < kPoolTensors; i++) {
    check_same_heads(inputs[i], first, kArguments[i]);
    CubeMap cube_map = make_cube_map(inputs[i], grid, kArguments[i]);
    plan.maps.push_back(cube_map.map);
    params.input[i] = cube_map.coordinates;
    params.output[i] = pointer<void>(outputs[i]);
    check_argument(outputs[i] != 0, "outputs[", i, "]: got a null pointer, expected device memory");
  }
  plan.set_params(params);

  plan.grid[0] = uint32_t(ceil_div(tiles, params.tiles_per_cta));
  plan.block[0] = pool_threads(first.head_dim);
  plan.shared_bytes = pool_shared_bytes(first.head_dim);
  return plan;
}

}  // namespace vsa
