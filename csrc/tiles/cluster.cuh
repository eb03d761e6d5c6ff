// Thread block clusters: barriers over all CTAs of a cluster, each other's shared memory and its barriers.
#pragma once

#include "tiles/barrier.cuh"
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

// Arrives at CTA `cta`'s copy of `barrier`: what this thread and those it waited for have read of shared
// memory, the copy engine may overwrite for those that wait there. It says nothing of what they wrote: that
// takes the cluster's scope, whose release ptxas makes a fence of the whole GPU, whose acquire empties L1.
VSA_DEVICE void arrive_remote(const Barrier& barrier, int cta) {
  asm volatile(
      "{\n"
      ".reg .u32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cta.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(&barrier)),
      "r"(cta)
      : "memory");
}

}  // namespace vsa
