// PTX ISA 9.7.9 "ld", "st", "ld.global.nc", and what memory an address means.
#include <algorithm>

#include "alu.h"

namespace sim {

namespace {

enum class Space : u8 { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

Space find_space(const Inst& inst) {
  for (const std::string& part : inst.parts) {
    if (part == "global") return Space::kGlobal;
    if (part == "shared" || part == "shared::cta" || part == "shared::cluster") return Space::kShared;
    if (part == "local") return Space::kLocal;
    if (part == "param" || part == "param::entry") return Space::kParam;
    if (part == "const") return Space::kConst;
  }
  return Space::kGeneric;
}

bool in_window(u64 address, u64 window) { return address >= window && address < window + kWindowBytes; }

struct Request {
  Space space;
  bool atomic, acquire, release, signed_value, wide_registers;
};

Request request_of(const Op& op) {
  return {static_cast<Space>(op.aux & 7),
          (op.aux & 8) != 0,
          (op.aux & 16) != 0,
          (op.aux & 32) != 0,
          (op.aux & 64) != 0,
          (op.aux & 128) != 0};
}

Space resolve(Space space, u64& address) {
  if (space == Space::kGeneric) {
    if (in_window(address, kSharedWindow)) {
      address -= kSharedWindow;
      return Space::kShared;
    }
    if (in_window(address, kLocalWindow)) {
      address -= kLocalWindow;
      return Space::kLocal;
    }
    return Space::kGlobal;
  }
  return space;
}

u8* local_bytes(Warp& warp, u64 address, u64 bytes, bool write, int lane) {
  u32 size = warp.world->program.local_bytes;
  address = static_cast<u32>(address);
  if (address + bytes > size) {
    fail("out-of-bounds", "local memory " + hex(address) + " of " + std::to_string(size) + " bytes", lane);
  }
  u64 at = u64{size} * static_cast<u64>(lane) + address;
  if (write) {
    std::memset(&warp.local_init[at], 1, bytes);
  } else if (std::memchr(&warp.local_init[at], 0, bytes)) {
    fail("uninitialised", "local memory " + hex(address) + " was never written", lane);
  }
  return &warp.local[at];
}

u8* place(Warp& warp, Space space, u64 address, u64 bytes, const Access& access, int lane) {
  World& world = *warp.world;
  space = resolve(space, address);
  if (address % bytes) {
    u64 natural = bytes;
    fail("misaligned", "address " + hex(address) + " of an access of " + std::to_string(natural) + " bytes",
         lane);
  }
  if (space == Space::kShared) return world.touch_shared(warp, address, bytes, access, lane);
  if (space == Space::kLocal) return local_bytes(warp, address, bytes, access.write, lane);
  u64 start = reinterpret_cast<u64>(world.params);
  if (!access.write && address >= start && address + bytes <= start + world.param_storage.size()) {
    return reinterpret_cast<u8*>(address);
  }
  if (space == Space::kParam) fail("out-of-bounds", "parameter address " + hex(address), lane);
  return world.touch_global(address, bytes, access, lane);
}

u64 key_of(Warp& warp, Space space, u64 address) {
  space = resolve(space, address);
  if (space != Space::kShared) return address;
  u32 offset;
  Cta& cta = warp.world->owner(warp, address, 1, offset, -1);
  return kSharedWindow | u64{cta.linear} << 20 | offset;
}

void addresses(Warp& warp, const Op& op, u64* result) {
  u32 unknown = warp.exec & ~warp.init[op.a];
  if (unknown) fail("uninitialised", "the address register was never written", first_lane(unknown));
  if (op.aux2) {
    const u64* base = warp.reg<u64>(op.a);
    for (int i = 0; i < kLanes; i++) result[i] = base[i] + op.imm;
  } else {
    const u32* base = warp.reg<u32>(op.a);
    for (int i = 0; i < kLanes; i++) result[i] = static_cast<u32>(base[i] + static_cast<u32>(op.imm));
  }
}

// Lanes side by side, all of them: one access instead of 32.
bool side_by_side(Warp& warp, const u64* at, u64 bytes) {
  if (warp.exec != kAllLanes || at[0] % bytes) return false;
  u64 wrong = 0;
  for (u64 i = 1; i < kLanes; i++) wrong |= at[i] ^ (at[0] + i * bytes);
  return wrong == 0;
}

bool same_address(Warp& warp, const u64* at) {
  if (warp.exec != kAllLanes) return false;
  u64 wrong = 0;
  for (int i = 1; i < kLanes; i++) wrong |= at[i] ^ at[0];
  return wrong == 0;
}

u64 read_element(const u8* from, u32 size, bool is_signed) {
  u64 value = 0;
  std::memcpy(&value, from, size);
  if (is_signed && size < 8) {
    value = static_cast<u64>(static_cast<i64>(value << (64 - 8 * size)) >> (64 - 8 * size));
  }
  return value;
}

// A load's data into the registers of one element, lanes `stride` bytes apart.
void fill(Warp& warp, u32 slot, const u8* from, u64 stride, const Op& op, const Request& request) {
  if (request.wide_registers) {
    u64 values[kLanes];
    for (u64 i = 0; i < kLanes; i++) {
      values[i] = read_element(from + i * stride, op.size, request.signed_value);
    }
    store_lanes(warp, slot, values);
  } else {
    u32 values[kLanes];
    if (op.size == 4) {
      for (u64 i = 0; i < kLanes; i++) std::memcpy(&values[i], from + i * stride, 4);
    } else {
      for (u64 i = 0; i < kLanes; i++) {
        values[i] = static_cast<u32>(read_element(from + i * stride, op.size, request.signed_value));
      }
    }
    store_lanes(warp, slot, values);
  }
  warp.defined(slot);
}

Step load(Warp& warp, const Op& op) {
  Request request = request_of(op);
  u64 at[kLanes], bytes = u64{op.size} * op.count;
  addresses(warp, op, at);
  Access access = warp.access(false, request.atomic);
  bool together = side_by_side(warp, at, bytes);
  Space space = request.space;
  u64 first = at[0];
  if (together || same_address(warp, at)) {
    space = resolve(space, first);
    if (space == Space::kShared || space == Space::kGlobal) {
      if (first % bytes) {
        fail("misaligned", "address " + hex(first) + " of an access of " + std::to_string(bytes) + " bytes",
             0);
      }
      u64 total = together ? bytes * kLanes : bytes;
      u8* from = space == Space::kShared ? warp.world->touch_shared(warp, first, total, access, -1)
                                         : place(warp, space, first, bytes, access, 0);
      if (space == Space::kGlobal && together) from = warp.world->touch_global(first, total, access, -1);
      for (u32 k = 0; k < op.count; k++) {
        fill(warp, op.list[k], from + k * op.size, together ? bytes : 0, op, request);
      }
      if (request.atomic) observe(warp, key_of(warp, request.space, at[0]), request.acquire);
      return request.atomic ? Step::kYield : Step::kNext;
    }
  }
  alignas(16) u8 data[kLanes * 32];
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    std::memcpy(data + static_cast<u64>(lane) * bytes,
                place(warp, request.space, at[lane], bytes, access, lane), bytes);
    if (request.atomic) observe(warp, key_of(warp, request.space, at[lane]), request.acquire);
  }
  for (u32 k = 0; k < op.count; k++) fill(warp, op.list[k], data + k * op.size, bytes, op, request);
  return request.atomic ? Step::kYield : Step::kNext;
}

Step store(Warp& warp, const Op& op) {
  Request request = request_of(op);
  u64 at[kLanes], bytes = u64{op.size} * op.count;
  addresses(warp, op, at);
  warp.world->progress++;
  alignas(16) u8 data[kLanes * 32];
  for (u32 k = 0; k < op.count; k++) {
    u32 slot = op.list[k];
    for (u64 i = 0; i < kLanes; i++) {
      u64 value = op.list2[k] ? warp.reg<u64>(slot)[i] : warp.reg<u32>(slot)[i];
      std::memcpy(data + i * bytes + k * op.size, &value, op.size);
    }
  }
  Access access = warp.access(true, request.atomic);
  u64 first = at[0];
  if (side_by_side(warp, at, bytes)) {
    Space space = resolve(request.space, first);
    if (space == Space::kShared) {
      std::memcpy(warp.world->touch_shared(warp, first, bytes * kLanes, access, -1), data, bytes * kLanes);
    } else if (space == Space::kGlobal) {
      std::memcpy(warp.world->touch_global(first, bytes * kLanes, access, -1), data, bytes * kLanes);
      if (lane_count(warp.exec) > 1) warp.wrote_global |= warp.exec;
    } else {
      for (int i = 0; i < kLanes; i++) {
        std::memcpy(place(warp, space, first + static_cast<u64>(i) * bytes, bytes, access, i),
                    data + static_cast<u64>(i) * bytes, bytes);
      }
    }
    if (request.atomic) publish(warp, key_of(warp, request.space, at[0]), request.release);
    return request.atomic ? Step::kYield : Step::kNext;
  }
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    std::memcpy(place(warp, request.space, at[lane], bytes, access, lane),
                data + static_cast<u64>(lane) * bytes, bytes);
    if (request.atomic) publish(warp, key_of(warp, request.space, at[lane]), request.release);
  }
  if (lane_count(warp.exec) > 1) warp.wrote_global |= warp.exec;
  return request.atomic ? Step::kYield : Step::kNext;
}

u32 element_bytes(const std::string& type) {
  size_t digit = type.find_first_of("0123456789");
  if (digit == std::string::npos) return 0;
  return static_cast<u32>(std::stoi(type.substr(digit)) / 8 * (type.ends_with("x2") ? 2 : 1));
}

}  // namespace

Region& World::global(u64 address, u64 bytes, bool write, int lane) {
  auto after = std::upper_bound(regions.begin(), regions.end(), address,
                                [](u64 a, const Region& r) { return a < r.base; });
  if (after != regions.begin()) {
    Region& region = *--after;
    if (address + bytes <= region.base + region.bytes) {
      if (write && !region.writable) {
        fail("out-of-bounds",
             "write of read-only memory " + std::to_string(region.index) + " at byte " +
                 std::to_string(address - region.base),
             lane);
      }
      return region;
    }
    if (address < region.base + region.bytes + 4096) {
      fail("out-of-bounds",
           std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at byte " +
               std::to_string(address - region.base) + " of memory " + std::to_string(region.index) +
               ", which has " + std::to_string(region.bytes),
           lane);
    }
  }
  fail("out-of-bounds",
       std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at " + hex(address) +
           ", which is in no memory of the launch",
       lane);
}

u8* World::touch_global(u64 address, u64 bytes, const Access& access, int lane) {
  Region& region = global(address, bytes, access.write, lane);
  if (!access.write) {
    region.shadow->require_initialised(address, bytes, access.async ? "asynchronous read" : "read");
  }
  if (region.writable) region.shadow->access(address, bytes, access);
  return reinterpret_cast<u8*>(address);
}

Cta& World::owner(Warp& warp, u64 address, u64 bytes, u32& offset, int lane) {
  u32 index = static_cast<u32>(address) / kCtaStride;
  offset = static_cast<u32>(address) % kCtaStride;
  if (index > cluster_size) {
    fail("out-of-bounds", "shared address " + hex(address) + " of a CTA outside the cluster", lane);
  }
  Cta& cta = index == 0 ? *warp.cta : *warp.cta->cluster->ctas[index - 1];
  if (offset < program.shared_start || offset + bytes > cta.shared.size()) {
    fail("out-of-bounds",
         "shared memory " + hex(offset) + ", the CTA's ends at " + hex(cta.shared.size()) +
             " and starts at " + hex(program.shared_start),
         lane);
  }
  return cta;
}

u8* World::touch_shared(Warp& warp, u64 address, u64 bytes, const Access& access, int lane) {
  u32 offset;
  Cta& cta = owner(warp, address, bytes, offset, lane);
  if (offset < cta.mbarriers_to && offset + bytes > cta.mbarriers_from) {
    auto found = cta.mbarriers.lower_bound(offset > 7 ? offset - 7 : 0);
    if (found != cta.mbarriers.end() && found->first < offset + bytes) {
      fail("barrier", "ordinary access to the mbarrier at shared memory " + hex(found->first), lane);
    }
  }
  if (&cta != warp.cta) touch_remote(warp, cta);
  if (!access.write) cta.shadow->require_initialised(offset, bytes, "read");
  cta.shadow->access(offset, bytes, access);
  if (access.write && !access.async && lane_count(warp.exec) > 1) {
    warp.wrote_shared |= lane < 0 ? warp.exec : 1u << lane;
  }
  return &cta.shared[offset];
}

// Traffic to another CTA's shared memory must be over before that CTA exits (PTX ISA 5.1.7 "Shared State
// Space").
void World::touch_remote(Warp& warp, Cta& target) {
  if (&target == warp.cta) return;
  if (!target.running) {
    fail("exit",
         "access to the shared memory of CTA " + std::to_string(target.linear) + ", which has exited");
  }
  target.remote[warp.agent] = warp.step;
  target.remote_pc[warp.agent] = warp.pc;
}

bool decode_memory(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& name = inst.parts[0];
  if (name != "ld" && name != "st" && name != "ldu") return false;
  if (inst.has("async") || inst.has("bulk")) return false;
  bool is_load = name != "st";
  op.size = static_cast<u8>(element_bytes(inst.type()));
  if (op.size == 0 || op.size > 8) return false;
  const Arg& memory = inst.args.at(is_load ? 1 : 0);
  const Arg& data = inst.args.at(is_load ? 0 : 1);
  Space space = find_space(inst);
  decoder.address(memory, op);
  bool strong = inst.has("volatile") || inst.has("relaxed") || inst.has("acquire") || inst.has("release") ||
                inst.has("mmio");
  std::vector<Arg> items = data.kind == ArgKind::kVector ? data.list : std::vector<Arg>{data};
  op.count = static_cast<u8>(items.size());
  bool wide = false;
  for (const Arg& item : items) {
    if (is_load) {
      op.list.push_back(decoder.def(item));
      wide |= decoder.is_wide(item);
    } else {
      op.list.push_back(decoder.use_f(item, op.size == 8 ? 8 : 4));
      op.list2.push_back(item.kind == ArgKind::kReg ? decoder.is_wide(item) : op.size == 8);
    }
  }
  if (op.size == 8) wide = true;
  op.aux = static_cast<u32>(space) | strong << 3 | inst.has("acquire") << 4 | inst.has("release") << 5 |
           (inst.type()[0] == 's') << 6 | wide << 7;
  op.fn = is_load ? load : store;
  return true;
}

}  // namespace sim
