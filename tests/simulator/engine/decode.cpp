// Binds instructions to implementations and operands to places; finds where divergent lanes meet again.
#include <algorithm>
#include <set>

#include "program.h"

namespace sim {

namespace {

struct SpecialName {
  const char* name;
  Special special;
};

constexpr SpecialName kSpecialNames[] = {
    {"%tid.x", Special::kTidX},
    {"%tid.y", Special::kTidY},
    {"%tid.z", Special::kTidZ},
    {"%ntid.x", Special::kNtidX},
    {"%ntid.y", Special::kNtidY},
    {"%ntid.z", Special::kNtidZ},
    {"%ctaid.x", Special::kCtaidX},
    {"%ctaid.y", Special::kCtaidY},
    {"%ctaid.z", Special::kCtaidZ},
    {"%nctaid.x", Special::kNctaidX},
    {"%nctaid.y", Special::kNctaidY},
    {"%nctaid.z", Special::kNctaidZ},
    {"%laneid", Special::kLane},
    {"%warpid", Special::kWarp},
    {"%nwarpid", Special::kNwarp},
    {"%smid", Special::kSm},
    {"%nsmid", Special::kNsm},
    {"%gridid", Special::kGrid},
    {"%dynamic_smem_size", Special::kDynamicShared},
    {"%total_smem_size", Special::kTotalShared},
    {"%aggr_smem_size", Special::kAggregateShared},
    {"%clusterid.x", Special::kClusterX},
    {"%clusterid.y", Special::kClusterY},
    {"%clusterid.z", Special::kClusterZ},
    {"%nclusterid.x", Special::kNclusterX},
    {"%nclusterid.y", Special::kNclusterY},
    {"%nclusterid.z", Special::kNclusterZ},
    {"%cluster_ctaid.x", Special::kClusterCtaX},
    {"%cluster_ctaid.y", Special::kClusterCtaY},
    {"%cluster_ctaid.z", Special::kClusterCtaZ},
    {"%cluster_nctaid.x", Special::kClusterNctaX},
    {"%cluster_nctaid.y", Special::kClusterNctaY},
    {"%cluster_nctaid.z", Special::kClusterNctaZ},
    {"%cluster_ctarank", Special::kClusterRank},
    {"%cluster_nctarank", Special::kClusterCount},
    {"%is_explicit_cluster", Special::kExplicitCluster},
    {"%lanemask_eq", Special::kLaneEq},
    {"%lanemask_lt", Special::kLaneLt},
    {"%lanemask_le", Special::kLaneLe},
    {"%lanemask_gt", Special::kLaneGt},
    {"%lanemask_ge", Special::kLaneGe},
};

constexpr bool (*kDecoders[])(const Inst&, Decoder&, Op&) = {
    decode_move,    decode_integer,    decode_bits,     decode_float, decode_half,
    decode_convert, decode_compare,    decode_control,  decode_warp,  decode_barrier,
    decode_memory,  decode_atomic,     decode_mbarrier, decode_fence, decode_bulk,
    decode_tensor,  decode_copy_async, decode_wgmma,    decode_matrix};

void collect(const Arg& arg, std::vector<u32>& registers) {
  if (arg.kind == ArgKind::kReg) registers.push_back(arg.reg);
  for (const Arg& part : arg.list) collect(part, registers);
}

bool is_wgmma(const Inst& inst) { return inst.parts[0] == "wgmma" && inst.has("mma_async"); }

// Operands that an instruction writes come first: how many.
size_t written(const Inst& inst) {
  const std::string& name = inst.parts[0];
  static const std::set<std::string> none = {"st",       "red",   "bra",    "bar",      "barrier", "ret",
                                             "exit",     "fence", "membar", "mbarrier", "cp",      "wgmma",
                                             "stmatrix", "trap",  "brx",    "prefetch"};
  if (none.count(name)) return 0;
  return 1;
}

}  // namespace

Decoder::Decoder(Program& program, const Module& module) : program(program), module(module) {
  program.reg_slot.assign(program.entry->registers.size(), 0);
  for (size_t i = 0; i < program.entry->registers.size(); i++) {
    RegClass cls = program.entry->registers[i].cls;
    if (cls == RegClass::kPred) {
      program.reg_slot[i] = program.preds++;
    } else {
      program.reg_slot[i] = program.slots;
      program.slots += cls == RegClass::k64 ? 2 : 1;
    }
  }
  sink_ = program.slots;
  program.slots += 2;
  sink_pred_ = program.preds++;
}

bool Decoder::is_wide(const Arg& arg) const {
  return arg.kind == ArgKind::kReg && program.entry->registers[arg.reg].cls == RegClass::k64;
}

bool Decoder::is_pred(const Arg& arg) const {
  return arg.kind == ArgKind::kReg && program.entry->registers[arg.reg].cls == RegClass::kPred;
}

u32 Decoder::constant(u64 value, bool wide) {
  auto [found, inserted] = constants_.try_emplace({value, wide}, program.slots);
  if (inserted) {
    program.constants.push_back({program.slots, wide, value});
    program.slots += wide ? 2 : 1;
  }
  return found->second;
}

u32 Decoder::special(const std::string& name, bool wide) {
  if (name == "WARP_SZ") return constant(kLanes, wide);
  for (const SpecialName& known : kSpecialNames) {
    if (name != known.name) continue;
    auto [found, inserted] = specials_.try_emplace({name, wide}, program.slots);
    if (inserted) {
      program.specials.push_back({program.slots, wide, known.special});
      program.slots += wide ? 2 : 1;
    }
    return found->second;
  }
  fail("unknown-instruction", "special register " + name);
}

u64 Decoder::symbol(const std::string& name) const {
  auto found = program.symbols.find(name);
  if (found == program.symbols.end()) fail("unsupported", "no variable named " + name);
  return found->second;
}

u32 Decoder::use(const Arg& arg, int bytes) {
  bool wide = bytes == 8;
  switch (arg.kind) {
    case ArgKind::kReg:
      if (is_pred(arg)) fail("unsupported", "predicate " + arg.name + " where a value is expected");
      if (wide && !is_wide(arg)) fail("unsupported", arg.name + " is narrower than the operand");
      return program.reg_slot[arg.reg];
    case ArgKind::kInt:
      return constant(bytes == 8 ? arg.value : arg.value & ((u64{1} << 8 * bytes) - 1), wide);
    case ArgKind::kF32:
    case ArgKind::kF64:
      return constant(arg.value, wide);
    case ArgKind::kSymbol:
      return constant(symbol(arg.name) + arg.value, wide);
    case ArgKind::kSpecial:
      return special(arg.name, wide);
    case ArgKind::kSink:
      return sink_;
    default:
      fail("unsupported", "operand kind");
  }
}

u32 Decoder::use_f(const Arg& arg, int bytes) {
  if (arg.kind == ArgKind::kF64 && bytes == 4) {
    return constant(bits_as<u32>(static_cast<float>(bits_as<double>(arg.value))), false);
  }
  if (arg.kind == ArgKind::kF32 && bytes == 8) {
    return constant(bits_as<u64>(static_cast<double>(bits_as<float>(static_cast<u32>(arg.value)))), true);
  }
  return use(arg, bytes);
}

u32 Decoder::def(const Arg& arg) {
  if (arg.kind == ArgKind::kSink) return sink_;
  if (arg.kind != ArgKind::kReg || is_pred(arg)) fail("unsupported", "destination " + arg.name);
  return program.reg_slot[arg.reg];
}

u32 Decoder::pred(const Arg& arg) {
  if (!is_pred(arg)) fail("unsupported", "expected a predicate, got " + arg.name);
  return program.reg_slot[arg.reg];
}

u32 Decoder::pred_def(const Arg& arg) { return arg.kind == ArgKind::kSink ? sink_pred_ : pred(arg); }

void Decoder::address(const Arg& mem, Op& op) {
  if (mem.kind != ArgKind::kMem) fail("unsupported", "expected an address");
  const Arg& base = mem.list[0];
  op.imm = mem.value;
  if (base.kind == ArgKind::kReg) {
    op.a = program.reg_slot[base.reg];
    op.aux2 = is_wide(base);
  } else {
    op.a = constant(base.kind == ArgKind::kSymbol ? symbol(base.name) : base.value, true);
    op.aux2 = 1;
  }
}

u32 Decoder::label(const Arg& arg, const Inst& inst) const {
  return program.entry->find_label(arg.name, inst.scope);
}

void Decoder::mark_wgmma_registers() {
  const std::vector<Inst>& insts = program.entry->insts;
  std::set<u32> used;
  for (const Inst& inst : insts) {
    if (!is_wgmma(inst)) continue;
    std::vector<u32> registers;
    collect(inst.args[0], registers);
    if (inst.args[1].kind == ArgKind::kVector) collect(inst.args[1], registers);
    used.insert(registers.begin(), registers.end());
  }
  program.reads.resize(insts.size());
  program.writes.resize(insts.size());
  if (used.empty()) return;
  for (size_t i = 0; i < insts.size(); i++) {
    if (is_wgmma(insts[i])) continue;
    for (size_t k = 0; k < insts[i].args.size(); k++) {
      std::vector<u32> registers;
      collect(insts[i].args[k], registers);
      for (u32 id : registers) {
        if (!used.count(id)) continue;
        bool write = k < written(insts[i]);
        (write ? program.writes : program.reads)[i].push_back(program.reg_slot[id]);
        program.ops[i].wgmma_registers = true;
      }
    }
  }
}

// Immediate post-dominators of basic blocks by the iterative algorithm of Cooper, Harvey and Kennedy on the
// reverse graph.
void Decoder::find_joins() {
  const std::vector<Inst>& insts = program.entry->insts;
  u32 count = static_cast<u32>(insts.size());
  std::set<u32> starts = {0};
  auto targets_of = [this, &insts](u32 i) {
    std::vector<u32> targets;
    const Inst& inst = insts[i];
    if (inst.parts[0] == "bra") targets.push_back(label(inst.args[0], inst));
    if (inst.parts[0] == "brx") {
      for (const std::string& name : program.entry->targets.at(inst.args[1].name)) {
        targets.push_back(program.entry->find_label(name, inst.scope));
      }
    }
    return targets;
  };
  auto ends = [&insts](u32 i) {
    const std::string& name = insts[i].parts[0];
    return name == "bra" || name == "brx" || name == "ret" || name == "exit" || name == "trap";
  };
  for (u32 i = 0; i < count; i++) {
    if (!ends(i)) continue;
    if (i + 1 < count) starts.insert(i + 1);
    for (u32 target : targets_of(i)) starts.insert(target);
  }
  starts.erase(count);
  std::vector<u32> start(starts.begin(), starts.end());
  u32 blocks = static_cast<u32>(start.size());
  auto block_of = [&start, blocks, count](u32 pc) {
    if (pc >= count) return blocks;
    return static_cast<u32>(std::upper_bound(start.begin(), start.end(), pc) - start.begin()) - 1;
  };
  // Node `blocks` is the exit.
  std::vector<std::vector<u32>> successors(blocks + 1), predecessors(blocks + 1);
  for (u32 b = 0; b < blocks; b++) {
    u32 last = (b + 1 < blocks ? start[b + 1] : count) - 1;
    const Inst& inst = insts[last];
    std::set<u32> next;
    if (ends(last)) {
      for (u32 target : targets_of(last)) next.insert(block_of(target));
      if (inst.parts[0] != "bra" && inst.parts[0] != "brx") next.insert(blocks);
      if (inst.guard != kNone) next.insert(block_of(last + 1));
    } else {
      next.insert(block_of(last + 1));
    }
    successors[b].assign(next.begin(), next.end());
    for (u32 n : next) predecessors[n].push_back(b);
  }
  std::vector<u32> order, number(blocks + 1, kNone), idom(blocks + 1, kNone);
  std::vector<std::pair<u32, size_t>> stack = {{blocks, 0}};
  std::vector<bool> visited(blocks + 1);
  visited[blocks] = true;
  while (!stack.empty()) {
    auto& [node, next] = stack.back();
    if (next < predecessors[node].size()) {
      u32 other = predecessors[node][next++];
      if (!visited[other]) {
        visited[other] = true;
        stack.push_back({other, 0});
      }
    } else {
      number[node] = static_cast<u32>(order.size());
      order.push_back(node);
      stack.pop_back();
    }
  }
  idom[blocks] = blocks;
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = order.size(); k-- > 0;) {
      u32 node = order[k];
      if (node == blocks) continue;
      u32 best = kNone;
      for (u32 next : successors[node]) {
        if (number[next] == kNone || idom[next] == kNone) continue;
        u32 other = next;
        if (best == kNone) {
          best = other;
          continue;
        }
        while (best != other) {
          while (number[best] < number[other]) best = idom[best];
          while (number[other] < number[best]) other = idom[other];
        }
      }
      if (best != kNone && idom[node] != best) {
        idom[node] = best;
        changed = true;
      }
    }
  }
  program.join.assign(count, kNone);
  for (u32 b = 0; b < blocks; b++) {
    u32 last = (b + 1 < blocks ? start[b + 1] : count) - 1;
    if (idom[b] != kNone && idom[b] != blocks) program.join[last] = start[idom[b]];
  }
}

void Decoder::run() {
  const std::vector<Inst>& insts = program.entry->insts;
  program.ops.resize(insts.size());
  for (size_t i = 0; i < insts.size(); i++) {
    const Inst& inst = insts[i];
    Op& op = program.ops[i];
    bool known = false;
    try {
      for (auto decode : kDecoders) {
        if ((known = decode(inst, *this, op))) break;
      }
      if (!known || !op.fn) fail("unknown-instruction", inst.text);
    } catch (Fault& fault) {
      Fault placed(fault.kind, std::string(fault.what()) + " in '" + inst.text + "'");
      placed.ptx_line = inst.line;
      throw placed;
    } catch (const std::out_of_range&) {
      Fault placed("unsupported", "operands of '" + inst.text + "'");
      placed.ptx_line = inst.line;
      throw placed;
    }
    if (inst.guard != kNone) {
      op.guard = program.reg_slot[inst.guard];
      op.guard_negated = inst.guard_negated;
    }
  }
  find_joins();
  mark_wgmma_registers();
}

}  // namespace sim
