// An mbarrier object (PTX ISA 9.7.13.15 "mbarrier"): kept beside shared memory, by address.
#pragma once

#include <map>

#include "clock.h"

namespace sim {

struct Mbarrier {
  u32 expected = 0;               // arrivals a phase takes
  i64 pending = 0;                // arrivals still missing in this phase
  i64 tx = 0;                     // bytes expected less bytes arrived
  u32 phase = 0;                  // completed phases
  u32 agent = kNone;              // its asynchronous copies; step = phase + 1
  u32 copies = 0, last_copy = 0;  // asynchronous copies under way towards it; step of the last one issued
  u32 copy_pc = 0;
  const void* init_warp = nullptr;
  u32 init_agent = 0, init_step = 0,
      fence_step = 0;  // of fence.mbarrier_init by the initialising warp; 0: none
  u32 init_pc = 0;
  Clock arrived;              // of the arrivals so far
  Clock completed;            // of the arrivals of completed phases
  std::map<u64, i64> waited;  // (warp agent) -> the last phase it waited for
};

}  // namespace sim
