// PTX ISA 9.7.15 "Asynchronous Warpgroup Level Matrix Instructions". The product happens when the adversary
// says, between its issue by all four warps and the wait; groups in order.
#include <array>

#include "half_type.h"
#include "products.h"
#include "world.h"

namespace sim {

namespace {

enum : u32 { kBf16 = 1, kNegateA = 2, kNegateB = 4, kTransposeA = 8, kTransposeB = 16, kSharedA = 32 };

// 9.7.15.5.1.2 "Matrix descriptor format".
struct Descriptor {
  u32 start, leading, stride, base;
  u32 span;  // bytes of a swizzled row: 16 for none
  explicit Descriptor(u64 bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        span(bits >> 62 == 0   ? 16
             : bits >> 62 == 1 ? 128
             : bits >> 62 == 2 ? 64
                               : 32) {}
  u32 swizzle(u32 address) const { return address ^ (((address >> 7) - base) & (span / 16 - 1)) << 4; }
  // The 16 bytes that hold k = 8 * half ... of row `index` (K-major), or rows 8 * index ... of column k
  // (M/N-major).
  u32 k_major(u32 index, u32 half) const {
    u32 address = start + index / 8 * stride + index % 8 * span;
    return swizzle(address + half * (span == 16 ? leading : 16));
  }
  u32 mn_major(u32 index, u32 k) const {
    if (span == 16) return start + index * stride + k / 8 * leading + k % 8 * 16;
    u32 row = span / 16;  // groups of 8 elements in a row
    return swizzle(start + index / row * leading + index % row * 16 + k / 8 * stride + k % 8 * span);
  }
};

// All 16-byte chunks of rows [first, first + rows) of an operand.
template <class Visit>
void for_chunks(const Descriptor& descriptor, bool transposed, u32 first, u32 rows, Visit visit) {
  if (transposed) {
    for (u32 k = 0; k < 16; k++) {
      for (u32 group = first / 8; group < (first + rows) / 8; group++) {
        visit(descriptor.mn_major(group, k), group * 8, k);
      }
    }
  } else {
    for (u32 row = first; row < first + rows; row++) {
      for (u32 half = 0; half < 2; half++) visit(descriptor.k_major(row, half), row, half * 8);
    }
  }
}

void check_descriptor(Cta& cta, const Descriptor& descriptor, bool transposed, u32 rows) {
  for_chunks(descriptor, transposed, 0, rows, [&](u32 address, u32, u32) {
    if (address < 1024 || address + 16 > cta.shared.size()) {
      fail("out-of-bounds",
           "wgmma reads shared memory " + hex(address) + ", the CTA's ends at " + hex(cta.shared.size()));
    }
  });
}

void record(Cta& cta, const Descriptor& descriptor, bool transposed, u32 first, u32 rows,
            const Access& access) {
  bool more = false;
  for_chunks(descriptor, transposed, first, rows, [&](u32 address, u32, u32) {
    if (more) {
      cta.shadow->access_more(address, 16, access);
    } else {
      cta.shadow->access(address, 16, access);
    }
    more = true;
  });
}

float widen(u16 bits, bool bf16) { return bf16 ? widen_bf16(bits) : widen_f16(bits); }

// matrix[row][k], rows from `first`.
void read_operand(Cta& cta, const Descriptor& descriptor, bool transposed, u32 first, u32 rows, bool bf16,
                  float sign, std::vector<std::array<float, 16>>& matrix) {
  matrix.resize(rows);
  for_chunks(descriptor, transposed, first, rows, [&](u32 address, u32 row, u32 k) {
    cta.shadow->require_initialised(address, 16, "wgmma reads: read");
    u16 values[8];
    std::memcpy(values, &cta.shared[address], 16);
    for (u32 i = 0; i < 8; i++) {
      float value = sign * widen(values[i], bf16);
      if (transposed) {
        matrix[row - first + i][k] = value;
      } else {
        matrix[row - first][k + i] = value;
      }
    }
  });
}

void spread_rows(const std::vector<std::array<float, 16>>& rows, LanesA& a) {
  for (int upper = 0; upper < 2; upper++) {
    for (size_t k = 0; k < 16; k++) {
      for (int lane = 0; lane < kLanes; lane++) {
        a.value[upper][k][lane] = rows[static_cast<size_t>(row_of(lane) + 8 * upper)][k];
      }
    }
  }
}

// Register fragment of A (figure "WGMMA .m64nNk16 register fragment layout for matrix A").
void spread_registers(Warp& warp, const std::vector<u32>& slots, bool bf16, float sign, LanesA& a) {
  for (int upper = 0; upper < 2; upper++) {
    for (int k = 0; k < 16; k++) {
      const u32* values = warp.reg<u32>(slots[static_cast<size_t>(upper + k / 8 * 2)]);
      for (int lane = 0; lane < kLanes; lane++) {
        int holder = lane / 4 * 4 + k % 8 / 2;
        a.value[upper][k][lane] = sign * widen(static_cast<u16>(values[holder] >> (k & 1) * 16), bf16);
      }
    }
  }
}

void compute(Cta& cta, u32 first_warp, const Op& op, const WgmmaOp& product) {
  bool bf16 = op.aux & kBf16;
  float sign_a = op.aux & kNegateA ? -1.0f : 1.0f, sign_b = op.aux & kNegateB ? -1.0f : 1.0f;
  auto a = std::make_unique<LanesA[]>(4);
  std::vector<std::array<float, 16>> matrix;
  for (u32 w = 0; w < 4; w++) {
    if (op.aux & kSharedA) {
      read_operand(cta, Descriptor(product.a), op.aux & kTransposeA, 16 * w, 16, bf16, sign_a, matrix);
      spread_rows(matrix, a[w]);
    } else {
      spread_registers(*cta.warps[first_warp + w], op.list2, bf16, sign_a, a[w]);
    }
  }
  u32 columns = static_cast<u32>(op.list.size()) * 2;
  read_operand(cta, Descriptor(product.b), op.aux & kTransposeB, 0, columns, bf16, sign_b, matrix);
  auto b = std::make_unique<LanesB>();
  for (u32 block = 0; block < columns / 8; block++) {
    for (int odd = 0; odd < 2; odd++) {
      for (size_t k = 0; k < 16; k++) {
        for (int lane = 0; lane < kLanes; lane++) {
          b->value[odd][k][lane] = matrix[block * 8 + static_cast<u32>(column_of(lane) + odd)][k];
        }
      }
    }
    for (u32 w = 0; w < 4; w++) {
      Warp& warp = *cta.warps[first_warp + w];
      float* accumulators[4];
      for (u32 i = 0; i < 4; i++) {
        u32 slot = op.list[block * 4 + i];
        accumulators[i] = warp.reg<float>(slot);
        warp.init[slot] = kAllLanes;
      }
      multiply(a[w], *b, accumulators, product.accumulate);
    }
  }
}

Warpgroup& warpgroup_of(Warp& warp) {
  Warpgroup& group = warp.cta->warpgroups[static_cast<size_t>(warp.index / 4)];
  if (group.agents[0] == kNone) {
    if (static_cast<u32>(warp.index / 4 * 4 + 4) > warp.world->warps_per_cta) {
      fail("barrier", "wgmma in a warpgroup of fewer than four warps");
    }
    for (u32& agent : group.agents) {
      agent = warp.cta->cluster->add_agent(AgentKind::kWgmma,
                                           warp.cta->rank << 8 | static_cast<u32>(warp.index / 4));
    }
  }
  return group;
}

void require_whole(Warp& warp) {
  if (warp.exec != kAllLanes) {
    fail("barrier", "wgmma in divergent code: expected all 32 lanes", first_lane(warp.exec));
  }
}

// Registers must be fenced since their last use; a mov, if need be, since the group before.
bool unfenced(const Warp& warp, u32 slot) {
  if (warp.stamp[slot] > warp.fence_stamp) return true;
  return warp.move_stamp[slot] > warp.fence_stamp && warp.fence_stamp < warp.commit_stamp;
}

// Register rules of 9.7.15.7.1 "wgmma.fence".
void check_registers(Warp& warp, const Op& op) {
  auto bad = [](const char* text) { fail("wgmma-register", text); };
  if (!warp.wgmma_fenced) bad("no wgmma.fence before the warpgroup's first wgmma");
  for (u32 slot : op.list) {
    if (unfenced(warp, slot)) bad("an accumulator was used after the last wgmma.fence");
    if (warp.busy_fragment[slot]) bad("an accumulator is operand A of a wgmma in flight");
    if (warp.busy_accumulator[slot] && warp.busy_accumulator[slot] != op.list.size()) {
      bad("an accumulator of a wgmma of another shape in flight");
    }
  }
  for (u32 slot : op.list2) {
    if (unfenced(warp, slot)) bad("a register of operand A was used after the last wgmma.fence");
    if (warp.busy_accumulator[slot]) bad("operand A is the accumulator of a wgmma in flight");
    if (warp.init[slot] != kAllLanes) fail("uninitialised", "a register of operand A was never written");
  }
}

void launch(Warp& warp, const Op& op, const std::shared_ptr<WgmmaOp>& product) {
  World& world = *warp.world;
  Cta& cta = *warp.cta;
  Warpgroup& group = warpgroup_of(warp);
  Descriptor b(product->b), a(product->a);
  u32 columns = static_cast<u32>(op.list.size()) * 2;
  Clock common = product->clocks[0];
  for (int w = 1; w < 4; w++) common.meet(product->clocks[w]);
  check_descriptor(cta, b, op.aux & kTransposeB, columns);
  if (op.aux & kSharedA) check_descriptor(cta, a, op.aux & kTransposeA, 64);
  for (u32 w = 0; w < 4; w++) {  // a wait is for the waiting warp's part alone, which reads all of b
    u64 epoch = Epoch::make(cta.cluster->id, group.agents[w], product->group);
    record(cta, b, op.aux & kTransposeB, 0, columns, {&common, epoch, product->pc, false, true, false});
    if (op.aux & kSharedA) {
      record(cta, a, op.aux & kTransposeA, 16 * w, 16,
             {&product->clocks[w], epoch, product->pc, false, true, false});
    }
  }
  world.products++;
  u32 first_warp = static_cast<u32>(warp.index / 4 * 4), turn = group.launched++;
  Cta* c = &cta;
  Warpgroup* g = &group;
  const Op* o = &op;
  world.later(
      *cta.cluster,
      [c, g, o, first_warp, product] {
        compute(*c, first_warp, *o, *product);
        g->finished++;
        auto left = g->unfinished.find(product->group);
        if (--left->second == 0) g->unfinished.erase(left);
      },
      [g, turn] { return g->finished == turn; });
}

Step mma_async(Warp& warp, const Op& op) {
  require_whole(warp);
  check_registers(warp, op);
  Warpgroup& group = warpgroup_of(warp);
  u64 a = op.aux & kSharedA ? warp.value(op.a, 0, true) : 0, b = warp.value(op.b, 0, true);
  for (int lane = 1; lane < kLanes; lane++) {
    if ((op.aux & kSharedA && warp.value(op.a, lane, true) != a) || warp.value(op.b, lane, true) != b) {
      fail("barrier", "wgmma: the descriptor differs between the lanes of a warp", lane);
    }
  }
  u32 scale = op.c == kNone ? (op.imm ? kAllLanes : 0) : warp.preds[op.c];
  if (op.c != kNone && warp.pred_init[op.c] != kAllLanes) fail("uninitialised", "scale-d was never written");
  if (op.negate_a) scale = ~scale;
  if (scale != 0 && scale != kAllLanes) fail("barrier", "wgmma: scale-d differs between the lanes of a warp");
  if (scale) {
    for (u32 slot : op.list) {
      if (warp.init[slot] != kAllLanes && !warp.busy_accumulator[slot]) {
        fail("uninitialised", "an accumulator was never written and scale-d is true");
      }
    }
  }
  std::shared_ptr<WgmmaOp>& product = group.forming[warp.wgmma_issued];
  u32 number = warp.wgmma_committed + 1;
  if (!product) {
    product = std::make_shared<WgmmaOp>();
    product->pc = warp.pc;
    product->group = number;
    product->a = a;
    product->b = b;
    product->accumulate = scale != 0;
    group.unfinished[number]++;
  } else if (product->pc != warp.pc || product->group != number || product->a != a || product->b != b ||
             product->accumulate != (scale != 0)) {
    fail("barrier",
         "wgmma: the warps of the warpgroup differ in the instruction, its group, a descriptor or scale-d");
  }
  product->clocks[warp.index % 4] = warp.clock;
  warp.wgmma_open++;
  for (u32 slot : op.list) warp.busy_accumulator[slot] = static_cast<u16>(op.list.size());
  for (u32 slot : op.list2) warp.busy_fragment[slot]++;
  warp.in_flight.push_back({number, op.list, op.list2});
  if (++product->issued == 4) {
    std::shared_ptr<WgmmaOp> whole = product;
    group.forming.erase(warp.wgmma_issued);
    launch(warp, op, whole);
  }
  warp.wgmma_issued++;
  return Step::kYield;
}

Step fence(Warp& warp, const Op&) {
  require_whole(warp);
  warp.wgmma_fenced = true;
  warp.fence_stamp = warp.steps;
  return Step::kNext;
}

Step commit(Warp& warp, const Op&) {
  require_whole(warp);
  warpgroup_of(warp);
  warp.wgmma_committed++;
  warp.commit_stamp = warp.steps;
  warp.wgmma_open = 0;
  return Step::kYield;
}

Step wait(Warp& warp, const Op& op) {
  require_whole(warp);
  Warpgroup& group = warpgroup_of(warp);
  if (warp.wgmma_committed < op.imm) return Step::kNext;
  u32 done = warp.wgmma_committed - static_cast<u32>(op.imm);
  if (!group.unfinished.empty() && group.unfinished.begin()->first <= done) return Step::kBlock;
  warp.clock.learn(group.agents[warp.index % 4], done);
  warp.wgmma_waited = std::max(warp.wgmma_waited, done);
  std::vector<WgmmaGroupRegisters> left;
  for (WgmmaGroupRegisters& registers : warp.in_flight) {
    if (registers.group > done) {
      left.push_back(std::move(registers));
      continue;
    }
    for (u32 slot : registers.accumulators) warp.busy_accumulator[slot] = 0;
    for (u32 slot : registers.fragments) warp.busy_fragment[slot]--;
  }
  for (const WgmmaGroupRegisters& registers : left) {
    for (u32 slot : registers.accumulators) {
      warp.busy_accumulator[slot] = static_cast<u16>(registers.accumulators.size());
    }
  }
  warp.in_flight = std::move(left);
  return Step::kYield;
}

}  // namespace

bool decode_wgmma(const Inst& inst, Decoder& decoder, Op& op) {
  if (inst.parts[0] != "wgmma") return false;
  const std::string& kind = inst.parts.at(1);
  if (kind == "fence") {
    op.fn = fence;
  } else if (kind == "commit_group") {
    op.fn = commit;
  } else if (kind == "wait_group") {
    op.imm = inst.args.at(0).value;
    op.fn = wait;
  } else if (kind == "mma_async" && inst.parts.size() == 8 && inst.parts[5] == "f32") {
    const std::string &shape = inst.parts[4], &type = inst.parts[6];
    if ((type != "bf16" && type != "f16") || inst.parts[7] != type || !shape.ends_with("k16")) return false;
    u32 columns = static_cast<u32>(std::stoi(shape.substr(4)));
    const std::vector<Arg>& args = inst.args;
    for (const Arg& arg : args.at(0).list) op.list.push_back(decoder.def(arg));
    if (op.list.size() * 2 != columns || columns % 8 || columns > 256) return false;
    bool shared = args.at(1).kind != ArgKind::kVector;
    op.aux = (type == "bf16") * u32{kBf16} | shared * u32{kSharedA};
    if (shared) {
      op.a = decoder.use(args[1], 8);
    } else {
      for (const Arg& arg : args[1].list) op.list2.push_back(decoder.use(arg, 4));
      if (op.list2.size() != 4) return false;
    }
    op.b = decoder.use(args.at(2), 8);
    op.c = args.at(3).kind == ArgKind::kReg ? decoder.pred(args[3]) : kNone;
    op.imm = args[3].value;
    op.negate_a = args[3].negated;
    if (static_cast<i64>(args.at(4).value) == -1) op.aux |= kNegateA;
    if (static_cast<i64>(args.at(5).value) == -1) op.aux |= kNegateB;
    size_t next = 6;
    if (shared && args.at(next++).value) op.aux |= kTransposeA;
    if (args.at(next).value) op.aux |= kTransposeB;
    op.fn = mma_async;
  } else {
    return false;
  }
  return true;
}

}  // namespace sim
