// The bulk copy engine: boxes of a tensor map and plain runs of bytes, between global and shared memory.
#pragma once

#include <cuda.h>

#include "tiles/barrier.cuh"

namespace vsa {

VSA_DEVICE void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Ordinary writes of this thread to shared memory become visible to the copy engine and to wgmma.
VSA_DEVICE void fence_async_shared() { ptx::fence_proxy_async(ptx::space_shared); }

// One box at `coordinates` (elements, dimension 0 first) into `destination`; `full` gets the box's bytes,
// elements out of range included (they arrive as zeros).
template <int kRank>
VSA_DEVICE void load_async(void* destination, const CUtensorMap& map, const int32_t (&coordinates)[kRank],
                           Barrier& full) {
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, destination, &map, coordinates,
                            &full.state);
}

// The same into every CTA of the cluster whose bit is set in `ctas`: where `destination` lies in each one's
// shared memory, and each one's `full` gets the bytes.
template <int kRank>
VSA_DEVICE void load_async(void* destination, const CUtensorMap& map, const int32_t (&coordinates)[kRank],
                           Barrier& full, uint16_t ctas) {
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, destination, &map, coordinates,
                            &full.state, ctas);
}

// One box out; elements out of range are not written. Completion through store_commit and store_wait_read.
template <int kRank>
VSA_DEVICE void store_async(const CUtensorMap& map, const int32_t (&coordinates)[kRank], const void* source) {
  ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &map, coordinates, source);
}

// A run of `bytes` (a multiple of 16, both ends 16-byte aligned) into shared memory.
VSA_DEVICE void load_async(void* destination, const void* source, uint32_t bytes, Barrier& full) {
  ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, destination, source, bytes, &full.state);
}

// Adds a run of `bytes` in shared memory to one in global memory, number by number.
VSA_DEVICE void add_async(float* destination, const float* source, uint32_t bytes) {
  ptx::cp_reduce_async_bulk(ptx::space_global, ptx::space_shared, ptx::op_add, destination, source, bytes);
}

VSA_DEVICE void store_commit() { ptx::cp_async_bulk_commit_group(); }

// Until the source of all but the newest kPending stores may be overwritten.
template <int kPending>
VSA_DEVICE void store_wait_read() {
  ptx::cp_async_bulk_wait_group_read(ptx::n32_t<kPending>{});
}

}  // namespace vsa
