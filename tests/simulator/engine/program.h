// A kernel decoded once: every instruction is a function pointer with the places of its operands.
#pragma once

#include <deque>
#include <vector>

#include "ptx.h"

namespace sim {

struct Warp;
struct Op;

// kNext: go on. kJump: the warp's pc or groups were changed. kYield: go on, but let others run first.
// kBlock: run this instruction again when something has happened.
enum class Step : u8 { kNext, kJump, kYield, kBlock };
using Fn = Step (*)(Warp&, const Op&);

struct Op {
  Fn fn = nullptr;
  u32 guard = kNone;  // predicate slot
  u32 d = 0, e = 0;   // destinations: register slots, predicate slots or code positions
  u32 a = 0, b = 0, c = 0, f = 0;
  u64 imm = 0;
  u32 aux = 0, aux2 = 0;
  bool guard_negated = false;
  bool always = false;           // runs with an empty mask too (branches)
  bool wgmma_registers = false;  // names a register that some wgmma uses
  bool negate_a = false;
  u8 size = 0;                   // bytes per element of a memory access
  u8 count = 1;                  // elements of a memory access
  std::vector<u32> list, list2;  // slots of vector operands
};

// Registers live in a file of 128-byte slots: 32 lanes of 32 bits; 64-bit registers take two slots.
// Immediates are slots filled once per warp, so operands are always slots.
struct Constant {
  u32 slot;
  bool wide;
  u64 value;
};

enum class Special : u8 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLane,
  kWarp,
  kNwarp,
  kSm,
  kNsm,
  kGrid,
  kDynamicShared,
  kTotalShared,
  kAggregateShared,
  kClusterX,
  kClusterY,
  kClusterZ,
  kNclusterX,
  kNclusterY,
  kNclusterZ,
  kClusterCtaX,
  kClusterCtaY,
  kClusterCtaZ,
  kClusterNctaX,
  kClusterNctaY,
  kClusterNctaZ,
  kClusterRank,
  kClusterCount,
  kExplicitCluster,
  kLaneEq,
  kLaneLt,
  kLaneLe,
  kLaneGt,
  kLaneGe
};

struct SpecialSlot {
  u32 slot;
  bool wide;
  Special special;
};

struct Program {
  const Entry* entry = nullptr;
  std::vector<Op> ops;
  std::vector<u32> join;  // per instruction: the immediate post-dominator of its block (kNone: exit)
  std::vector<Constant> constants;
  std::vector<SpecialSlot> specials;
  std::vector<u32> reg_slot;                    // register id -> slot or predicate index
  std::vector<std::vector<u32>> reads, writes;  // slots; only for ops with wgmma_registers
  u32 slots = 0, preds = 0;
  u32 static_shared = 0, shared_start = 0, dynamic_shared = 0, local_bytes = 0;
  u64 param_address = 0;
  std::map<std::string, u64> symbols;
};

// What decoders use to bind operands.
class Decoder {
 public:
  Decoder(Program& program, const Module& module);
  void run();
  // Slot of a register or an immediate of `bytes` 1 to 8.
  u32 use(const Arg& arg, int bytes);
  u32 use_f(const Arg& arg, int bytes);  // immediates may be doubles standing for single precision
  u32 def(const Arg& arg);               // slot written; the sink for '_'
  u32 pred(const Arg& arg);              // predicate index read
  u32 pred_def(const Arg& arg);
  bool is_wide(const Arg& arg) const;
  bool is_pred(const Arg& arg) const;
  u32 constant(u64 value, bool wide);
  u32 special(const std::string& name, bool wide);
  void address(const Arg& mem, Op& op);  // a = base slot, imm = offset, aux2 = 1 if the base is 64 bits wide
  u32 label(const Arg& arg, const Inst& inst) const;
  u64 symbol(const std::string& name) const;
  u32 sink() const { return sink_; }
  u32 sink_pred() const { return sink_pred_; }
  Program& program;
  const Module& module;

 private:
  void mark_wgmma_registers();
  void find_joins();
  std::map<std::pair<u64, bool>, u32> constants_;
  std::map<std::pair<std::string, bool>, u32> specials_;
  u32 sink_ = 0, sink_pred_ = 0;
};

// Each returns false if the instruction is not one of its own.
bool decode_integer(const Inst& inst, Decoder& decoder, Op& op);
bool decode_bits(const Inst& inst, Decoder& decoder, Op& op);
bool decode_float(const Inst& inst, Decoder& decoder, Op& op);
bool decode_half(const Inst& inst, Decoder& decoder, Op& op);
bool decode_convert(const Inst& inst, Decoder& decoder, Op& op);
bool decode_compare(const Inst& inst, Decoder& decoder, Op& op);
bool decode_move(const Inst& inst, Decoder& decoder, Op& op);
bool decode_control(const Inst& inst, Decoder& decoder, Op& op);
bool decode_warp(const Inst& inst, Decoder& decoder, Op& op);
bool decode_barrier(const Inst& inst, Decoder& decoder, Op& op);
bool decode_memory(const Inst& inst, Decoder& decoder, Op& op);
bool decode_atomic(const Inst& inst, Decoder& decoder, Op& op);
bool decode_mbarrier(const Inst& inst, Decoder& decoder, Op& op);
bool decode_fence(const Inst& inst, Decoder& decoder, Op& op);
bool decode_bulk(const Inst& inst, Decoder& decoder, Op& op);
bool decode_tensor(const Inst& inst, Decoder& decoder, Op& op);
bool decode_copy_async(const Inst& inst, Decoder& decoder, Op& op);
bool decode_wgmma(const Inst& inst, Decoder& decoder, Op& op);
bool decode_matrix(const Inst& inst, Decoder& decoder, Op& op);

}  // namespace sim
