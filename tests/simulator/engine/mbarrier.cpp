// PTX ISA 9.7.13.15 "mbarrier": phases, arrivals, transaction counts, and what waiting for a phase teaches.
#include "alu.h"

namespace sim {

namespace {

constexpr u32 kMaxCount = (1u << 20) - 1;
constexpr i64 kMaxTx = (1 << 20) - 1;

std::string at(u32 offset) { return "mbarrier at shared memory " + hex(offset); }

// aux bits of an instruction on mbarriers
enum : u32 {
  kGeneric = 1,
  kCount = 2,
  kRelaxed = 4,
  kParity = 8,
  kTry = 16,
  kDrop = 32,
  kExpect = 64,
  kNoComplete = 128,
  kWide = 256,
  kNoInc = 512
};

struct Place {
  Cta* cta;
  u32 offset;
};

Place place_of(Warp& warp, const Op& op, int lane) {
  u64 address = warp.value(op.a, lane, op.aux2) + op.imm;
  if (op.aux & kGeneric) {
    if (address < kSharedWindow || address >= kSharedWindow + kWindowBytes) {
      fail("out-of-bounds", "generic address " + hex(address) + " of an mbarrier is not in shared memory",
           lane);
    }
    address -= kSharedWindow;
  }
  u32 offset;
  Cta& cta = warp.world->owner(warp, address, 8, offset, lane);
  if (offset % 8) fail("misaligned", at(offset) + ": expected a multiple of 8", lane);
  if (&cta != warp.cta) warp.world->touch_remote(warp, cta);
  return {&cta, offset};
}

Mbarrier& used(Warp& warp, const Place& place, int lane) {
  Mbarrier& barrier = find_mbarrier(*place.cta, place.offset, lane);
  if (warp.clock.known(barrier.init_agent) < barrier.init_step) {
    fail("race",
         at(place.offset) + ": its initialisation at " + warp.world->place(barrier.init_pc) +
             " is not ordered before this",
         lane);
  }
  if (place.cta != warp.cta &&
      (!barrier.fence_step || warp.clock.known(barrier.init_agent) < barrier.fence_step)) {
    fail("missing-fence",
         at(place.offset) + " is used by another CTA: no fence.mbarrier_init after its initialisation", lane);
  }
  return barrier;
}

Step init(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    u32 count = warp.value32(op.b, lane);
    if (count == 0 || count > kMaxCount) {
      fail("barrier", at(place.offset) + ": count " + std::to_string(count), lane);
    }
    Cta& cta = *place.cta;
    auto near = cta.mbarriers.lower_bound(place.offset > 7 ? place.offset - 7 : 0);
    if (near != cta.mbarriers.end() && near->first < place.offset + 8) {
      fail("barrier", at(place.offset) + " is initialised again without mbarrier.inval", lane);
    }
    warp.world->touch_shared(warp, place.offset, 8, warp.access(true), lane);
    Mbarrier& barrier = cta.mbarriers[place.offset];
    barrier.expected = count;
    barrier.pending = count;
    barrier.agent = cta.cluster->add_agent(AgentKind::kLoad, cta.rank << 24 | place.offset);
    barrier.init_warp = &warp;
    barrier.init_agent = warp.acting_agent();
    barrier.init_step = warp.step;
    barrier.init_pc = warp.pc;
    cta.mbarriers_from = std::min(cta.mbarriers_from, place.offset);
    cta.mbarriers_to = std::max(cta.mbarriers_to, place.offset + 8);
  }
  return Step::kNext;
}

Step invalidate(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    Mbarrier& barrier = used(warp, place, lane);
    if (barrier.copies) {
      fail("barrier", at(place.offset) + " is invalidated while copies towards it are under way", lane);
    }
    if (barrier.last_copy && warp.clock.known(barrier.agent) < barrier.last_copy) {
      fail("race", at(place.offset) + " is invalidated before its copies were waited for", lane);
    }
    place.cta->mbarriers.erase(place.offset);
    warp.world->touch_shared(warp, place.offset, 8, warp.access(true), lane);
  }
  return Step::kNext;
}

void expect(Mbarrier& barrier, u32 offset, i64 bytes, int lane) {
  barrier.tx += bytes;
  if (barrier.tx > kMaxTx || barrier.tx < -kMaxTx) {
    fail("barrier",
         at(offset) + ": pending bytes " + std::to_string(barrier.tx) + " overflow the transaction count",
         lane);
  }
}

// The opaque state of a phase: its number; test_wait takes it back.
u64 state_of(const Mbarrier& barrier) { return u64{barrier.phase} << 32 | static_cast<u32>(barrier.pending); }

// Phases that the warp knows to be over: a wait for the last one happened before, or all of its arrivals did.
i64 phases_known(Warp& warp, const Mbarrier& barrier, int lane) {
  i64 known = warp.clock.known(barrier.agent);
  auto waited = barrier.waited.find(warp.agent * 32u + static_cast<u32>(lane));
  if (waited != barrier.waited.end()) known = std::max(known, waited->second + 1);
  if (known < barrier.phase && barrier.last_copy < barrier.phase && warp.clock.covers(barrier.completed)) {
    known = barrier.phase;
  }
  return known;
}

void require_phase_known(Warp& warp, const Mbarrier& barrier, u32 offset, int lane) {
  if (phases_known(warp, barrier, lane) >= barrier.phase) return;
  fail("barrier",
       at(offset) + ": an arrival in phase " + std::to_string(barrier.phase) +
           " that is not ordered after the end of phase " + std::to_string(barrier.phase - 1) +
           ": it may count in that one (an arrival too many, or the phase bit aliases)",
       lane);
}

Step arrive_on(Warp& warp, const Op& op) {
  u64 states[kLanes] = {};
  const Clock& known = warp.view();
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    Mbarrier& barrier = used(warp, place, lane);
    states[lane] = state_of(barrier);
    u32 count = op.aux & kCount ? warp.value32(op.b, lane) : 1;
    require_phase_known(warp, barrier, place.offset, lane);
    if (op.aux & kExpect) {
      expect(barrier, place.offset, warp.value32(op.c, lane), lane);
    }
    if (!(op.aux & kRelaxed)) barrier.arrived.join(known);
    if (op.aux & kDrop) {
      if (barrier.expected < count) fail("barrier", at(place.offset) + ": arrive_drop below zero", lane);
      barrier.expected -= count;
    }
    if (barrier.pending < count) {
      fail("barrier",
           at(place.offset) + ": arrival of " + std::to_string(count) + " in a phase that misses " +
               std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected),
           lane);
    }
    if ((op.aux & kNoComplete) && barrier.pending == count) {
      fail("barrier", at(place.offset) + ": arrive.noComplete would complete the phase", lane);
    }
    arrive(*warp.world, barrier, count, lane);
  }
  warp.advance_clock();
  if (op.d != kNone) {
    warp.defined(op.d);
    store_lanes(warp, op.d, states);
  }
  return Step::kYield;
}

Step expect_tx(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    Mbarrier& barrier = used(warp, place, lane);
    i64 bytes = warp.value32(op.b, lane);
    expect(barrier, place.offset, op.aux & kDrop ? -bytes : bytes, lane);
    if (op.aux & kDrop) complete_phase_if_done(*warp.world, barrier);
  }
  return Step::kYield;
}

// The phase that a wait asks for, and whether it is over. A parity names the current phase or the one before.
bool phase_over(Warp& warp, const Op& op, Mbarrier& barrier, u32 offset, int lane) {
  i64 current = barrier.phase, wanted;
  if (op.aux & kParity) {
    u32 parity = warp.value32(op.b, lane);
    if (parity > 1) {
      fail("barrier", at(offset) + ": parity " + std::to_string(parity) + ", expected 0 or 1", lane);
    }
    // The bit means the first phase of its parity that the warp does not know to be over, or the last one
    // that it does.
    i64 over = phases_known(warp, barrier, lane);
    wanted = ((over - 1) & 1) == static_cast<i64>(parity) ? over - 1 : over;
    if (current >= wanted + 2) {
      fail("barrier",
           at(offset) + ": the phase bit aliases: waiting for phase " + std::to_string(wanted) +
               ", but phase " + std::to_string(current - 1) + " is already over",
           lane);
    }
    return (current & 1) != static_cast<i64>(parity);
  }
  wanted = static_cast<i64>(warp.value(op.b, lane, true) >> 32);
  if (current > wanted + 1) fail("barrier", at(offset) + ": the state is older than the last phase", lane);
  return current > wanted;
}

Step wait(Warp& warp, const Op& op) {
  Group& group = *warp.group;
  u32 over = 0;
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    Mbarrier& barrier = used(warp, place, lane);
    if (phase_over(warp, op, barrier, place.offset, lane)) over |= 1u << lane;
  }
  bool whole = over == warp.exec;
  if (!whole && (op.aux & kTry) && !group.timed_out) {
    int lane = first_lane(warp.exec & ~over);
    Place place = place_of(warp, op, lane);
    group.waits_on = &find_mbarrier(*place.cta, place.offset, lane);
    return Step::kBlock;
  }
  // Now and then a try_wait gives up just before it would succeed.
  if (whole && (op.aux & kTry) && !group.timed_out && warp.world->random.chance(1, 32)) over = 0;
  group.timed_out = false;
  group.waits_on = nullptr;
  for (u32 lanes = over; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Place place = place_of(warp, op, lane);
    Mbarrier& barrier = find_mbarrier(*place.cta, place.offset, lane);
    barrier.waited[warp.agent * 32u + static_cast<u32>(lane)] = static_cast<i64>(barrier.phase) - 1;
    if (!(op.aux & kRelaxed)) {
      warp.clock.join(barrier.completed);
      warp.clock.learn(barrier.agent, barrier.phase);
    }
  }
  warp.set_pred(op.d, over);
  return Step::kYield;
}

Step pending_count(Warp& warp, const Op& op) {
  u32 result[kLanes];
  for (int i = 0; i < kLanes; i++) result[i] = static_cast<u32>(warp.reg<u64>(op.b)[i]);
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

}  // namespace

Mbarrier& find_mbarrier(Cta& cta, u32 offset, int lane) {
  auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end()) {
    fail("barrier", "no mbarrier was initialised at shared memory " + hex(offset), lane);
  }
  return found->second;
}

void complete_phase_if_done(World& world, Mbarrier& barrier) {
  if (barrier.pending == 0 && barrier.tx < 0) {
    fail("barrier", "all arrivals of an mbarrier's phase came, and " + std::to_string(-barrier.tx) +
                        " bytes more than expected: wrong transaction count");
  }
  if (barrier.pending != 0 || barrier.tx != 0) return;
  barrier.phase++;
  barrier.pending = barrier.expected;
  barrier.completed.join(barrier.arrived);
  world.event();
}

void arrive(World& world, Mbarrier& barrier, u32 count, int lane) {
  (void)lane;
  barrier.pending -= count;
  world.progress++;
  complete_phase_if_done(world, barrier);
}

u64 begin_copy(Warp& warp, Cta& cta, u32 offset, int lane) {
  Mbarrier& barrier = used(warp, {&cta, offset}, lane);
  if (!barrier.fence_step || warp.clock.known(barrier.init_agent) < barrier.fence_step) {
    fail("missing-fence",
         at(offset) +
             ": an asynchronous copy signals it, but no fence.mbarrier_init followed its initialisation",
         lane);
  }
  barrier.copies++;
  barrier.last_copy = barrier.phase + 1;
  barrier.copy_pc = warp.pc;
  return Epoch::make(cta.cluster->id, barrier.agent, barrier.phase + 1);
}

void end_copy(World& world, Cta& cta, u32 offset, u32 phase, u64 bytes) {
  auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end()) fail("barrier", at(offset) + " was invalidated before a copy completed");
  Mbarrier& barrier = found->second;
  barrier.copies--;
  if (barrier.phase != phase) {
    fail("barrier", at(offset) + ": " + std::to_string(bytes) + " bytes arrive in phase " +
                        std::to_string(barrier.phase) + ", their copy was issued in phase " +
                        std::to_string(phase) + ": wrong transaction count");
  }
  barrier.tx -= static_cast<i64>(bytes);
  if (barrier.tx < -kMaxTx) fail("barrier", at(offset) + ": transaction count underflow");
  complete_phase_if_done(world, barrier);
}

bool decode_mbarrier(const Inst& inst, Decoder& decoder, Op& op) {
  if (inst.parts[0] != "mbarrier") return false;
  const std::string& kind = inst.parts.at(1);
  const std::vector<Arg>& args = inst.args;
  if (kind == "pending_count") {
    op.d = decoder.def(args.at(0));
    op.b = decoder.use(args.at(1), 8);
    op.fn = pending_count;
    return true;
  }
  bool space = false;
  for (const std::string& part : inst.parts) space |= part.starts_with("shared");
  op.aux = space ? 0 : kGeneric;
  if (inst.has("relaxed")) op.aux |= kRelaxed;
  if (kind == "init" || kind == "inval") {
    decoder.address(args.at(0), op);
    if (kind == "init") op.b = decoder.use(args.at(1), 4);
    op.fn = kind == "init" ? init : invalidate;
  } else if (kind == "arrive" || kind == "arrive_drop") {
    bool result = args.at(0).kind != ArgKind::kMem;
    size_t next = result ? 1 : 0;
    op.d = result && args[0].kind == ArgKind::kReg ? decoder.def(args[0]) : kNone;
    decoder.address(args.at(next), op);
    if (kind == "arrive_drop") op.aux |= kDrop;
    if (inst.has("noComplete")) op.aux |= kNoComplete;
    if (inst.has("expect_tx")) {
      op.aux |= kExpect;
      op.c = decoder.use(args.at(next + 1), 4);
    } else if (args.size() > next + 1) {
      op.aux |= kCount;
      op.b = decoder.use(args[next + 1], 4);
    }
    op.fn = arrive_on;
  } else if (kind == "expect_tx" || kind == "complete_tx") {
    decoder.address(args.at(0), op);
    op.b = decoder.use(args.at(1), 4);
    if (kind == "complete_tx") op.aux |= kDrop;
    op.fn = expect_tx;
  } else if (kind == "test_wait" || kind == "try_wait") {
    op.d = decoder.pred_def(args.at(0));
    decoder.address(args.at(1), op);
    if (inst.has("parity")) op.aux |= kParity;
    if (kind == "try_wait") op.aux |= kTry;
    op.b = decoder.use(args.at(2), inst.has("parity") ? 4 : 8);
    op.fn = wait;
  } else {
    return false;
  }
  return true;
}

}  // namespace sim
