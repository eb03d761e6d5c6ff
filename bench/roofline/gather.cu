// How fast the copy engine brings K and V tiles from L2 to shared memory: the ceiling of block-sparse
// attention in which nothing is shared. One thread of a CTA loads the tiles of block lists into a ring,
// another hands each one back at once.
//
// Blocks are cubes of a video, as boxes of a 5-D map over raster tokens, or 64 consecutive tokens; lists are
// random or the same for every query block. Prints a JSON list, a case an element.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "tiles/tma.cuh"

namespace {

constexpr int kBlockTokens = 64, kHeadDim = 128, kPanel = 64;  // a panel is 128 bytes of a row
constexpr int kTokens = 32768, kHeads = 24, kListed = 64;
constexpr int kTileBytes = kBlockTokens * kHeadDim * 2, kPairBytes = 2 * kTileBytes;
constexpr int kMaxStages = 6, kRuns = 5;

struct Blocks {
  const char* name;
  int video[3], cube[3];  // t, h, w
};

struct Params {
  const int* lists;  // [heads, query blocks, kListed]
  int query_blocks, stages;
  int cubes_h, cubes_w, cube_t, cube_h, cube_w;
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gather: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void __launch_bounds__(64) gather(const __grid_constant__ CUtensorMap keys,
                                             const __grid_constant__ CUtensorMap values, Params params) {
  extern __shared__ __align__(1024) char ring[];
  __shared__ vsa::Barrier full[kMaxStages], empty[kMaxStages];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < params.stages; stage++) full[stage].init(1), empty[stage].init(1);
    vsa::fence_barrier_init();
  }
  __syncthreads();
  int rows = params.query_blocks * kHeads, stage = 0;
  uint32_t phase = 0;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    int column = row / params.query_blocks * kHeadDim;
    for (int i = 0; i < kListed; i++) {
      if (threadIdx.x == 0) {
        int block = params.lists[int64_t(row) * kListed + i];
        int w = block % params.cubes_w, h = block / params.cubes_w % params.cubes_h;
        int t = block / params.cubes_w / params.cubes_h;
        empty[stage].wait(phase ^ 1);
        full[stage].arrive_expect(kPairBytes);
        char* tile = ring + stage * kPairBytes;
        for (int panel = 0; panel < kHeadDim / kPanel; panel++, tile += kTileBytes * kPanel / kHeadDim) {
          int at[5] = {column + panel * kPanel, w * params.cube_w, h * params.cube_h, t * params.cube_t, 0};
          vsa::load_async<5>(tile, keys, at, full[stage]);
          vsa::load_async<5>(tile + kTileBytes, values, at, full[stage]);
        }
      } else if (threadIdx.x == 32) {
        full[stage].wait(phase);
        empty[stage].arrive();
      }
      if (++stage == params.stages) stage = 0, phase ^= 1;
    }
  }
}

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         &found));
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Raster tokens [T, H, W, heads, head_dim]; a box is one panel of a block.
CUtensorMap block_map(void* tokens, const Blocks& blocks) {
  cuuint64_t row = kHeads * kHeadDim * 2;
  auto [t, h, w] = blocks.video;
  cuuint64_t extents[5] = {kHeads * kHeadDim, cuuint64_t(w), cuuint64_t(h), cuuint64_t(t), 1};
  cuuint64_t strides[4] = {row, row * w, row * w * h, row * w * h * t};
  cuuint32_t box[5] = {kPanel, cuuint32_t(blocks.cube[2]), cuuint32_t(blocks.cube[1]),
                       cuuint32_t(blocks.cube[0]), 1};
  cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  CUresult result = encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, tokens, extents, strides, box, steps,
                              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::fprintf(stderr, "gather: cuTensorMapEncodeTiled returned %d\n", result);
    std::exit(1);
  }
  return map;
}

std::vector<int> make_lists(int rows, int blocks, bool random) {
  std::mt19937 generator(0);
  std::vector<int> lists(size_t(rows) * kListed), all(blocks);
  for (int i = 0; i < blocks; i++) all[i] = i;
  for (int row = 0; row < rows; row++) {
    int* list = &lists[size_t(row) * kListed];
    if (random) {
      for (int i = 0; i < kListed; i++) std::swap(all[i], all[i + generator() % (blocks - i)]);
    }
    std::copy(all.begin(), all.begin() + kListed, list);
    std::sort(list, list + kListed);
  }
  return lists;
}

float best_milliseconds(const CUtensorMap& keys, const CUtensorMap& values, const Params& params, int ctas,
                        int shared) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 1e30f;
  for (int run = 0; run < kRuns; run++) {
    check(cudaEventRecord(begin));
    gather<<<ctas, 64, shared>>>(keys, values, params);
    check(cudaEventRecord(end));
    check(cudaDeviceSynchronize());
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::min(best, milliseconds);
  }
  return best;
}

}  // namespace

int main() {
  const Blocks layouts[] = {{"cubes", {32, 32, 32}, {4, 4, 4}},
                            {"rows", {1, 1, kTokens}, {1, 1, kBlockTokens}}};
  size_t bytes = size_t(kTokens) * kHeads * kHeadDim * 2;
  char *keys, *values;
  check(cudaMalloc(&keys, bytes));
  check(cudaMalloc(&values, bytes));
  check(cudaMemset(keys, 0, bytes));
  check(cudaMemset(values, 0, bytes));
  check(cudaFuncSetAttribute(gather, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxStages * kPairBytes));
  int sms;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));

  constexpr int kBlocks = kTokens / kBlockTokens;
  int* lists;
  check(cudaMalloc(&lists, size_t(kBlocks) * kHeads * kListed * sizeof(int)));
  const char* separator = "[";
  for (bool random : {true, false}) {
    std::vector<int> host = make_lists(kBlocks * kHeads, kBlocks, random);
    check(cudaMemcpy(lists, host.data(), host.size() * sizeof(int), cudaMemcpyHostToDevice));
    for (const Blocks& layout : layouts) {
      CUtensorMap key_map = block_map(keys, layout), value_map = block_map(values, layout);
      Params params{lists,
                    kBlocks,
                    0,
                    layout.video[1] / layout.cube[1],
                    layout.video[2] / layout.cube[2],
                    layout.cube[0],
                    layout.cube[1],
                    layout.cube[2]};
      // One CTA of 6 stages, or 2 of 3, fill an SM's shared memory.
      for (int per_sm : {1, 2}) {
        params.stages = kMaxStages / per_sm;
        float ms = best_milliseconds(key_map, value_map, params, sms * per_sm, params.stages * kPairBytes);
        double moved = double(kBlocks) * kHeads * kListed * kPairBytes;
        std::printf(
            "%s{\"blocks\": \"%s\", \"lists\": \"%s\", \"ctas_per_sm\": %d, \"stages\": %d, \"ms\": %.5f, "
            "\"tb_per_s\": %.4f}",
            separator, layout.name, random ? "random" : "same", per_sm, params.stages, ms, moved / ms / 1e9);
        separator = ",\n ";
      }
    }
  }
  std::printf("]\n");
}
