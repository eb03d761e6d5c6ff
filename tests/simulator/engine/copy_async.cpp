// PTX ISA 9.7.9.25.3 "Non-bulk copy": cp.async and its groups, kept per warp (its lanes go in step).
#include "world.h"

namespace sim {

namespace {

CopyQueue& queue_of(Warp& warp) {
  CopyQueue& queue = warp.copies;
  if (queue.agent == kNone) {
    queue.agent = warp.cta->cluster->add_agent(AgentKind::kCopyAsync,
                                               warp.cta->rank << 8 | static_cast<u32>(warp.index));
  }
  return queue;
}

// imm: bytes; b: source size or none; f: "ignore source" predicate or none.
Step copy(Warp& warp, const Op& op) {
  World& world = *warp.world;
  CopyQueue& queue = queue_of(warp);
  u32 group = queue.committed + 1, bytes = op.size;
  u64 epoch = Epoch::make(warp.cta->cluster->id, queue.agent, group);
  queue.unfinished[group]++;
  queue.issued_open++;
  auto moves = std::make_shared<std::vector<std::tuple<u8*, const u8*, u32>>>();
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    u64 to = warp.value(op.a, lane, op.aux2 & 1) + static_cast<i64>(static_cast<i32>(op.c));
    u64 from = warp.value(op.d, lane, true) + static_cast<i64>(static_cast<i32>(op.e));
    u32 take = op.b == kNone ? bytes : warp.value32(op.b, lane);
    if (op.f != kNone && (warp.preds[op.f] >> lane & 1)) take = 0;
    if (take > bytes) {
      fail("out-of-bounds", "cp.async: source size " + std::to_string(take) + " of " + std::to_string(bytes),
           lane);
    }
    if (from % bytes || to % bytes) {
      fail("misaligned",
           "cp.async of " + std::to_string(bytes) + " bytes from " + hex(from) + " to " + hex(to), lane);
    }
    const u8* source = nullptr;
    if (take) {
      source = world.touch_global(from, take, {&warp.clock, epoch, warp.pc, false, false, false}, lane);
    }
    u8* target = world.touch_shared(warp, to, bytes, {&warp.clock, epoch, warp.pc, true, false, false}, lane);
    moves->emplace_back(target, source, take);
  }
  CopyQueue* q = &queue;
  world.later(*warp.cta->cluster, [moves, bytes, q, group] {
    for (auto [target, source, take] : *moves) {
      std::memset(target, 0, bytes);
      if (take) std::memcpy(target, source, take);
    }
    if (--q->unfinished[group] == 0) q->unfinished.erase(group);
  });
  return Step::kNext;
}

Step commit(Warp& warp, const Op&) {
  CopyQueue& queue = queue_of(warp);
  queue.committed++;
  queue.issued_open = 0;
  return Step::kYield;
}

// imm: groups that may stay; aux: wait_all, with the copies of the open group.
Step wait(Warp& warp, const Op& op) {
  CopyQueue& queue = queue_of(warp);
  u32 last = queue.committed + (op.aux ? 1 : 0);
  if (last < op.imm) return Step::kNext;
  u32 done = last - static_cast<u32>(op.imm);
  if (!queue.unfinished.empty() && queue.unfinished.begin()->first <= done) return Step::kBlock;
  if (op.aux && queue.issued_open) {
    queue.committed++;
    queue.issued_open = 0;
  }
  queue.waited = std::max(queue.waited, done);
  warp.clock.learn(queue.agent, done);
  return Step::kYield;
}

// cp.async.mbarrier.arrive: an arrival on behalf of each lane once its earlier copies are done.
Step arrive_later(Warp& warp, const Op& op) {
  World& world = *warp.world;
  CopyQueue& queue = queue_of(warp);
  u32 group = queue.committed + (queue.issued_open ? 1 : 0);
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Cta* cta;
    u64 address = warp.value(op.a, lane, op.aux2) + op.imm;
    if (address >= kSharedWindow && address < kSharedWindow + kWindowBytes) address -= kSharedWindow;
    u32 offset = shared_offset(warp, address, 8, 8, &cta, lane);
    Mbarrier& barrier = find_mbarrier(*cta, offset, lane);
    if (!op.aux) barrier.pending++;
    CopyQueue* q = &queue;
    World* w = &world;
    auto ready = [q, group] { return q->unfinished.empty() || q->unfinished.begin()->first > group; };
    world.later(
        *warp.cta->cluster,
        [w, q, cta, offset, group] {
          Mbarrier& reached = find_mbarrier(*cta, offset, -1);
          reached.arrived.learn(q->agent, group);
          if (reached.pending < 1) {
            fail("barrier", "cp.async.mbarrier.arrive: more arrivals than the phase takes");
          }
          arrive(*w, reached, 1, -1);
        },
        ready);
  }
  // The copies that the arrivals cover close a group of their own.
  if (queue.issued_open) {
    queue.committed++;
    queue.issued_open = 0;
  }
  return Step::kYield;
}

}  // namespace

bool decode_copy_async(const Inst& inst, Decoder& decoder, Op& op) {
  if (!inst.text.starts_with("cp.async.") || inst.has("bulk")) return false;
  const std::vector<Arg>& args = inst.args;
  if (inst.has("commit_group")) {
    op.fn = commit;
  } else if (inst.has("wait_all")) {
    op.aux = 1;
    op.fn = wait;
  } else if (inst.has("wait_group")) {
    op.imm = args.at(0).value;
    op.fn = wait;
  } else if (inst.has("mbarrier")) {
    op.aux = inst.has("noinc");
    decoder.address(args.at(0), op);
    op.fn = arrive_later;
  } else {
    Op part;
    decoder.address(args.at(1), part);
    if (!part.aux2) return false;
    op.d = part.a;
    op.e = static_cast<u32>(part.imm);
    decoder.address(args.at(0), op);
    op.c = static_cast<u32>(op.imm);
    op.imm = 0;
    op.size = static_cast<u8>(args.at(2).value);
    op.b = op.f = kNone;
    if (args.size() > 3 && !inst.has("L2::cache_hint")) {
      if (decoder.is_pred(args[3])) {
        op.f = decoder.pred(args[3]);
      } else {
        op.b = decoder.use(args[3], 4);
      }
    }
    op.fn = copy;
  }
  return true;
}

}  // namespace sim
