// PTX ISA 9.7.12 "Control Flow Instructions", 9.7.14 "griddepcontrol", 9.7.19 "Miscellaneous Instructions".
#include <algorithm>

#include "world.h"

namespace sim {

namespace {

Step jump_to(Warp& warp, u32 target) {
  warp.group->pc = target;
  warp.world->reach_join(warp);
  return Step::kJump;
}

// Sends `lanes` of the running group to `target` as a group of their own, that meets the rest at `join`.
void split(Warp& warp, u32 lanes, u32 target, const std::shared_ptr<Join>& join) {
  Group* rest = warp.group;
  warp.groups.push_back(Group{});
  Group& group = warp.groups.back();
  group.pc = target;
  group.mask = lanes;
  group.join = join;
  rest->mask &= ~lanes;
  warp.group = &group;
  warp.world->reach_join(warp);
  warp.group = rest;
}

std::shared_ptr<Join> join_of(Warp& warp) {
  Group& group = *warp.group;
  u32 meet = warp.world->program.join[warp.pc];
  if (meet == kNone || (group.join && group.join->pc == meet)) return group.join;
  return std::make_shared<Join>(Join{meet, group.mask, 0, group.join});
}

Step branch(Warp& warp, const Op& op) {
  Group& group = *warp.group;
  if (warp.exec == 0) return Step::kNext;
  if (warp.exec == group.mask) return jump_to(warp, op.d);
  u32 taken = warp.exec, here = warp.pc;
  std::shared_ptr<Join> join = join_of(warp);
  group.join = join;
  split(warp, taken, op.d, join);
  return jump_to(warp, here + 1);
}

Step branch_table(Warp& warp, const Op& op) {
  Group& group = *warp.group;
  if (warp.exec == 0) return Step::kNext;
  u32 left = warp.exec, here = warp.pc;
  bool whole = left == group.mask;
  std::shared_ptr<Join> join = join_of(warp);
  bool first = true;
  while (left) {
    u32 index = warp.value32(op.a, first_lane(left)), lanes = 0;
    for (int i = 0; i < kLanes; i++) {
      if ((left >> i & 1) && warp.value32(op.a, i) == index) lanes |= 1u << i;
    }
    if (index >= op.list.size()) {
      fail("out-of-bounds", "brx.idx: index " + std::to_string(index), first_lane(lanes));
    }
    if (first && whole && lanes == group.mask) return jump_to(warp, op.list[index]);
    first = false;
    left &= ~lanes;
    group.join = join;
    if (!left && whole) return jump_to(warp, op.list[index]);
    split(warp, lanes, op.list[index], join);
  }
  return jump_to(warp, here + 1);
}

Step leave(Warp& warp, const Op&) {
  if (warp.exec == 0) return Step::kNext;
  bool all = warp.exec == warp.group->mask;
  u32 next = warp.pc + 1;
  if (!all) warp.group->pc = next;
  warp.world->exit_lanes(warp, warp.exec);
  if (!all && warp.group) warp.world->reach_join(warp);
  return Step::kJump;
}

Step trap(Warp& warp, const Op&) {
  fail("unsupported", "trap: the program stopped itself", first_lane(warp.exec));
}

Step call(Warp& warp, const Op&) {
  fail("unsupported", "call: only inlined code is simulated (printf or assert?)", first_lane(warp.exec));
}

Step nothing(Warp&, const Op&) { return Step::kNext; }
Step yield(Warp&, const Op&) { return Step::kYield; }

// PTX ISA 9.7.19.5: legal counts, the whole warpgroup, and the CTA's register pool.
Step setmaxnreg(Warp& warp, const Op& op) {
  if (warp.exec != warp.alive) fail("barrier", "setmaxnreg in divergent code", first_lane(warp.exec));
  u32 count = static_cast<u32>(op.imm);
  if (count < 24 || count > 256 || count % 8) {
    fail("limit", "setmaxnreg " + std::to_string(count) + ": expected a multiple of 8 from 24 to 256");
  }
  bool increase = op.aux;
  // ptxas picks the count at launch, of which PTX shows the upper limit only: an increase below it is no
  // fault.
  if (!increase && count > warp.registers) {
    fail("limit", "setmaxnreg.dec from " + std::to_string(warp.registers) + " to " + std::to_string(count) +
                      " registers");
  }
  Cta& cta = *warp.cta;
  if (increase && count > warp.registers) {
    u32 need = (count - warp.registers) * kLanes;
    if (cta.register_pool < need) return Step::kBlock;
    cta.register_pool -= need;
  } else {
    cta.register_pool += (warp.registers - count) * kLanes;
  }
  warp.registers = count;
  warp.world->event();
  return Step::kYield;
}

}  // namespace

bool decode_control(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "bra") {
    op.d = decoder.label(inst.args.at(0), inst);
    op.always = true;
    op.fn = branch;
  } else if (name == "brx") {
    op.a = decoder.use(inst.args.at(0), 4);
    for (const std::string& target : decoder.program.entry->targets.at(inst.args.at(1).name)) {
      op.list.push_back(decoder.program.entry->find_label(target, inst.scope));
    }
    op.always = true;
    op.fn = branch_table;
  } else if (name == "ret" || name == "exit") {
    op.always = true;
    op.fn = leave;
  } else if (name == "trap" || name == "brkpt") {
    op.fn = trap;
  } else if (name == "call") {
    op.fn = call;
  } else if (name == "griddepcontrol" || name == "nanosleep") {
    op.fn = yield;
  } else if (name == "pmevent" || (name == "prefetch" && !inst.has("tensormap")) || name == "prefetchu" ||
             name == "applypriority" || name == "discard") {
    op.fn = nothing;
  } else if (name == "setmaxnreg") {
    op.imm = inst.args.at(0).value;
    op.aux = inst.has("inc");
    op.fn = setmaxnreg;
  } else {
    return false;
  }
  return true;
}

}  // namespace sim
