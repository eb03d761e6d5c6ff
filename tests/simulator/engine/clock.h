// Happens-before by vector clocks. An agent is a warp's ordinary accesses, or one order of asynchronous
// operations: the phases of an mbarrier, the bulk groups of a thread, the wgmma groups of a warpgroup.
#pragma once

#include <algorithm>
#include <memory>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace sim {

// other clusters of the grid -> the steps of their agents known through releases in global memory
using Releases = std::unordered_map<u32, std::vector<u32>>;

struct Clock {
  std::vector<u32> seen;  // per agent: the last step known to have happened
  // The same, for ordinary writes that a proxy fence of their memory followed (PTX ISA 8.3 "Proxies").
  std::vector<u32> fenced_shared, fenced_global;
  std::shared_ptr<const Releases> clusters;

  static u32 at(const std::vector<u32>& steps, u32 agent) { return agent < steps.size() ? steps[agent] : 0; }
  static void set(std::vector<u32>& steps, u32 agent, u32 step) {
    if (agent >= steps.size()) steps.resize(agent + 1);
    steps[agent] = std::max(steps[agent], step);
  }
  u32 known(u32 agent) const { return at(seen, agent); }
  void learn(u32 agent, u32 step) { set(seen, agent, step); }
  void join(const Clock& other) {
    merge(seen, other.seen);
    merge(fenced_shared, other.fenced_shared);
    merge(fenced_global, other.fenced_global);
    join_clusters(other.clusters);
  }
  void join_clusters(const std::shared_ptr<const Releases>& other) {
    if (!other || other == clusters) return;
    if (!clusters) {
      clusters = other;
      return;
    }
    auto merged = std::make_shared<Releases>(*clusters);
    for (const auto& [cluster, steps] : *other) merge((*merged)[cluster], steps);
    clusters = merged;
  }
  bool known_of(u32 cluster, u32 agent, u32 step) const {
    if (!clusters) return false;
    auto found = clusters->find(cluster);
    return found != clusters->end() && at(found->second, agent) >= step;
  }
  // Whether everything that `other` knows is known here.
  bool covers(const Clock& other) const {
    for (u32 i = 0; i < other.seen.size(); i++) {
      if (at(seen, i) < other.seen[i]) return false;
    }
    return true;
  }
  // What both know: for an operation of several warps.
  void meet(const Clock& other) {
    shrink(seen, other.seen);
    shrink(fenced_shared, other.fenced_shared);
    shrink(fenced_global, other.fenced_global);
  }

 private:
  static void merge(std::vector<u32>& into, const std::vector<u32>& from) {
    if (from.size() > into.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
  }
  static void shrink(std::vector<u32>& into, const std::vector<u32>& from) {
    into.resize(std::min(into.size(), from.size()));
    for (size_t i = 0; i < into.size(); i++) into[i] = std::min(into[i], from[i]);
  }
};

// A step of an agent of a cluster, in one word.
struct Epoch {
  static constexpr int kAgentBits = 14, kClusterBits = 22;
  static u64 make(u32 cluster, u32 agent, u32 step) {
    return u64{cluster} << (32 + kAgentBits) | u64{agent} << 32 | step;
  }
  static u32 cluster(u64 epoch) { return static_cast<u32>(epoch >> (32 + kAgentBits)); }
  static u32 agent(u64 epoch) { return static_cast<u32>(epoch >> 32) & ((1u << kAgentBits) - 1); }
  static u32 step(u64 epoch) { return static_cast<u32>(epoch); }
};

enum class AgentKind : u8 { kWarp, kLoad, kBulkRead, kBulkWrite, kWgmma, kCopyAsync };

}  // namespace sim
