// PTX ISA 9.7.13.12 "atom", 9.7.13.13 "red": on global, shared and generic addresses; lanes in an order of
// the seed's.
#include <algorithm>

#include "alu.h"

namespace sim {

namespace {

enum class Space : u32 { kGeneric, kGlobal, kShared };

struct Target {
  u8* bytes;
  u64 key;
};

Target find_target(Warp& warp, const Op& op, int lane, u64 bytes) {
  u64 address = warp.value(op.a, lane, op.aux2) + op.imm;
  bool shared = static_cast<Space>(op.aux & 3) == Space::kShared;
  if (!shared && static_cast<Space>(op.aux & 3) == Space::kGeneric && address >= kSharedWindow &&
      address < kSharedWindow + kWindowBytes) {
    shared = true;
    address -= kSharedWindow;
  }
  if (address % bytes) {
    fail("misaligned", "address " + hex(address) + " of an atomic of " + std::to_string(bytes) + " bytes",
         lane);
  }
  World& world = *warp.world;
  Access write = warp.access(true, true);
  if (!shared) {
    Region& region = world.global(address, bytes, true, lane);
    region.shadow->require_initialised(address, bytes, "atomic");
    return {world.touch_global(address, bytes, write, lane), address};
  }
  u32 offset;
  Cta& cta = world.owner(warp, address, bytes, offset, lane);
  cta.shadow->require_initialised(offset, bytes, "atomic");
  return {world.touch_shared(warp, address, bytes, write, lane),
          kSharedWindow | u64{cta.linear} << 20 | offset};
}

u64 load_value(const u8* from, u32 size) {
  u64 value = 0;
  std::memcpy(&value, from, size);
  return value;
}

// op.e: 0 a reduction of list values, 1 exchange, 2 compare and swap; op.size: bytes of a value; op.count:
// values (vectors).
Step atomic(Warp& warp, const Op& op) {
  bool acquire = op.aux & 8, release = op.aux & 16, result = op.aux & 4;
  u32 size = op.size, count = op.count;
  auto reduce = bits_as<Reduce>(u64{op.b} | u64{op.c} << 32);
  u32 start = warp.world->random.below(kLanes);
  warp.world->progress++;
  for (u32 i = 0; i < kLanes; i++) {
    int lane = static_cast<int>((i + start) % kLanes);
    if (!(warp.exec >> lane & 1)) continue;
    Target target = find_target(warp, op, lane, u64{size} * count);
    observe(warp, target.key, acquire);
    for (u32 k = 0; k < count; k++) {
      u8* place = target.bytes + k * size;
      u64 before = load_value(place, size), value = 0;
      auto operand = [&](u32 slot) {
        return size == 8 ? warp.reg<u64>(slot)[lane] : u64{warp.reg<u32>(slot)[lane]};
      };
      value = operand(op.list2[k]);
      if (op.e == 1) {
        std::memcpy(place, &value, size);
      } else if (op.e == 2) {
        u64 mask = size == 8 ? ~u64{0} : (u64{1} << 8 * size) - 1, swap = operand(op.f);
        if (before == (value & mask)) std::memcpy(place, &swap, size);
      } else {
        for (u32 part = 0; part < size; part += op.d) {
          reduce(place + part, reinterpret_cast<const u8*>(&value) + part);
        }
      }
      if (!result) continue;
      u32 slot = op.list[k];
      if (size == 8) {
        warp.reg<u64>(slot)[lane] = before;
      } else {
        warp.reg<u32>(slot)[lane] = static_cast<u32>(before);
      }
      warp.init[slot] |= 1u << lane;
    }
    publish(warp, target.key, release);
  }
  return Step::kYield;
}

}  // namespace

bool decode_atomic(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if ((name != "atom" && name != "red") || inst.has("async")) return false;
  bool result = name == "atom";
  static const char* operations[] = {"add", "min", "max", "and", "or", "xor", "inc", "dec", "exch", "cas"};
  std::string operation;
  for (const std::string& part : inst.parts) {
    if (std::find(std::begin(operations), std::end(operations), part) != std::end(operations)) {
      operation = part;
    }
  }
  std::string type = inst.type();
  bool pair = type.ends_with("x2");
  if (pair) type.resize(type.size() - 2);
  u32 element = static_cast<u32>(std::stoi(type.substr(type.find_first_of("0123456789")))) / 8;
  u32 size = pair ? 2 * element : element;
  if (size > 8 || element < 2) return false;
  op.size = static_cast<u8>(size);
  op.d = element;
  op.e = operation == "exch" ? 1 : operation == "cas" ? 2 : 0;
  if (op.e == 0) {
    u64 reduce = bits_as<u64>(find_reduce(operation, type));
    if (!reduce) return false;
    op.b = static_cast<u32>(reduce);
    op.c = static_cast<u32>(reduce >> 32);
  }
  Space space = Space::kGeneric;
  for (const std::string& part : inst.parts) {
    if (part == "global") space = Space::kGlobal;
    if (part.starts_with("shared")) space = Space::kShared;
  }
  op.aux = static_cast<u32>(space) | static_cast<u32>(result) << 2 |
           static_cast<u32>(inst.has("acquire") || inst.has("acq_rel")) << 3 |
           static_cast<u32>(inst.has("release") || inst.has("acq_rel")) << 4;
  decoder.address(inst.args.at(result), op);
  const Arg& value = inst.args.at(result + 1u);
  std::vector<Arg> values = value.kind == ArgKind::kVector ? value.list : std::vector<Arg>{value};
  op.count = static_cast<u8>(values.size());
  for (size_t k = 0; k < values.size(); k++) {
    op.list2.push_back(decoder.use_f(values[k], static_cast<int>(size)));
    if (result) {
      op.list.push_back(
          decoder.def(inst.args[0].kind == ArgKind::kVector ? inst.args[0].list.at(k) : inst.args[0]));
    }
  }
  if (op.e == 2) op.f = decoder.use_f(inst.args.at(result + 2u), static_cast<int>(size));
  op.fn = atomic;
  return true;
}

}  // namespace sim
