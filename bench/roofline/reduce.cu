// How fast fp32 tiles are added from shared memory into L2: the ceiling of a backward that accumulates dQ by
// bulk reductions. One thread of a CTA adds tiles of 64 x 128 floats to random places, alone or while it also
// loads as many bytes from random places. Prints a JSON list, a case an element.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "tiles/tma.cuh"

namespace {

constexpr int kTileFloats = 64 * 128, kTileBytes = kTileFloats * 4;
constexpr int kSources = 2, kLandings = 2, kSteps = 1000, kRuns = 5;

struct Params {
  float* sums;        // [blocks, kTileFloats]
  const char* tiles;  // [blocks, kTileBytes]
  const int* places;  // [CTAs, kSteps]
  int pieces;         // reductions a tile
  bool reduces, loads;
};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "reduce: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void __launch_bounds__(128) reduce(Params params) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ vsa::Barrier landed[kLandings];
  float* source = reinterpret_cast<float*>(memory);
  for (int i = threadIdx.x; i < kSources * kTileFloats; i += blockDim.x) source[i] = 1.0f;
  if (threadIdx.x < kLandings) landed[threadIdx.x].init(1);
  vsa::fence_barrier_init();
  vsa::fence_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;

  char* landing = memory + kSources * kTileBytes;
  const int* places = params.places + blockIdx.x * kSteps;
  for (int step = 0; step < kSteps; step++) {
    int64_t place = places[step];
    if (params.loads) {
      // The landing is overwritten when the load of kLandings steps ago is in.
      int slot = step % kLandings;
      if (step >= kLandings) landed[slot].wait((step / kLandings - 1) & 1);
      landed[slot].arrive_expect(kTileBytes);
      vsa::load_async(landing + slot * kTileBytes, params.tiles + place * kTileBytes, kTileBytes,
                      landed[slot]);
    }
    if (params.reduces) {
      int piece = kTileFloats / params.pieces;
      for (int i = 0; i < kTileFloats; i += piece) {
        cuda::ptx::cp_reduce_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, cuda::ptx::op_add,
                                        params.sums + place * kTileFloats + i,
                                        source + step % kSources * kTileFloats + i, piece * 4);
      }
      vsa::store_commit();
      vsa::store_wait_read<kSources - 1>();
    }
  }
  for (int step = kSteps - kLandings; params.loads && step < kSteps; step++) {
    landed[step % kLandings].wait((step / kLandings) & 1);
  }
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<0>{});  // the sums are in global memory
}

float best_milliseconds(const Params& params, int ctas, int shared) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float best = 1e30f;
  for (int run = 0; run < kRuns; run++) {
    check(cudaEventRecord(begin));
    reduce<<<ctas, 128, shared>>>(params);
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
  constexpr int kShared = (kSources + kLandings) * kTileBytes, kBlocks = 512;  // 16 MB: stays in L2
  check(cudaFuncSetAttribute(reduce, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  int ctas;
  check(cudaDeviceGetAttribute(&ctas, cudaDevAttrMultiProcessorCount, 0));
  std::mt19937 generator(0);
  std::vector<int> host(size_t(ctas) * kSteps);
  for (int& place : host) place = generator() % kBlocks;

  Params params{};
  int* places;
  char* tiles;
  check(cudaMalloc(&places, host.size() * sizeof(int)));
  check(cudaMemcpy(places, host.data(), host.size() * sizeof(int), cudaMemcpyHostToDevice));
  check(cudaMalloc(&params.sums, size_t(kBlocks) * kTileBytes));
  check(cudaMemset(params.sums, 0, size_t(kBlocks) * kTileBytes));
  check(cudaMalloc(&tiles, size_t(kBlocks) * kTileBytes));
  check(cudaMemset(tiles, 0, size_t(kBlocks) * kTileBytes));
  params.places = places;
  params.tiles = tiles;

  const char* separator = "[";
  for (int pieces : {1, 8}) {
    for (bool loads : {false, true}) {
      params.pieces = pieces;
      params.loads = loads;
      params.reduces = true;
      float ms = best_milliseconds(params, ctas, kShared);
      double moved = double(ctas) * kSteps * kTileBytes;
      std::printf("%s{\"pieces\": %d, \"with_loads\": %s, \"ms\": %.5f, \"tb_per_s\": %.4f}", separator,
                  pieces, loads ? "true" : "false", ms, moved / ms / 1e9);
      separator = ",\n ";
    }
  }
  std::printf("]\n");
}
