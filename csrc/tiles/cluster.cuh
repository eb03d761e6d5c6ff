// Thread block clusters: barriers over all CTAs of a cluster and each other's shared memory.
#pragma once

#include "tiles/shared_tile.cuh"

namespace vsa {

VSA_DEVICE int cluster_cta() { return ptx::get_sreg_cluster_ctarank(); }

// All threads of all CTAs; what they wrote to shared memory before is seen after.
VSA_DEVICE void cluster_sync() {
  ptx::barrier_cluster_arrive();
  ptx::barrier_cluster_wait();
}

// Reads CTA `cta`'s copy of `value`, a word of shared memory.
VSA_DEVICE int load_remote(const int* value, int cta) {
  int result;
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.s32 %0, [remote];\n"
      "}\n"
      : "=r"(result)
      : "r"(shared_address(value)), "r"(cta)
      : "memory");
  return result;
}

}  // namespace vsa
