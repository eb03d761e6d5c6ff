// Hands the tasks of a grid out to CTAs that stay: whoever is done first gets the next one, as tasks may take
// unlike times. One warp of a CTA fetches, a task ahead; all others read what it got, warp by warp.
#pragma once

#include "tiles/barrier.cuh"

namespace vsa {

struct TaskQueue {
  static constexpr int kPlaces = 2;
  int index[kPlaces];
  Barrier full[kPlaces];   // an arrival by the fetching warp
  Barrier empty[kPlaces];  // an arrival by each reading warp

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init(int reading_warps) {
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) barrier.init(reading_warps);
  }
};

// The fetching warp. `counter` is 0 when the kernel starts; null: tasks go round instead.
VSA_DEVICE void fetch_tasks(TaskQueue& queue, int32_t* counter, int num_tasks) {
  RingPosition<TaskQueue::kPlaces> at;
  int index = blockIdx.x;
  bool more = true;
  while (__any_sync(0xffffffffu, more)) {
    queue.empty[at.stage].wait(at.phase ^ 1);
    more = index < num_tasks;
    if (lane_id() == 0) {
      queue.index[at.stage] = index;
      queue.full[at.stage].arrive();
      index = counter ? gridDim.x + atomicAdd(counter, 1) : index + gridDim.x;
    }
    index = __shfl_sync(0xffffffffu, index, 0);
    at.advance();
  }
}

class TaskReader {
 public:
  VSA_DEVICE explicit TaskReader(TaskQueue& queue) : queue_(queue) {}

  // The next task; not one of the grid's at the end, after which nobody reads on.
  VSA_DEVICE int next() {
    queue_.full[at_.stage].wait(at_.phase);
    // All lanes have the same; reduced, the compiler knows.
    int index = __reduce_max_sync(0xffffffffu, queue_.index[at_.stage]);
    __syncwarp();
    if (elect_one()) queue_.empty[at_.stage].arrive();
    at_.advance();
    return index;
  }

 private:
  TaskQueue& queue_;
  RingPosition<TaskQueue::kPlaces> at_;
};

}  // namespace vsa
