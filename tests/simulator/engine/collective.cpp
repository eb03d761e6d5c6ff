// PTX ISA 9.7.9.6 "shfl.sync", 9.7.13 "vote.sync", "match.sync", "activemask", "redux.sync", "elect.sync",
// "bar.warp.sync".
#include <algorithm>
#include <cmath>

#include "alu.h"

namespace sim {

namespace {

// The member mask of a warp-wide instruction; false if some members are not here yet.
bool members(Warp& warp, const Op& op, u32& mask) {
  mask = warp.uniform(op.f, "member mask");
  if (warp.exec & ~mask) {
    fail("barrier", "member mask " + hex(mask) + " leaves out the executing lane",
         first_lane(warp.exec & ~mask));
  }
  return converged(warp, mask);
}

enum class Shuffle : u32 { kUp, kDown, kButterfly, kIndex };

// aux: mode; e: the predicate "in range".
Step shuffle(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  u32 result[kLanes] = {}, valid = 0, defined = 0;
  const u32* a = warp.reg<u32>(op.a);
  for (u32 lane = 0; lane < kLanes; lane++) {
    if (!(warp.exec >> lane & 1)) continue;
    u32 b = warp.value32(op.b, static_cast<int>(lane)) & 31, c = warp.value32(op.c, static_cast<int>(lane));
    i32 clamp = c & 31, segment = c >> 8 & 31, at = static_cast<i32>(lane), from = 0;
    i32 top = (at & segment) | (clamp & ~segment), bottom = at & segment;
    bool inside = false;
    switch (static_cast<Shuffle>(op.aux)) {
      case Shuffle::kUp:
        from = at - static_cast<i32>(b), inside = from >= top;
        break;
      case Shuffle::kDown:
        from = at + static_cast<i32>(b), inside = from <= top;
        break;
      case Shuffle::kButterfly:
        from = at ^ static_cast<i32>(b), inside = from <= top;
        break;
      case Shuffle::kIndex:
        from = bottom | (static_cast<i32>(b) & ~segment), inside = from <= top;
        break;
    }
    if (!inside) from = at;
    if (!(warp.exec >> from & 1)) {
      fail("uninitialised", "shfl.sync reads lane " + std::to_string(from) + ", which does not take part",
           static_cast<int>(lane));
    }
    result[lane] = a[from];
    valid |= static_cast<u32>(inside) << lane;
    defined |= (warp.init[op.a] >> from & 1) << lane;
  }
  inherit(warp, op.d, defined);
  store_lanes(warp, op.d, result);
  warp.set_pred(op.e, valid);
  return Step::kNext;
}

enum class Vote : u32 { kAll, kAny, kUniform, kBallot };

Step vote(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  u32 unknown = warp.exec & ~warp.pred_init[op.a];
  if (unknown) fail("uninitialised", "predicate was never written", first_lane(unknown));
  u32 lanes = (op.negate_a ? ~warp.preds[op.a] : warp.preds[op.a]) & warp.exec;
  bool all = lanes == warp.exec, any = lanes != 0;
  switch (static_cast<Vote>(op.aux)) {
    case Vote::kAll:
      warp.set_pred(op.d, all ? kAllLanes : 0);
      break;
    case Vote::kAny:
      warp.set_pred(op.d, any ? kAllLanes : 0);
      break;
    case Vote::kUniform:
      warp.set_pred(op.d, all || !any ? kAllLanes : 0);
      break;
    case Vote::kBallot: {
      u32 result[kLanes];
      std::fill(result, result + kLanes, lanes);
      warp.defined(op.d);
      store_lanes(warp, op.d, result);
    }
  }
  return Step::kNext;
}

template <class Store>
Step match(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  const Store* a = warp.reg<Store>(op.a);
  u32 result[kLanes] = {};
  bool all = true;
  for (int i = 0; i < kLanes; i++) {
    for (int k = 0; k < kLanes; k++) {
      if ((warp.exec >> i & 1) && (warp.exec >> k & 1)) {
        result[i] |= static_cast<u32>(a[i] == a[k]) << k;
        all &= a[i] == a[k];
      }
    }
  }
  if (op.aux) {
    std::fill(result, result + kLanes, all ? warp.exec : 0);
    warp.set_pred(op.e, all ? kAllLanes : 0);
  }
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

Step active(Warp& warp, const Op& op) {
  u32 result[kLanes];
  std::fill(result, result + kLanes, warp.exec);
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

u32 reduce(const std::string& name, bool is_signed, u32 a, u32 b) {
  if (name == "add") return a + b;
  if (name == "and") return a & b;
  if (name == "or") return a | b;
  if (name == "xor") return a ^ b;
  bool less = is_signed ? static_cast<i32>(a) < static_cast<i32>(b) : a < b;
  return less == (name == "min") ? a : b;
}

Step redux(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  const Inst& inst = warp.world->program.entry->insts[warp.pc];
  const std::string& kind = inst.parts[2];
  u32 total = 0, defined = kAllLanes;
  bool first = true;
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    u32 value = warp.reg<u32>(op.a)[first_lane(lanes)];
    total = first ? value : reduce(kind, inst.type() == "s32", total, value);
    first = false;
  }
  if (warp.exec & ~warp.init[op.a]) defined = 0;
  u32 result[kLanes];
  std::fill(result, result + kLanes, total);
  inherit(warp, op.d, defined);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

// The same leader every time for the same mask; which lane it is, PTX does not say.
Step elect(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  u32 leader = warp.world->elect_choice;
  if (!(warp.exec >> leader & 1)) leader = static_cast<u32>(first_lane(warp.exec));
  u32 result[kLanes];
  std::fill(result, result + kLanes, leader);
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  warp.set_pred(op.e, 1u << leader);
  return Step::kNext;
}

Step sync_warp(Warp& warp, const Op& op) {
  u32 mask;
  if (!members(warp, op, mask)) return Step::kBlock;
  if ((warp.alive & ~warp.exec) == 0) warp.sync_lanes();
  return Step::kNext;
}

}  // namespace

bool decode_warp(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  const std::vector<Arg>& args = inst.args;
  if (name == "activemask") {
    op.d = decoder.def(args.at(0));
    op.fn = active;
    return true;
  }
  if (name == "bar" && inst.text == "bar.warp.sync") {
    op.f = decoder.use(args.at(0), 4);
    op.fn = sync_warp;
    return true;
  }
  if (!inst.has("sync")) return false;
  if (name == "elect") {
    op.d = decoder.def(args.at(0));
    op.e = decoder.pred_def(args.at(1));
    op.f = decoder.use(args.at(2), 4);
    op.fn = elect;
    return true;
  }
  if (name == "shfl") {
    bool two = args.size() == 6;
    op.d = decoder.def(args.at(0));
    op.e = two ? decoder.pred_def(args[1]) : decoder.sink_pred();
    op.a = decoder.use(args.at(1 + two), 4);
    op.b = decoder.use(args.at(2 + two), 4);
    op.c = decoder.use(args.at(3 + two), 4);
    op.f = decoder.use(args.at(4 + two), 4);
    op.aux = static_cast<u32>(inst.has("up")     ? Shuffle::kUp
                              : inst.has("down") ? Shuffle::kDown
                              : inst.has("bfly") ? Shuffle::kButterfly
                                                 : Shuffle::kIndex);
    op.fn = shuffle;
    return true;
  }
  if (name == "vote") {
    bool ballot = inst.has("ballot");
    op.d = ballot ? decoder.def(args.at(0)) : decoder.pred_def(args.at(0));
    if (args.at(1).kind == ArgKind::kReg) {
      op.a = decoder.pred(args[1]);
      op.negate_a = args[1].negated;
    } else {
      return false;
    }
    op.f = decoder.use(args.at(2), 4);
    op.aux = static_cast<u32>(ballot            ? Vote::kBallot
                              : inst.has("all") ? Vote::kAll
                              : inst.has("any") ? Vote::kAny
                                                : Vote::kUniform);
    op.fn = vote;
    return true;
  }
  if (name == "match") {
    bool all = inst.has("all"), two = args.size() == 4;
    bool wide = inst.type() == "b64";
    op.d = decoder.def(args.at(0));
    op.e = two ? decoder.pred_def(args[1]) : decoder.sink_pred();
    op.a = decoder.use(args.at(1 + two), wide ? 8 : 4);
    op.f = decoder.use(args.at(2 + two), 4);
    op.aux = all;
    op.fn = wide ? match<u64> : match<u32>;
    return true;
  }
  if (name == "redux" && inst.type() != "f32") {
    op.d = decoder.def(args.at(0));
    op.a = decoder.use(args.at(1), 4);
    op.f = decoder.use(args.at(2), 4);
    op.fn = redux;
    return true;
  }
  return false;
}

}  // namespace sim
