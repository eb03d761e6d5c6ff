#include "kernels/schedule.cuh"

namespace vsa {

extern "C" __global__ void __launch_bounds__(kScheduleWarps* kWarpThreads, 8)
    schedule_pairs_of_2(const __grid_constant__ ScheduleParams params) {
  make_schedule<2, 2>(params);
}

extern "C" __global__ void __launch_bounds__(kScheduleWarps* kWarpThreads, 8)
    schedule_pairs_of_3(const __grid_constant__ ScheduleParams params) {
  make_schedule<3, 2>(params);
}

extern "C" __global__ void __launch_bounds__(kScheduleWarps* kWarpThreads, 8)
    schedule_singles_of_2(const __grid_constant__ ScheduleParams params) {
  make_schedule<2, 1>(params);
}

}  // namespace vsa
