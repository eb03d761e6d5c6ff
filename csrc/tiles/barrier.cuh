// Barriers in shared memory (mbarrier), their rings, and the hardware's named barriers.
#pragma once

#include "tiles/common.cuh"

namespace vsa {

// An mbarrier. A phase ends when `count` threads have arrived and all expected bytes have landed;
// wait(parity) returns once the phase of that parity has ended. A fresh barrier is in phase 0, so wait(1) on
// it returns at once.
struct Barrier {
  uint64_t state;

  VSA_DEVICE void init(int count) { ptx::mbarrier_init(&state, count); }

  // release: what this thread wrote to shared memory before is seen by those who wait for this phase.
  VSA_DEVICE void arrive() {
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &state);
  }

  VSA_DEVICE void arrive(uint32_t count) {
    ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &state, count);
  }

  VSA_DEVICE void arrive_expect(uint32_t bytes) {
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &state, bytes);
  }

  // May suspend the thread for a while; whether the phase has ended.
  VSA_DEVICE bool try_wait(uint32_t parity) {
    return ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cta, &state, parity);
  }

  VSA_DEVICE void wait(uint32_t parity) {
    while (!try_wait(parity)) {
    }
  }
};

// Makes initialised barriers visible to the async proxy; follow it with __syncthreads().
VSA_DEVICE void fence_barrier_init() { ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster); }

// A place in a ring of kStages buffers. `phase` flips each time round: consumers wait for full with `phase`,
// the producer waits for empty with `phase ^ 1`, which passes at once on the first round.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  VSA_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Named barrier `id` (0 is __syncthreads) over `threads` threads; all warps named take part.
VSA_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts these threads in without waiting.
VSA_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace vsa
