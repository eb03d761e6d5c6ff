// The only calls of the CUDA runtime and driver: tensor maps and launches.
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "kernels/combine_backward.cuh"
#include "kernels/delta.cuh"
#include "kernels/fine_backward_kv.cuh"
#include "kernels/fine_backward_q.cuh"
#include "kernels/fine_forward.cuh"
#include "kernels/pool.cuh"
#include "kernels/schedule_params.h"
#include "kernels/select_common.cuh"
#include "kernels/transpose_index.cuh"
#include "launch/check.h"
#include "launch/launch.h"

namespace vsa {

// Defined in the instantiation files beside this one.
extern "C" {
__global__ void combine_backward_d64_bf16(CombineBackwardParams);
__global__ void combine_backward_d64_fp16(CombineBackwardParams);
__global__ void combine_backward_d128_bf16(CombineBackwardParams);
__global__ void combine_backward_d128_fp16(CombineBackwardParams);
__global__ void delta_d64_bf16(DeltaMaps, DeltaParams);
__global__ void delta_d64_fp16(DeltaMaps, DeltaParams);
__global__ void delta_d128_bf16(DeltaMaps, DeltaParams);
__global__ void delta_d128_fp16(DeltaMaps, DeltaParams);
__global__ void fine_backward_fused_d64_bf16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_fused_d64_fp16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_fused_d128_bf16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_fused_d128_fp16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_kv_d64_bf16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_kv_d64_fp16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_kv_d128_bf16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_kv_d128_fp16(FineBackwardKeysMaps, FineBackwardParams);
__global__ void fine_backward_q_d64_bf16(FineBackwardQMaps, FineBackwardParams);
__global__ void fine_backward_q_d64_fp16(FineBackwardQMaps, FineBackwardParams);
__global__ void fine_backward_q_d128_bf16(FineBackwardQMaps, FineBackwardParams);
__global__ void fine_backward_q_d128_fp16(FineBackwardQMaps, FineBackwardParams);
__global__ void fine_backward_q_dense_d64_bf16(FineBackwardQMaps, FineBackwardParams);
__global__ void fine_backward_q_dense_d64_fp16(FineBackwardQMaps, FineBackwardParams);
__global__ void finish_grad_query_d64_bf16(FineBackwardParams);
__global__ void finish_grad_query_d64_fp16(FineBackwardParams);
__global__ void finish_grad_query_d128_bf16(FineBackwardParams);
__global__ void finish_grad_query_d128_fp16(FineBackwardParams);
__global__ void fine_forward_d64_bf16(FineForwardMaps, FineForwardParams);
__global__ void fine_forward_d64_fp16(FineForwardMaps, FineForwardParams);
__global__ void fine_forward_d128_bf16(FineForwardMaps, FineForwardParams);
__global__ void fine_forward_d128_fp16(FineForwardMaps, FineForwardParams);
__global__ void fine_forward_dense_d128_bf16(FineForwardMaps, FineForwardParams);
__global__ void fine_forward_dense_d128_fp16(FineForwardMaps, FineForwardParams);
__global__ void pool_d64_bf16(PoolMaps, PoolParams);
__global__ void pool_d64_fp16(PoolMaps, PoolParams);
__global__ void pool_d128_bf16(PoolMaps, PoolParams);
__global__ void pool_d128_fp16(PoolMaps, PoolParams);
__global__ void schedule_pairs_of_2(ScheduleParams);
__global__ void schedule_pairs_of_3(ScheduleParams);
__global__ void schedule_singles_of_2(ScheduleParams);
__global__ void select_d64_bf16(SelectMaps, SelectParams);
__global__ void select_d64_fp16(SelectMaps, SelectParams);
__global__ void select_d128_bf16(SelectMaps, SelectParams);
__global__ void select_d128_fp16(SelectMaps, SelectParams);
__global__ void select_small_d64_bf16(SelectMaps, SelectParams);
__global__ void select_small_d64_fp16(SelectMaps, SelectParams);
__global__ void select_small_d128_bf16(SelectMaps, SelectParams);
__global__ void select_small_d128_fp16(SelectMaps, SelectParams);
__global__ void select_wide_d64_bf16(SelectMaps, SelectParams);
__global__ void select_wide_d64_fp16(SelectMaps, SelectParams);
__global__ void select_wide_d128_bf16(SelectMaps, SelectParams);
__global__ void select_wide_d128_fp16(SelectMaps, SelectParams);
__global__ void start_grad_query_d64(FineBackwardParams);
__global__ void start_grad_query_d128(FineBackwardParams);
__global__ void transpose_index(TransposeIndexParams);
}

namespace {

using Kernels = std::map<std::string, const void*>;

const Kernels& kernels() {
  static const Kernels all = {
      {"combine_backward_d64_bf16", reinterpret_cast<const void*>(combine_backward_d64_bf16)},
      {"combine_backward_d64_fp16", reinterpret_cast<const void*>(combine_backward_d64_fp16)},
      {"combine_backward_d128_bf16", reinterpret_cast<const void*>(combine_backward_d128_bf16)},
      {"combine_backward_d128_fp16", reinterpret_cast<const void*>(combine_backward_d128_fp16)},
      {"delta_d64_bf16", reinterpret_cast<const void*>(delta_d64_bf16)},
      {"delta_d64_fp16", reinterpret_cast<const void*>(delta_d64_fp16)},
      {"delta_d128_bf16", reinterpret_cast<const void*>(delta_d128_bf16)},
      {"delta_d128_fp16", reinterpret_cast<const void*>(delta_d128_fp16)},
      {"fine_backward_fused_d64_bf16", reinterpret_cast<const void*>(fine_backward_fused_d64_bf16)},
      {"fine_backward_fused_d64_fp16", reinterpret_cast<const void*>(fine_backward_fused_d64_fp16)},
      {"fine_backward_fused_d128_bf16", reinterpret_cast<const void*>(fine_backward_fused_d128_bf16)},
      {"fine_backward_fused_d128_fp16", reinterpret_cast<const void*>(fine_backward_fused_d128_fp16)},
      {"fine_backward_kv_d64_bf16", reinterpret_cast<const void*>(fine_backward_kv_d64_bf16)},
      {"fine_backward_kv_d64_fp16", reinterpret_cast<const void*>(fine_backward_kv_d64_fp16)},
      {"fine_backward_kv_d128_bf16", reinterpret_cast<const void*>(fine_backward_kv_d128_bf16)},
      {"fine_backward_kv_d128_fp16", reinterpret_cast<const void*>(fine_backward_kv_d128_fp16)},
      {"fine_backward_q_d64_bf16", reinterpret_cast<const void*>(fine_backward_q_d64_bf16)},
      {"fine_backward_q_d64_fp16", reinterpret_cast<const void*>(fine_backward_q_d64_fp16)},
      {"fine_backward_q_d128_bf16", reinterpret_cast<const void*>(fine_backward_q_d128_bf16)},
      {"fine_backward_q_d128_fp16", reinterpret_cast<const void*>(fine_backward_q_d128_fp16)},
      {"fine_backward_q_dense_d64_bf16", reinterpret_cast<const void*>(fine_backward_q_dense_d64_bf16)},
      {"fine_backward_q_dense_d64_fp16", reinterpret_cast<const void*>(fine_backward_q_dense_d64_fp16)},
      {"finish_grad_query_d64_bf16", reinterpret_cast<const void*>(finish_grad_query_d64_bf16)},
      {"finish_grad_query_d64_fp16", reinterpret_cast<const void*>(finish_grad_query_d64_fp16)},
      {"finish_grad_query_d128_bf16", reinterpret_cast<const void*>(finish_grad_query_d128_bf16)},
      {"finish_grad_query_d128_fp16", reinterpret_cast<const void*>(finish_grad_query_d128_fp16)},
      {"fine_forward_d64_bf16", reinterpret_cast<const void*>(fine_forward_d64_bf16)},
      {"fine_forward_d64_fp16", reinterpret_cast<const void*>(fine_forward_d64_fp16)},
      {"fine_forward_d128_bf16", reinterpret_cast<const void*>(fine_forward_d128_bf16)},
      {"fine_forward_d128_fp16", reinterpret_cast<const void*>(fine_forward_d128_fp16)},
      {"fine_forward_dense_d128_bf16", reinterpret_cast<const void*>(fine_forward_dense_d128_bf16)},
      {"fine_forward_dense_d128_fp16", reinterpret_cast<const void*>(fine_forward_dense_d128_fp16)},
      {"pool_d64_bf16", reinterpret_cast<const void*>(pool_d64_bf16)},
      {"pool_d64_fp16", reinterpret_cast<const void*>(pool_d64_fp16)},
      {"pool_d128_bf16", reinterpret_cast<const void*>(pool_d128_bf16)},
      {"pool_d128_fp16", reinterpret_cast<const void*>(pool_d128_fp16)},
      {"schedule_pairs_of_2", reinterpret_cast<const void*>(schedule_pairs_of_2)},
      {"schedule_pairs_of_3", reinterpret_cast<const void*>(schedule_pairs_of_3)},
      {"schedule_singles_of_2", reinterpret_cast<const void*>(schedule_singles_of_2)},
      {"select_d64_bf16", reinterpret_cast<const void*>(select_d64_bf16)},
      {"select_d64_fp16", reinterpret_cast<const void*>(select_d64_fp16)},
      {"select_d128_bf16", reinterpret_cast<const void*>(select_d128_bf16)},
      {"select_d128_fp16", reinterpret_cast<const void*>(select_d128_fp16)},
      {"select_small_d64_bf16", reinterpret_cast<const void*>(select_small_d64_bf16)},
      {"select_small_d64_fp16", reinterpret_cast<const void*>(select_small_d64_fp16)},
      {"select_small_d128_bf16", reinterpret_cast<const void*>(select_small_d128_bf16)},
      {"select_small_d128_fp16", reinterpret_cast<const void*>(select_small_d128_fp16)},
      {"select_wide_d64_bf16", reinterpret_cast<const void*>(select_wide_d64_bf16)},
      {"select_wide_d64_fp16", reinterpret_cast<const void*>(select_wide_d64_fp16)},
      {"select_wide_d128_bf16", reinterpret_cast<const void*>(select_wide_d128_bf16)},
      {"select_wide_d128_fp16", reinterpret_cast<const void*>(select_wide_d128_fp16)},
      {"start_grad_query_d64", reinterpret_cast<const void*>(start_grad_query_d64)},
      {"start_grad_query_d128", reinterpret_cast<const void*>(start_grad_query_d128)},
      {"transpose_index", reinterpret_cast<const void*>(transpose_index)},
  };
  return all;
}

void check_cuda(cudaError_t status, const LaunchPlan& plan, int device, const char* doing) {
  if (status == cudaSuccess) return;
  throw LaunchError(text(plan.kernel, " on device ", device, ", grid (", plan.grid[0], ", ", plan.grid[1],
                         ", ", plan.grid[2], "): ", doing, " failed with ", cudaGetErrorName(status), ": ",
                         cudaGetErrorString(status)));
}

// The driver's function by name and version: the binary links no libcuda, so it imports where there is no
// driver.
PFN_cuTensorMapEncodeTiled_v12000 encode_function(const LaunchPlan& plan, int device) {
  static std::mutex mutex;
  static void* function = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (!function) {
    cudaDriverEntryPointQueryResult result;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                                &result),
               plan, device, "finding cuTensorMapEncodeTiled in the driver");
    if (result != cudaDriverEntryPointSuccess || !function) {
      throw LaunchError(
          "cuTensorMapEncodeTiled is not in this driver; expected driver 525 (CUDA 12.0) or newer");
    }
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

CUtensorMap encode(const TensorMapPlan& map, const LaunchPlan& plan, int device) {
  CUtensorMapDataType type = map.type == ElementType::kBFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                             : map.type == ElementType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  std::vector<cuuint64_t> extents(map.extents.begin(), map.extents.end());
  std::vector<cuuint64_t> strides(map.strides.begin(), map.strides.end());
  std::vector<cuuint32_t> box(map.box.begin(), map.box.end()), steps(map.box.size(), 1);
  CUtensorMap result;
  CUresult status = encode_function(plan, device)(
      &result, type, cuuint32_t(map.extents.size()), reinterpret_cast<void*>(map.address), extents.data(),
      strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
      map.swizzle == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string shape;
    for (size_t i = 0; i < extents.size(); i++) {
      shape += text(i ? ", " : "", extents[i], i ? text(" by ", strides[i - 1], " bytes") : std::string());
    }
    throw LaunchError(text(plan.kernel, " on device ", device, ": cuTensorMapEncodeTiled failed with error ",
                           int(status), " for extents (", shape, ")"));
  }
  return result;
}

// Makes `device` current for the calls between, as torch leaves it otherwise. Sets it even where it is
// current already: a thread's first call here may be one of the driver, which needs the context that this
// makes.
class DeviceGuard {
 public:
  DeviceGuard(const LaunchPlan& plan, int device) {
    check_cuda(cudaGetDevice(&previous_), plan, device, "reading the current device");
    check_cuda(cudaSetDevice(device), plan, device, "choosing the device");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Once for each kernel and device: more than 48 KB of dynamic shared memory has to be asked for.
void allow_shared_bytes(const LaunchPlan& plan, const void* kernel, int device) {
  constexpr uint32_t kAlwaysAllowed = 48 * 1024;
  if (plan.shared_bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, uint32_t> allowed;
  std::lock_guard<std::mutex> lock(mutex);
  uint32_t& bytes = allowed[{kernel, device}];
  if (bytes >= plan.shared_bytes) return;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared_bytes)), plan,
      device, "asking for shared memory");
  bytes = plan.shared_bytes;
}

}  // namespace

void launch(const LaunchPlan& plan, int device, uint64_t stream) {
  auto kernel = kernels().find(plan.kernel);
  if (kernel == kernels().end()) throw LaunchError(text("kernel ", plan.kernel, " is not in this binary"));
  DeviceGuard guard(plan, device);
  allow_shared_bytes(plan, kernel->second, device);

  std::vector<CUtensorMap> maps;
  maps.reserve(plan.maps.size());
  for (const TensorMapPlan& map : plan.maps) maps.push_back(encode(map, plan, device));
  void* params = const_cast<char*>(plan.params.data());
  void* with_maps[] = {maps.data(), params};
  void* without_maps[] = {params};

  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
  config.blockDim = dim3(plan.block[0], plan.block[1], plan.block[2]);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {plan.cluster[0], plan.cluster[1], plan.cluster[2]};
  if (plan.cluster[0] * plan.cluster[1] * plan.cluster[2] > 1) {
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelExC(&config, kernel->second, maps.empty() ? without_maps : with_maps), plan,
             device, "launch");
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& kernel : kernels()) names.push_back(kernel.first);
  return names;
}

int cuda_version() { return CUDART_VERSION; }

}  // namespace vsa
