// PTX ISA 9.7.13.1 "bar, barrier", 9.7.13.4 "barrier.cluster".
#include "alu.h"

namespace sim {

namespace {

enum class Use : u32 { kSync, kArrive, kReduceAnd, kReduceOr, kReducePopc };

void finish(World& world, NamedBarrier& barrier) {
  barrier.completed.join(barrier.arriving);
  barrier.arriving = Clock{};
  barrier.arrived = barrier.expected = 0;
  barrier.result_or = barrier.reduction_or;
  barrier.result_and = barrier.reduction_and;
  barrier.result_count = barrier.reduction_count;
  barrier.reduction_or = barrier.reduction_count = 0;
  barrier.reduction_and = 1;
  barrier.generation++;
  world.event();
}

// Threads count in whole warps (9.7.13.1): a warp arrives once, with all its lanes that are here.
void arrive_named(Warp& warp, NamedBarrier& barrier, u32 id, u32 threads, u32 lanes) {
  if (threads == 0 || threads % kLanes) {
    fail("barrier", "barrier " + std::to_string(id) + " over " + std::to_string(threads) +
                        " threads: expected a multiple of 32");
  }
  if (barrier.arrived && barrier.expected != threads) {
    fail("barrier", "barrier " + std::to_string(id) + " over " + std::to_string(threads) +
                        " threads, others said " + std::to_string(barrier.expected));
  }
  barrier.expected = threads;
  barrier.arrived += lanes;
  if (barrier.arrived > barrier.expected) {
    fail("barrier",
         "barrier " + std::to_string(id) + ": more than " + std::to_string(threads) + " threads arrived");
  }
  barrier.arriving.join(warp.view());
  warp.advance_clock();
}

Step bar(Warp& warp, const Op& op) {
  World& world = *warp.world;
  Cta& cta = *warp.cta;
  Group& group = *warp.group;
  u32 id = warp.uniform(op.a, "barrier number");
  if (id >= 16) fail("barrier", "barrier " + std::to_string(id) + ": expected 0 to 15");
  NamedBarrier& barrier = cta.barriers[id];
  Use use = static_cast<Use>(op.aux);
  if (group.ticket == 0) {
    u32 lanes = static_cast<u32>(lane_count(warp.exec));
    // Lanes of the warp that have exited count as arrived; so do a last warp's lanes that never were.
    if (warp.exec == warp.alive) lanes = kLanes;
    u32 threads = op.aux2 ? warp.uniform(op.b, "barrier thread count") : world.warps_per_cta * kLanes;
    if (use >= Use::kReduceAnd) {
      u32 unknown = warp.exec & ~warp.pred_init[op.c];
      if (unknown) fail("uninitialised", "predicate was never written", first_lane(unknown));
      u32 value = (op.negate_a ? ~warp.preds[op.c] : warp.preds[op.c]) & warp.exec;
      barrier.reduction_or |= value != 0;
      barrier.reduction_and &= value == warp.exec;
      barrier.reduction_count += static_cast<u32>(lane_count(value));
    }
    arrive_named(warp, barrier, id, threads, lanes);
    group.ticket = barrier.generation + 1;
    if (barrier.arrived == barrier.expected) finish(world, barrier);
    if (use == Use::kArrive) {
      group.ticket = 0;
      return Step::kYield;
    }
  }
  if (barrier.generation < group.ticket) return Step::kBlock;
  group.ticket = 0;
  warp.clock.join(barrier.completed);
  if (warp.exec == warp.alive) warp.sync_lanes();
  if (use == Use::kReduceAnd) warp.set_pred(op.d, barrier.result_and ? kAllLanes : 0);
  if (use == Use::kReduceOr) warp.set_pred(op.d, barrier.result_or ? kAllLanes : 0);
  if (use == Use::kReducePopc) {
    u32 result[kLanes];
    std::fill(result, result + kLanes, barrier.result_count);
    warp.defined(op.d);
    store_lanes(warp, op.d, result);
  }
  return Step::kYield;
}

Step cluster_arrive(Warp& warp, const Op& op) {
  NamedBarrier& barrier = warp.cta->cluster->barrier;
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    auto [found, fresh] = warp.cta->cluster->arrived_lanes.try_emplace(
        warp.agent * 32u + static_cast<u32>(first_lane(lanes)), barrier.generation);
    if (!fresh && found->second == barrier.generation) {
      fail("barrier", "barrier.cluster.arrive twice without a wait", first_lane(lanes));
    }
    found->second = barrier.generation;
  }
  barrier.expected = warp.world->cluster_size * warp.world->threads;
  barrier.arrived += static_cast<u32>(lane_count(warp.exec));
  if (!op.aux) barrier.arriving.join(warp.view());  // .relaxed orders nothing
  warp.advance_clock();
  if (barrier.arrived == barrier.expected) finish(*warp.world, barrier);
  return Step::kYield;
}

Step cluster_wait(Warp& warp, const Op&) {
  Cluster& cluster = *warp.cta->cluster;
  u32 key = warp.agent * 32u + static_cast<u32>(first_lane(warp.exec));
  auto found = cluster.arrived_lanes.find(key);
  if (found == cluster.arrived_lanes.end()) {
    fail("barrier", "barrier.cluster.wait without an arrive", first_lane(warp.exec));
  }
  if (cluster.barrier.generation <= found->second) return Step::kBlock;
  warp.clock.join(cluster.barrier.completed);
  return Step::kYield;
}

}  // namespace

bool decode_barrier(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name != "bar" && name != "barrier") return false;
  if (inst.has("cluster")) {
    op.aux = inst.has("relaxed");
    op.fn = inst.has("arrive") ? cluster_arrive : cluster_wait;
    return true;
  }
  Use use = inst.has("arrive") ? Use::kArrive
            : inst.has("sync") ? Use::kSync
            : inst.has("and")  ? Use::kReduceAnd
            : inst.has("or")   ? Use::kReduceOr
                               : Use::kReducePopc;
  if (!inst.has("sync") && !inst.has("arrive") && !inst.has("red")) return false;
  size_t next = 0;
  op.aux = static_cast<u32>(use);
  if (use == Use::kReducePopc) op.d = decoder.def(inst.args.at(next++));
  if (use == Use::kReduceAnd || use == Use::kReduceOr) op.d = decoder.pred_def(inst.args.at(next++));
  op.a = decoder.use(inst.args.at(next++), 4);
  size_t left = inst.args.size() - next - (use >= Use::kReduceAnd ? 1 : 0);
  if (left) {
    op.b = decoder.use(inst.args.at(next++), 4);
    op.aux2 = 1;
  }
  if (use >= Use::kReduceAnd) {
    op.c = decoder.pred(inst.args.at(next));
    op.negate_a = inst.args[next].negated;
  }
  op.fn = bar;
  return true;
}

}  // namespace sim
