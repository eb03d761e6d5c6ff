// PTX ISA 9.7.9: "mov", "cvta", "isspacep", "mapa", "getctarank", "createpolicy".
#include "alu.h"

namespace sim {

namespace {

template <class Store>
Step move(Warp& warp, const Op& op) {
  inherit(warp, op.d, warp.init[op.a]);
  store_lanes(warp, op.d, warp.reg<Store>(op.a));
  return Step::kNext;
}

Step move_pred(Warp& warp, const Op& op) {
  u32 known = warp.pred_init[op.a] | ~warp.exec;
  warp.set_pred(op.d, warp.preds[op.a]);
  warp.pred_init[op.d] &= known;
  return Step::kNext;
}

Step set_pred(Warp& warp, const Op& op) {
  warp.set_pred(op.d, op.imm ? kAllLanes : 0);
  return Step::kNext;
}

// {a, b} into one register, low half first; and back. aux: bits of an element.
Step pack(Warp& warp, const Op& op) {
  u64 result[kLanes] = {};
  u32 defined = kAllLanes, width = op.aux;
  for (size_t k = 0; k < op.list.size(); k++) {
    const u32* a = warp.reg<u32>(op.list[k]);
    u64 mask = (u64{1} << width) - 1;
    for (int i = 0; i < kLanes; i++) result[i] |= (a[i] & mask) << (k * width);
    defined &= warp.init[op.list[k]];
  }
  inherit(warp, op.d, defined);
  if (width * op.list.size() == 64) {
    store_lanes(warp, op.d, result);
  } else {
    u32 narrow[kLanes];
    for (int i = 0; i < kLanes; i++) narrow[i] = static_cast<u32>(result[i]);
    store_lanes(warp, op.d, narrow);
  }
  return Step::kNext;
}

Step unpack(Warp& warp, const Op& op) {
  u32 width = op.aux;
  bool wide = width * op.list.size() == 64;
  u32 defined = warp.init[op.a];
  u64 source[kLanes];
  for (int i = 0; i < kLanes; i++) source[i] = wide ? warp.reg<u64>(op.a)[i] : warp.reg<u32>(op.a)[i];
  for (size_t k = 0; k < op.list.size(); k++) {
    u32 part[kLanes];
    for (int i = 0; i < kLanes; i++) {
      part[i] = static_cast<u32>(source[i] >> (k * width) & ((u64{1} << width) - 1));
    }
    inherit(warp, op.list[k], defined);
    store_lanes(warp, op.list[k], part);
  }
  return Step::kNext;
}

// Clocks go forwards; nothing else is promised.
template <bool kWide>
Step clock(Warp& warp, const Op& op) {
  using Store = std::conditional_t<kWide, u64, u32>;
  Store result[kLanes];
  for (int i = 0; i < kLanes; i++) result[i] = static_cast<Store>(warp.world->steps + warp.steps + 1);
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

bool decode_mov(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& type = inst.type();
  const Arg &d = inst.args.at(0), &a = inst.args.at(1);
  if (type == "pred") {
    op.d = decoder.pred_def(d);
    op.imm = a.value;
    if (a.kind == ArgKind::kReg) op.a = decoder.pred(a);
    op.fn = a.kind == ArgKind::kReg ? move_pred : set_pred;
    return true;
  }
  int bytes = type.ends_with("64") ? 8 : 4;
  int bits = std::stoi(type.substr(type.find_first_of("123468")));
  if (a.kind == ArgKind::kVector || d.kind == ArgKind::kVector) {
    const Arg& parts = a.kind == ArgKind::kVector ? a : d;
    op.aux = static_cast<u32>(bits / static_cast<int>(parts.list.size()));
    if (op.aux > 32) return false;
    for (const Arg& part : parts.list) {
      op.list.push_back(&parts == &a ? decoder.use_f(part, 4) : decoder.def(part));
    }
    if (&parts == &a) {
      op.d = decoder.def(d);
    } else {
      op.a = decoder.use(a, bytes);
    }
    op.fn = &parts == &a ? pack : unpack;
    return true;
  }
  op.d = decoder.def(d);
  if (a.kind == ArgKind::kSpecial && (a.name == "%clock64" || a.name == "%globaltimer")) {
    op.fn = clock<true>;
    return true;
  }
  if (a.kind == ArgKind::kSpecial &&
      (a.name == "%clock" || a.name == "%clock_hi" || a.name == "%globaltimer_lo")) {
    op.fn = clock<false>;
    return true;
  }
  op.a = decoder.use_f(a, bytes);
  op.fn = bytes == 8 ? move<u64> : move<u32>;
  return true;
}

u64 shared_to_generic(u64 offset) { return kSharedWindow + static_cast<u32>(offset); }
u64 generic_to_shared(u64 address) { return static_cast<u32>(address - kSharedWindow); }
u64 local_to_generic(u64 offset) { return kLocalWindow + static_cast<u32>(offset); }
u64 generic_to_local(u64 address) { return static_cast<u32>(address - kLocalWindow); }
u64 same(u64 address) { return address; }

bool decode_cvta(const Inst& inst, Decoder& decoder, Op& op) {
  bool to = inst.has("to");
  if (!inst.has("u64")) return false;
  for (const std::string& part : inst.parts) {
    if (part.starts_with("shared")) {
      return to ? bind_map<u64, generic_to_shared, u64>(inst, decoder, op)
                : bind_map<u64, shared_to_generic, u64>(inst, decoder, op);
    }
    if (part == "local") {
      return to ? bind_map<u64, generic_to_local, u64>(inst, decoder, op)
                : bind_map<u64, local_to_generic, u64>(inst, decoder, op);
    }
  }
  return bind_map<u64, same, u64>(inst, decoder, op);
}

bool in_window(u64 address, u64 window) { return address >= window && address < window + kWindowBytes; }

Step isspacep(Warp& warp, const Op& op) {
  u32 lanes = 0;
  for (int i = 0; i < kLanes; i++) {
    u64 address = warp.reg<u64>(op.a)[i];
    bool shared = in_window(address, kSharedWindow), local = in_window(address, kLocalWindow);
    bool own = shared && ((address & 0xffffffff) < kCtaStride ||
                          ((address & 0xffffffff) / kCtaStride - 1) == warp.cta->rank);
    u64 start = reinterpret_cast<u64>(warp.world->params);
    bool param = address >= start && address < start + warp.world->param_storage.size();
    bool result = op.aux == 0   ? own
                  : op.aux == 1 ? shared
                  : op.aux == 2 ? local
                  : op.aux == 3 ? param
                  : op.aux == 4 ? !shared && !local && !param
                                : false;
    lanes |= static_cast<u32>(result) << i;
  }
  warp.set_pred(op.d, lanes);
  return Step::kNext;
}

// The shared-window address of the same place in another CTA of the cluster.
template <class Store, bool kGeneric>
Step mapa(Warp& warp, const Op& op) {
  Store result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    u32 rank = warp.reg<u32>(op.b)[i];
    if ((warp.exec >> i & 1) && rank >= warp.world->cluster_size) {
      fail("out-of-bounds",
           "mapa: CTA rank " + std::to_string(rank) + " of a cluster of " +
               std::to_string(warp.world->cluster_size),
           i);
    }
    u64 offset = static_cast<u32>(warp.reg<Store>(op.a)[i]) % kCtaStride;
    u64 address = offset + u64{rank + 1} * kCtaStride;
    result[i] = static_cast<Store>(kGeneric ? kSharedWindow + address : address);
  }
  inherit(warp, op.d, warp.init[op.a] & warp.init[op.b]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

template <bool kWide>
Step getctarank(Warp& warp, const Op& op) {
  u32 result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    u32 cta = static_cast<u32>(kWide ? warp.reg<u64>(op.a)[i] : warp.reg<u32>(op.a)[i]) / kCtaStride;
    result[i] = cta ? cta - 1 : warp.cta->rank;
  }
  inherit(warp, op.d, warp.init[op.a]);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

Step zero64(Warp& warp, const Op& op) {
  u64 result[kLanes] = {};
  warp.defined(op.d);
  store_lanes(warp, op.d, result);
  return Step::kNext;
}

}  // namespace

bool decode_move(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "mov") return decode_mov(inst, decoder, op);
  if (name == "cvta") return decode_cvta(inst, decoder, op);
  if (name == "isspacep") {
    op.d = decoder.pred_def(inst.args.at(0));
    op.a = decoder.use(inst.args.at(1), 8);
    const std::string& space = inst.parts.at(1);
    op.aux = space == "shared" || space == "shared::cta" ? 0
             : space == "shared::cluster"                ? 1
             : space == "local"                          ? 2
             : space.starts_with("param")                ? 3
             : space == "global"                         ? 4
                                                         : 5;
    op.fn = isspacep;
    return true;
  }
  if (name == "mapa") {
    bool wide = inst.type() == "u64";
    op.d = decoder.def(inst.args.at(0));
    op.a = decoder.use(inst.args.at(1), wide ? 8 : 4);
    op.b = decoder.use(inst.args.at(2), 4);
    bool generic = !inst.has("shared::cluster");
    op.fn = !wide ? mapa<u32, false> : generic ? mapa<u64, true> : mapa<u64, false>;
    return true;
  }
  if (name == "getctarank") {
    op.d = decoder.def(inst.args.at(0));
    bool wide = inst.type() == "u64";
    op.a = decoder.use(inst.args.at(1), wide ? 8 : 4);
    op.fn = wide ? getctarank<true> : getctarank<false>;
    return true;
  }
  if (name == "createpolicy") {
    op.d = decoder.def(inst.args.at(0));
    op.fn = zero64;
    return true;
  }
  return false;
}

}  // namespace sim
