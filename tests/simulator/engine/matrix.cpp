// PTX ISA 9.7.14 "Warp Level Matrix Instructions": ldmatrix, stmatrix, mma.sync m16n8k16 of 16-bit types into
// f32.
#include "half_type.h"
#include "products.h"
#include "world.h"

namespace sim {

namespace {

void require_whole(Warp& warp) {
  if (warp.exec != kAllLanes) {
    fail("barrier", "matrix instruction in divergent code: expected all 32 lanes", first_lane(warp.exec));
  }
}

// The 16-byte row that lane `8 * matrix + row` addresses.
u8* row_bytes(Warp& warp, const Op& op, u32 matrix, u32 row, const Access& access) {
  int lane = static_cast<int>(8 * matrix + row);
  u64 address = warp.value(op.a, lane, op.aux2) + op.imm;
  if (address >= kSharedWindow && address < kSharedWindow + kWindowBytes) address -= kSharedWindow;
  if (address % 16) {
    fail("misaligned", "matrix row at shared memory " + hex(address) + ", expected a multiple of 16", lane);
  }
  return warp.world->touch_shared(warp, address, 16, access, lane);
}

// Lane l of a matrix holds elements 2 * (l % 4) and the next of row l / 4; transposed, of column l / 4.
Step load_matrix(Warp& warp, const Op& op) {
  require_whole(warp);
  Access access = warp.access(false);
  for (u32 m = 0; m < op.list.size(); m++) {
    u16 matrix[8][8];
    for (u32 row = 0; row < 8; row++) std::memcpy(matrix[row], row_bytes(warp, op, m, row, access), 16);
    u32* d = warp.reg<u32>(op.list[m]);
    for (int lane = 0; lane < kLanes; lane++) {
      int row = row_of(lane), column = column_of(lane);
      u16 low = op.aux ? matrix[column][row] : matrix[row][column];
      u16 high = op.aux ? matrix[column + 1][row] : matrix[row][column + 1];
      d[lane] = low | static_cast<u32>(high) << 16;
    }
    warp.defined(op.list[m]);
  }
  return Step::kNext;
}

Step store_matrix(Warp& warp, const Op& op) {
  require_whole(warp);
  warp.world->progress++;
  Access access = warp.access(true);
  for (u32 m = 0; m < op.list.size(); m++) {
    u16 matrix[8][8];
    const u32* a = warp.reg<u32>(op.list[m]);
    for (int lane = 0; lane < kLanes; lane++) {
      int row = row_of(lane), column = column_of(lane);
      u16 low = static_cast<u16>(a[lane]), high = static_cast<u16>(a[lane] >> 16);
      (op.aux ? matrix[column][row] : matrix[row][column]) = low;
      (op.aux ? matrix[column + 1][row] : matrix[row][column + 1]) = high;
    }
    for (u32 row = 0; row < 8; row++) std::memcpy(row_bytes(warp, op, m, row, access), matrix[row], 16);
  }
  return Step::kNext;
}

float widen(u32 bits, bool bf16) {
  return bf16 ? widen_bf16(static_cast<u16>(bits)) : widen_f16(static_cast<u16>(bits));
}

// list: d, then c; list2: a, then b; aux: bf16; imm: k (8 or 16).
Step mma(Warp& warp, const Op& op) {
  require_whole(warp);
  static thread_local LanesA a;
  static thread_local LanesB b;
  bool bf16 = op.aux;
  int depth = static_cast<int>(op.imm);
  size_t a_registers = depth == 16 ? 4 : 2;
  for (int k = 0; k < 16; k++) {
    for (int half = 0; half < 2; half++) {
      const u32* rows = k < depth ? warp.reg<u32>(op.list2[static_cast<size_t>(half + k / 8 * 2)]) : nullptr;
      const u32* columns =
          k < depth ? warp.reg<u32>(op.list2[a_registers + static_cast<size_t>(k / 8)]) : nullptr;
      for (int lane = 0; lane < kLanes; lane++) {
        int shift = (k & 1) * 16, within = k % 8 / 2;
        a.value[half][k][lane] = rows ? widen(rows[lane / 4 * 4 + within] >> shift, bf16) : 0;
        b.value[half][k][lane] =
            columns ? widen(columns[(column_of(lane) + half) * 4 + within] >> shift, bf16) : 0;
      }
    }
  }
  alignas(64) float sums[4][kLanes];
  float* accumulators[4];
  u32 defined = kAllLanes;
  for (u32 i = 0; i < 4; i++) {
    std::memcpy(sums[i], warp.reg<float>(op.list[4 + i]), sizeof sums[i]);
    accumulators[i] = sums[i];
    defined &= warp.init[op.list[4 + i]];
  }
  multiply(a, b, accumulators, true);
  for (u32 i = 0; i < 4; i++) {
    std::memcpy(warp.reg<float>(op.list[i]), sums[i], sizeof sums[i]);
    warp.init[op.list[i]] = defined;
  }
  warp.world->products++;
  return Step::kNext;
}

}  // namespace

bool decode_matrix(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name == "ldmatrix" || name == "stmatrix") {
    if (!inst.has("m8n8") || inst.type() != "b16") return false;
    bool load = name == "ldmatrix";
    decoder.address(inst.args.at(load), op);
    const Arg& values = inst.args.at(!load);
    for (const Arg& value : values.kind == ArgKind::kVector ? values.list : std::vector<Arg>{values}) {
      op.list.push_back(load ? decoder.def(value) : decoder.use(value, 4));
    }
    op.aux = inst.has("trans");
    op.fn = load ? load_matrix : store_matrix;
    return true;
  }
  if (name != "mma" || (!inst.has("m16n8k16") && !inst.has("m16n8k8")) || inst.parts.size() < 8) return false;
  size_t types = inst.parts.size() - 4;
  const std::string& type = inst.parts[types + 1];
  if (inst.parts[types] != "f32" || inst.parts[types + 3] != "f32" || (type != "bf16" && type != "f16")) {
    return false;
  }
  op.aux = type == "bf16";
  op.imm = inst.has("m16n8k16") ? 16 : 8;
  for (const Arg& arg : inst.args.at(0).list) op.list.push_back(decoder.def(arg));
  for (const Arg& arg : inst.args.at(3).list) op.list.push_back(decoder.use_f(arg, 4));
  for (const Arg& arg : inst.args.at(1).list) op.list2.push_back(decoder.use(arg, 4));
  for (const Arg& arg :
       inst.args.at(2).kind == ArgKind::kVector ? inst.args[2].list : std::vector<Arg>{inst.args[2]}) {
    op.list2.push_back(decoder.use(arg, 4));
  }
  op.fn = mma;
  return true;
}

}  // namespace sim
