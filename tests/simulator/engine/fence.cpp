// PTX ISA 9.7.13.5 "membar, fence", 8.10 "Axioms": synchronisation through memory and between proxies.
#include "world.h"

namespace sim {

void publish(Warp& warp, u64 key, bool release) {
  if (!release && !warp.at_fence) return;
  warp.world->locations[key][warp.cta->cluster->id].join(release ? warp.view() : *warp.at_fence);
  if (release) warp.advance_clock();
}

void observe(Warp& warp, u64 key, bool acquire) {
  auto found = warp.world->locations.find(key);
  if (found == warp.world->locations.end()) return;
  Clock learnt;
  auto others = std::make_shared<Releases>();
  for (const auto& [cluster, clock] : found->second) {
    if (cluster == warp.cta->cluster->id) {
      learnt.join(clock);
    } else {
      (*others)[cluster] = clock.seen;
      learnt.join_clusters(clock.clusters);
    }
  }
  if (!others->empty()) learnt.join_clusters(others);
  if (acquire) {
    warp.clock.join(learnt);
  } else {
    if (!warp.observed) warp.observed.emplace();
    warp.observed->join(learnt);
  }
}

void memory_fence(Warp& warp) {
  if (warp.observed) warp.clock.join(*warp.observed);
  warp.observed.reset();
  warp.at_fence = warp.view();
  warp.advance_clock();
}

namespace {

Step fence_memory(Warp& warp, const Op&) {
  memory_fence(warp);
  return Step::kYield;
}

// fence.mbarrier_init: the barriers that the warp initialised may be used by the async proxy and other CTAs.
Step fence_init(Warp& warp, const Op&) {
  for (auto& [offset, barrier] : warp.cta->mbarriers) {
    if (barrier.init_warp == &warp && !barrier.fence_step) barrier.fence_step = warp.step;
  }
  warp.advance_clock();
  return Step::kYield;
}

// fence.proxy.async: this thread's ordinary writes before it become visible to the async proxy. The lanes of
// a warp are one agent, so it counts once every lane that wrote has executed it.
Step fence_proxy(Warp& warp, const Op& op) {
  bool covers_shared = op.aux & 1, covers_global = op.aux & 2;
  if (covers_shared) warp.wrote_shared &= ~warp.exec;
  if (covers_global) warp.wrote_global &= ~warp.exec;
  bool shared_done = covers_shared && !warp.wrote_shared, global_done = covers_global && !warp.wrote_global;
  for (auto [lane, own] : warp.lane_agents) {
    if (!(warp.exec >> lane & 1)) continue;
    if (covers_shared) Clock::set(warp.clock.fenced_shared, own, warp.step);
    if (covers_global) Clock::set(warp.clock.fenced_global, own, warp.step);
  }
  if (global_done) Clock::set(warp.clock.fenced_global, warp.agent, warp.step);
  if (shared_done) {
    Clock::set(warp.clock.fenced_shared, warp.agent, warp.step);
    if (warp.copies.agent != kNone) {
      Clock::set(warp.clock.fenced_shared, warp.copies.agent, warp.copies.waited);
    }
    return fence_init(warp, op);
  }
  warp.advance_clock();
  return Step::kYield;
}

Step nothing(Warp&, const Op&) { return Step::kNext; }

}  // namespace

bool decode_fence(const Inst& inst, Decoder&, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "membar" && !inst.has("proxy")) {
    op.fn = fence_memory;
    return true;
  }
  if (name != "fence" && name != "membar") return false;
  if (inst.has("mbarrier_init")) {
    op.fn = fence_init;
  } else if (inst.has("proxy")) {
    bool shared = false, global = false;
    for (const std::string& part : inst.parts) {
      shared |= part.starts_with("shared");
      global |= part == "global";
      if (part.find("sync_restrict") != std::string::npos) return false;
    }
    op.aux = !shared && !global ? 3u : static_cast<u32>(shared) | static_cast<u32>(global) << 1;
    bool async = false;
    for (const std::string& part : inst.parts) async |= part == "async";
    op.fn = async ? fence_proxy : nothing;  // .alias, .tensormap: nothing of theirs is modelled
  } else {
    op.fn = fence_memory;
  }
  return true;
}

}  // namespace sim
