// The scheduler, which is the adversary, and the interpreter loop with its divergence rules.
#include <algorithm>

#include "world.h"

namespace sim {

namespace {

constexpr u64 kSliceSteps = 20000, kIdleSlices = 50000, kIdleTimeouts = 4;

void unblock(Group& group) {
  group.blocked = false;
  group.sync_mask = 0;
}

}  // namespace

void Warp::advance_clock() {
  clock.learn(agent, ++step);
  for (auto [lane, own] : lane_agents) clock.learn(own, step);
}

void Warp::sync_lanes() {
  synced = step;
  advance_clock();
}

u32 Warp::acting_agent() {
  if (lane_count(exec) != 1 || lane_count(alive) == 1) return agent;
  auto [found, inserted] = lane_agents.try_emplace(first_lane(exec));
  if (inserted) {
    found->second = cta->cluster->add_agent(AgentKind::kWarp, cta->rank << 8 | static_cast<u32>(index));
    clock.learn(found->second, step);
  }
  return found->second;
}

const Clock& Warp::view() {
  u32 acting = acting_agent();
  if (acting == agent) return clock;
  lane_view = clock;
  auto forget = [this](u32 own) {
    for (std::vector<u32>* steps : {&lane_view.seen, &lane_view.fenced_shared, &lane_view.fenced_global}) {
      if (own < steps->size()) (*steps)[own] = std::min((*steps)[own], synced);
    }
  };
  forget(agent);
  for (auto [lane, own] : lane_agents) {
    if (own != acting) forget(own);
  }
  return lane_view;
}

u64 Warp::value(u32 slot, int lane, bool wide) {
  if (!(init[slot] >> lane & 1)) {
    fail("uninitialised", "register used as an address or size was never written", lane);
  }
  return wide ? reg<u64>(slot)[lane] : reg<u32>(slot)[lane];
}

u32 Warp::uniform(u32 slot, const char* what) {
  u32 first = value32(slot, first_lane(exec));
  for (u32 lanes = exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    if (value32(slot, lane) != first) {
      fail("barrier", std::string(what) + " differs between the lanes of a warp", lane);
    }
  }
  return first;
}

// The group that runs has come to where its branch's other lanes will come, too.
void World::reach_join(Warp& warp) {
  Group* group = warp.group;
  while (group->join && group->pc == group->join->pc) {
    std::shared_ptr<Join> join = group->join;
    join->arrived |= group->mask;
    if (join->arrived != join->expected) {
      warp.groups.remove_if([group](const Group& other) { return &other == group; });
      warp.group = nullptr;
      return;
    }
    group->mask = join->arrived;
    group->join = join->outer;
  }
}

void World::exit_lanes(Warp& warp, u32 lanes) {
  warp.alive &= ~lanes;
  Group* group = warp.group;
  group->mask &= ~lanes;
  for (Join* join = group->join.get(); join; join = join->outer.get()) join->expected &= ~lanes;
  if (!group->mask) {
    std::shared_ptr<Join> join = group->join;
    while (join && !join->expected) join = join->outer;
    if (join && join->arrived == join->expected) {
      group->pc = join->pc;
      group->mask = join->arrived;
      group->join = join->outer;
      reach_join(warp);
    } else {
      warp.groups.remove_if([group](const Group& other) { return &other == group; });
      warp.group = nullptr;
    }
  }
  event();
  if (!warp.alive) exit_warp(warp);
}

bool converged(Warp& warp, u32 lanes) {
  lanes &= warp.alive;
  Group& group = *warp.group;
  u32 here = group.mask;
  for (const Group& other : warp.groups) {
    if (&other != &group && other.sync_mask && other.pc == warp.pc) here |= other.mask;
  }
  if (lanes & ~here) {
    group.sync_mask = warp.exec ? warp.exec : kAllLanes;
    return false;
  }
  if ((lanes & ~group.mask) == 0) return true;
  for (auto next = warp.groups.begin(); next != warp.groups.end();) {
    Group& other = *next++;
    if (&other == &group || !other.sync_mask || other.pc != warp.pc) continue;
    warp.exec |= other.sync_mask & other.mask;
    unblock(other);
    other.pc++;
    warp.group = &other;
    warp.world->reach_join(warp);
    warp.group = &group;
  }
  return true;
}

void World::later(Cluster& cluster, std::function<void()> act, std::function<bool()> ready) {
  cluster.pending++;
  pending.push_back({std::move(act), std::move(ready), &cluster});
}

// One operation that may happen now, any of them.
bool World::complete_some() {
  if (pending.empty()) return false;
  u32 start = random.below(static_cast<u32>(pending.size()));
  for (size_t i = 0; i < pending.size(); i++) {
    size_t index = (start + i) % pending.size();
    if (pending[index].ready && !pending[index].ready()) continue;
    Pending chosen = std::move(pending[index]);
    pending.erase(pending.begin() + static_cast<long>(index));
    chosen.cluster->pending--;
    current_ = nullptr;
    chosen.act();
    event();
    return true;
  }
  return false;
}

// wgmma reads and writes registers on its own time (PTX ISA 9.7.15.1, "wgmma.fence", "wgmma.wait_group").
void World::check_wgmma_registers(Warp& warp, u32 index) {
  auto busy = [&warp](u32 slot) { return warp.busy_accumulator[slot] != 0; };
  bool move = program.entry->insts[index].parts[0] == "mov";
  for (u32 slot : program.reads[index]) {
    if (busy(slot)) fail("wgmma-register", "an accumulator is read before wgmma.wait_group");
    warp.stamp[slot] = warp.steps;
  }
  for (u32 slot : program.writes[index]) {
    if (busy(slot)) fail("wgmma-register", "an accumulator is written before wgmma.wait_group");
    if (warp.busy_fragment[slot]) {
      fail("wgmma-register", "a register of operand A is written before wgmma.wait_group");
    }
    // The compiler places copies and constants freely, on either side of the fence; ptxas orders them.
    (move ? warp.move_stamp : warp.stamp)[slot] = warp.steps;
  }
}

void World::run_slice(Warp& warp, Group& start) {
  current_ = &warp;
  warp.group = &start;
  start.blocked = false;
  const Op* ops = program.ops.data();
  u32 count = static_cast<u32>(program.ops.size());
  u64 budget = kSliceSteps, before = progress;
  while (warp.group) {
    Group& group = *warp.group;
    u32 pc = group.pc, mask = group.mask, join = group.join ? group.join->pc : kNone;
    for (bool straight = true; straight;) {
      if (pc >= count) {
        warp.pc = count - 1;
        exit_lanes(warp, mask);
        break;
      }
      const Op& op = ops[pc];
      u32 exec = mask;
      if (op.guard != kNone) {
        u32 lanes = warp.preds[op.guard];
        exec &= op.guard_negated ? ~lanes : lanes;
        if (mask & ~warp.pred_init[op.guard]) {
          warp.pc = pc;
          fail("uninitialised", "the guard predicate was never written",
               first_lane(mask & ~warp.pred_init[op.guard]));
        }
      }
      counts[pc]++;
      warp.steps++;
      Step step = Step::kNext;
      if (exec || op.always) {
        warp.pc = pc;
        warp.exec = exec;
        group.pc = pc;
        if (op.wgmma_registers) check_wgmma_registers(warp, pc);
        step = op.fn(warp, op);
      }
      if (step == Step::kJump) {
        straight = false;
        if (--budget == 0) goto ended;
      } else if (step == Step::kBlock) {
        group.blocked = true;
        group.blocked_at = events;
        counts[pc]--;
        steps += kSliceSteps - budget;
        return;
      } else {
        group.sync_mask = 0;
        pc++;
        if (pc == join) {
          group.pc = pc;
          reach_join(warp);
          straight = false;
        }
        if (--budget == 0 || (step == Step::kYield && random.chance(1, 2))) {
          if (straight) group.pc = pc;
          goto ended;
        }
      }
    }
  }
ended:
  if (budget == 0) progress++;
  steps += kSliceSteps - budget;
  if (progress == before && warp.group == nullptr) progress++;
  if (!warp.alive && warp.groups.empty()) progress++;
}

void World::finish(Cluster& cluster) {
  auto found =
      std::find_if(resident.begin(), resident.end(), [&cluster](auto& c) { return c.get() == &cluster; });
  for (auto& cta : cluster.ctas) {
    for (auto& [offset, barrier] : cta->mbarriers) barrier_phases += barrier.phase;
  }
  resident.erase(found);
}

void World::deadlock() {
  std::string text = "no warp can go on:";
  int listed = 0;
  for (auto& cluster : resident) {
    for (auto& cta : cluster->ctas) {
      for (auto& warp : cta->warps) {
        for (Group& group : warp->groups) {
          if (++listed > 16) continue;
          const Inst& inst = program.entry->insts[std::min<size_t>(group.pc, program.ops.size() - 1)];
          text += "\n  CTA " + std::to_string(cta->linear) + " warp " + std::to_string(warp->index) +
                  " lanes " + hex(group.mask) + " at " + place(group.pc) + ": " + inst.text;
          if (const Mbarrier* barrier = group.waits_on) {
            text += " (misses " + std::to_string(barrier->pending) + " arrivals of " +
                    std::to_string(barrier->expected) + " and " + std::to_string(barrier->tx) +
                    " bytes in phase " + std::to_string(barrier->phase) + ")";
          }
          if (!current_) current_ = warp.get(), warp->pc = group.pc;
        }
      }
    }
  }
  fail("deadlock", text);
}

void World::run() {
  u32 wanted = std::max<u32>(1, launch.resident / cluster_size);
  u32 mode = static_cast<u32>(launch.seed % 4);  // 0 operations at once, 1 as late as can be, 2 and 3 between
  u64 idle_slices = 0, last_progress = 0;
  u32 idle_timeouts = 0;
  u64 favourite = 0;
  std::vector<std::pair<Warp*, Group*>> ready;
  try {
    while (true) {
      while (resident.size() < wanted && next_cluster_ < total_clusters_) start_cluster(next_cluster_++);
      for (size_t i = 0; i < resident.size();) {
        Cluster& cluster = *resident[i];
        bool running = cluster.pending != 0;
        for (auto& cta : cluster.ctas) running |= cta->running != 0;
        if (running) {
          i++;
        } else {
          finish(cluster);
        }
      }
      if (resident.empty() && next_cluster_ == total_clusters_) return;
      ready.clear();
      for (auto& cluster : resident) {
        for (auto& cta : cluster->ctas) {
          if (!cta->running) continue;
          for (auto& warp : cta->warps) {
            for (Group& group : warp->groups) {
              if (!group.blocked || group.blocked_at != events) ready.emplace_back(warp.get(), &group);
            }
          }
        }
      }
      if (progress != last_progress) {
        last_progress = progress;
        idle_slices = 0;
        idle_timeouts = 0;
      }
      bool operation = !pending.empty() && (mode == 0 || (mode == 2 && random.chance(1, 2)) ||
                                            (mode == 3 && random.chance(1, 10)));
      if ((operation || (ready.empty() && !pending.empty()) || idle_slices > 1000) && complete_some()) {
        continue;
      }
      if (ready.empty()) {
        if (resident.empty()) continue;
        bool woken = false;
        for (auto& cluster : resident) {
          for (auto& cta : cluster->ctas) {
            for (auto& warp : cta->warps) {
              for (Group& group : warp->groups) {
                if (group.blocked && group.waits_on) {
                  group.timed_out = true;
                  group.blocked = false;
                  woken = true;
                }
              }
            }
          }
        }
        if (!woken || ++idle_timeouts > kIdleTimeouts) {
          current_ = nullptr;
          deadlock();
        }
        continue;
      }
      if (++idle_slices > kIdleSlices) {
        current_ = nullptr;
        deadlock();
      }
      if (random.chance(1, 64)) favourite = random.next();
      size_t choice =
          random.chance(1, 4) ? random.below(static_cast<u32>(ready.size())) : favourite % ready.size();
      if (mode == 1 && idle_slices < 16) choice = favourite % ready.size();
      run_slice(*ready[choice].first, *ready[choice].second);
      if (launch.max_steps && steps > launch.max_steps) {
        fail("limit", "more than max_steps = " + std::to_string(launch.max_steps) + " warp-instructions");
      }
    }
  } catch (Fault& fault) {
    fault.kernel = launch.kernel;
    if (current_ && fault.ptx_line < 0) {
      fault.cta = static_cast<int>(current_->cta->linear);
      fault.warp = current_->index;
      if (current_->pc < program.entry->insts.size()) {
        const Inst& inst = program.entry->insts[current_->pc];
        fault.ptx_line = inst.line;
        auto file = module.files.find(inst.file);
        if (file != module.files.end()) {
          fault.source_line = file->second + ":" + std::to_string(inst.source_line);
        }
      }
    }
    throw;
  }
}

AgentKind World::agent_kind(u64 epoch) const {
  const Cluster* cluster = find_cluster(Epoch::cluster(epoch));
  return cluster ? cluster->agents[Epoch::agent(epoch)].first : AgentKind::kWarp;
}

Cluster* World::find_cluster(u32 id) const {
  for (auto& cluster : resident) {
    if (cluster->id == id) return cluster.get();
  }
  return nullptr;
}

std::string World::place(u32 pc) const {
  if (pc >= program.entry->insts.size()) return "the end";
  const Inst& inst = program.entry->insts[pc];
  std::string text = "PTX line " + std::to_string(inst.line);
  auto file = module.files.find(inst.file);
  if (file != module.files.end()) text += " (" + file->second + ":" + std::to_string(inst.source_line) + ")";
  return text;
}

std::string World::describe(u64 epoch, u32 pc) const {
  const Cluster* cluster = find_cluster(Epoch::cluster(epoch));
  std::string text;
  if (!cluster) {
    text = "CTA cluster " + std::to_string(Epoch::cluster(epoch));
  } else {
    auto [kind, owner] = cluster->agents[Epoch::agent(epoch)];
    const char* names[] = {"warp ",
                           "a load into the mbarrier at ",
                           "the read of a bulk copy of warp ",
                           "a bulk copy of warp ",
                           "wgmma of warpgroup ",
                           "cp.async of warp "};
    text = names[static_cast<int>(kind)];
    text += kind == AgentKind::kLoad ? hex(owner & 0xffffff) : std::to_string(owner & 0xff);
    text += " of CTA " +
            std::to_string(cluster->ctas[kind == AgentKind::kLoad ? owner >> 24 : owner >> 8]->linear);
  }
  return text + " at " + place(pc);
}

}  // namespace sim
