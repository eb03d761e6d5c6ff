// Hands the tasks of a grid out to CTAs that stay: whoever is done first gets the next one, as tasks may take
// unlike times. One warp of a CTA fetches, a task ahead; all others read what it got, warp by warp.
#pragma once

#include <climits>

#include "kernels/schedule.h"
#include "kernels/task_queue.h"
#include "tiles/barrier.cuh"

namespace vsa {

struct TaskQueue {
  static constexpr int kPlaces = 2;
  int index[kPlaces];
  Barrier full[kPlaces];            // an arrival by the fetching warp
  Barrier empty[kPlaces];           // an arrival by each reading warp
  uint32_t taken[kTaskQueueWarps];  // by each warp of the CTA; here because consumers have no register for it

  // One thread, before fence_barrier_init and __syncthreads.
  VSA_DEVICE void init(int reading_warps) {
    for (uint32_t& count : taken) count = 0;
    for (Barrier& barrier : full) barrier.init(1);
    for (Barrier& barrier : empty) barrier.init(reading_warps);
  }
};

// The fetching warp. `counter` is 0 when the kernel starts; null: tasks go round instead.
VSA_DEVICE void fetch_tasks(TaskQueue& queue, int32_t* counter, const EarlyTasks& early, int num_tasks) {
  RingPosition<TaskQueue::kPlaces> at;
  int num_early = early.count ? __ldg(early.count) : 0;
  int place = blockIdx.x;  // first those of the early tasks, then those of all
  bool more = true;
  while (__any_sync(0xffffffffu, more)) {
    bool is_early = place < num_early;
    int index = is_early ? __ldg(early.tasks + place) : place - num_early;
    more = index < num_tasks;
    bool done = num_early > 0 && !is_early && more && __ldg(early.is_early + index);
    if (!__any_sync(0xffffffffu, done)) {
      queue.empty[at.stage].wait(at.phase ^ 1);
      if (lane_id() == 0) {
        queue.index[at.stage] = index;
        queue.full[at.stage].arrive();
      }
      at.advance();
    }
    if (lane_id() == 0) place = counter ? gridDim.x + atomicAdd(counter, 1) : place + gridDim.x;
    place = __shfl_sync(0xffffffffu, place, 0);
  }
}

struct NextTask {
  int index;       // not one of the grid's at the end, after which nobody reads on
  uint32_t phase;  // of barriers with a phase a task: 0 for the first one
};

// All warps that read, each for itself.
VSA_DEVICE NextTask next_task(TaskQueue& queue) {
  uint32_t& taken = queue.taken[warp_id()];
  uint32_t number = taken;
  int place = number % TaskQueue::kPlaces;
  queue.full[place].wait(number / TaskQueue::kPlaces % 2);
  // Lane 0 alone reads, the one that gives the place back: racecheck follows no order between the lanes of a
  // warp. Reduced, the compiler knows that all lanes have the same.
  int index = __reduce_max_sync(0xffffffffu, lane_id() == 0 ? queue.index[place] : INT_MIN);
  __syncwarp();  // all have read `taken`
  if (lane_id() == 0) {
    taken = number + 1;
    queue.empty[place].arrive();
  }
  __syncwarp();
  return {index, number % 2};
}

}  // namespace vsa
