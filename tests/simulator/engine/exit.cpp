// What must be over when a warp, and when a CTA, exits.
#include "world.h"

namespace sim {

void World::exit_warp(Warp& warp) {
  Cta& cta = *warp.cta;
  for (auto& [lane, queue] : warp.bulk) {
    if (queue.open_operations) fail("exit", "exit with bulk copies that no commit_group closed", lane);
    if (queue.committed > std::max(queue.waited_read, queue.waited)) {
      fail("exit", "exit while bulk copies may still read shared memory: no cp.async.bulk.wait_group", lane);
    }
  }
  if (warp.wgmma_open || warp.wgmma_committed > warp.wgmma_waited) {
    fail("exit", "exit with wgmma in flight: no wgmma.wait_group");
  }
  cta.exit_clock.join(warp.clock);
  if (--cta.running) return;
  for (auto& [offset, barrier] : cta.mbarriers) {
    if (barrier.last_copy && cta.exit_clock.known(barrier.agent) < barrier.last_copy) {
      fail("exit", "exit while a copy into shared memory is under way: nobody waited for the mbarrier at " +
                       hex(offset) + " after the copy at " + place(barrier.copy_pc));
    }
  }
  for (auto& other : cta.warps) {
    const CopyQueue& copies = other->copies;
    if (copies.agent != kNone &&
        cta.exit_clock.known(copies.agent) < copies.committed + (copies.issued_open != 0)) {
      fail("exit", "exit while cp.async of warp " + std::to_string(other->index) +
                       " may be under way: nobody waited for it");
    }
  }
  for (auto [agent, step] : cta.remote) {
    if (cta.exit_clock.known(agent) < step) {
      fail("exit", "exit while another CTA may still use this one's shared memory, as at " +
                       place(cta.remote_pc[agent]));
    }
  }
}

}  // namespace sim
