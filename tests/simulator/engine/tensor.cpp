// PTX ISA 9.7.9.27 "Tensor copies", 5.5 "Tensors": boxes of a tensor map (tiled mode), swizzles, fills and
// clipping.
#include <algorithm>

#include "world.h"

namespace sim {

namespace {

struct Box {
  const TensorMap* map = nullptr;
  std::vector<i64> at;  // coordinates of the box's first element
  u64 inner_bytes = 0, rows = 1, bytes = 0;
};

// 5.5.7 "Swizzling modes": 16-byte chunks change places inside a 128-byte line by the line's number.
u64 swizzled(u64 address, int span) {
  u64 mask = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
  return address ^ ((address >> 7 & mask) << 4);
}

void check_map(const TensorMap& map, int lane) {
  size_t rank = map.extents.size();
  auto bad = [lane](const char* kind, const std::string& text) { fail(kind, "tensor map: " + text, lane); };
  if (rank < 1 || rank > 5 || map.box.size() != rank || map.strides.size() + 1 != rank) {
    bad("limit", "rank " + std::to_string(rank) + " with " + std::to_string(map.box.size()) +
                     " box sizes and " + std::to_string(map.strides.size()) + " strides");
  }
  if (map.address % 16) bad("misaligned", "address " + hex(map.address) + ", expected a multiple of 16");
  for (i64 stride : map.strides) {
    if (stride % 16 || stride <= 0 || stride >> 40) {
      bad("misaligned",
          "stride of " + std::to_string(stride) + " bytes, expected a multiple of 16 below 2^40");
    }
  }
  for (i64 extent : map.extents) {
    if (extent < 1 || extent >> 32) bad("limit", "extent " + std::to_string(extent));
  }
  for (i64 size : map.box) {
    if (size < 1 || size > 256) {
      bad("limit", "box of " + std::to_string(size) + " elements in a dimension, at most 256");
    }
  }
  i64 inner = map.box[0] * map.element_bytes;
  if (inner % 16) {
    bad("misaligned", "inner box of " + std::to_string(inner) + " bytes, expected a multiple of 16");
  }
  if (map.swizzle && inner > map.swizzle) {
    bad("limit", "inner box of " + std::to_string(inner) + " bytes exceeds the swizzle's " +
                     std::to_string(map.swizzle));
  }
}

// op.list: map, coordinates...; op.list2: their widths.
Box find_box(Warp& warp, const Op& op, int lane) {
  Box box;
  u64 address = warp.value(op.list[0], lane, true) + op.imm;
  auto found = warp.world->maps.find(address);
  if (found == warp.world->maps.end()) fail("out-of-bounds", "no tensor map at " + hex(address), lane);
  box.map = found->second;
  check_map(*box.map, lane);
  if (op.list.size() - 1 != box.map->extents.size()) {
    fail("unsupported",
         std::to_string(op.list.size() - 1) + " coordinates for a tensor map of rank " +
             std::to_string(box.map->extents.size()),
         lane);
  }
  for (size_t i = 1; i < op.list.size(); i++) {
    box.at.push_back(static_cast<i32>(warp.value32(op.list[i], lane)));
  }
  box.inner_bytes = static_cast<u64>(box.map->box[0] * box.map->element_bytes);
  for (size_t i = 1; i < box.map->box.size(); i++) box.rows *= static_cast<u64>(box.map->box[i]);
  box.bytes = box.rows * box.inner_bytes;
  return box;
}

// Calls visit(row, global address of the first inside element, bytes inside, bytes skipped before them).
template <class Visit>
void for_rows(const Box& box, Visit visit) {
  const TensorMap& map = *box.map;
  i64 low = std::max<i64>(-box.at[0], 0), high = std::min<i64>(map.extents[0] - box.at[0], map.box[0]);
  u64 element = static_cast<u64>(map.element_bytes);
  for (u64 row = 0; row < box.rows; row++) {
    u64 rest = row, address = map.address;
    bool inside = low < high;
    for (size_t d = 1; d < map.box.size(); d++) {
      i64 at = box.at[d] + static_cast<i64>(rest % static_cast<u64>(map.box[d]));
      rest /= static_cast<u64>(map.box[d]);
      inside &= at >= 0 && at < map.extents[d];
      address += static_cast<u64>(at * map.strides[d - 1]);
    }
    if (inside) {
      visit(row, address + static_cast<u64>(box.at[0] + low) * element,
            static_cast<u64>(high - low) * element, static_cast<u64>(low) * element);
    } else {
      visit(row, u64{0}, u64{0}, u64{0});
    }
  }
}

void gather(const Box& box, u8* shared, u32 to) {
  std::vector<u8> line(box.inner_bytes);
  for_rows(box, [&](u64 row, u64 address, u64 bytes, u64 skip) {
    std::fill(line.begin(), line.end(), 0);
    if (bytes) std::memcpy(&line[skip], reinterpret_cast<const void*>(address), bytes);
    for (u64 i = 0; i < box.inner_bytes; i += 16) {
      std::memcpy(shared + swizzled(to + row * box.inner_bytes + i, box.map->swizzle), &line[i], 16);
    }
  });
}

void touch_rows(Warp& warp, const Box& box, const Access& access, int lane, bool reduce) {
  bool first = true;
  Region* region = nullptr;
  for_rows(box, [&](u64, u64 address, u64 bytes, u64) {
    if (!bytes) return;
    Region& here = warp.world->global(address, bytes, access.write, lane);
    if (!access.write || reduce) here.shadow->require_initialised(address, bytes, "asynchronous read");
    if (here.writable) {
      if (first || region != &here) {
        here.shadow->access(address, bytes, access);
      } else {
        here.shadow->access_more(address, bytes, access);
      }
    }
    first = false;
    region = &here;
  });
}

Step load(Warp& warp, const Op& op) {
  World& world = *warp.world;
  const Clock& known = warp.view();
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Box box = find_box(warp, op, lane);
    u64 destination = warp.value(op.a, lane, op.aux & 1) + static_cast<i64>(static_cast<i32>(op.c));
    u64 signal = warp.value(op.b, lane, op.aux & 2) + static_cast<i64>(static_cast<i32>(op.f));
    bool multicast = op.aux & 4;
    u32 mask = multicast ? warp.value32(op.d, lane) & 0xffff : 0;
    if (multicast) check_multicast(world, mask, lane);
    for (u32 rank = 0; rank < world.cluster_size; rank++) {
      if (multicast && !(mask >> rank & 1)) continue;
      u64 window = multicast ? u64{rank + 1} * kCtaStride : 0, keep = multicast ? kCtaStride - 1 : ~u64{0};
      Cta *target, *holder;
      u32 to = shared_offset(warp, (destination & keep) + window, box.bytes, 128, &target, lane);
      u32 barrier = shared_offset(warp, (signal & keep) + window, 8, 8, &holder, lane);
      u64 epoch = begin_copy(warp, *holder, barrier, lane);
      u32 phase = Epoch::step(epoch) - 1;
      touch_rows(warp, box, {&known, epoch, warp.pc, false, true, false}, lane, false);
      world.touch_remote(warp, *target);
      target->shadow->access(to, box.bytes, {&known, epoch, warp.pc, true, true, false});
      world.copies++;
      World* w = &world;
      world.later(*warp.cta->cluster, [w, holder, target, box, to, barrier, phase] {
        gather(box, target->shared.data(), to);
        end_copy(*w, *holder, barrier, phase, box.bytes);
      });
      if (!multicast) break;
    }
  }
  return Step::kYield;
}

Step store(Warp& warp, const Op& op) {
  World& world = *warp.world;
  const Clock& known = warp.view();
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    int lane = first_lane(lanes);
    Box box = find_box(warp, op, lane);
    u64 source = warp.value(op.a, lane, op.aux & 1) + static_cast<i64>(static_cast<i32>(op.c));
    Cta* holder;
    u32 from = shared_offset(warp, source, box.bytes, 128, &holder, lane);
    Reduce reduce = nullptr;
    if (op.f != kNone) {
      const char* names[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
      const std::string& type = box.map->type;
      reduce = find_reduce(names[op.f], type == "bfloat16" ? "bf16" : type == "float16" ? "f16" : "f32");
      if (!reduce) fail("unsupported", std::string("tensor reduction ") + names[op.f] + " of " + type, lane);
    }
    BulkEpochs epochs = begin_bulk(warp, lane);
    world.touch_shared(warp, source, box.bytes, {&known, epochs.read, warp.pc, false, true, false}, lane);
    touch_rows(warp, box, {&known, epochs.write, warp.pc, true, true, reduce != nullptr}, lane,
               reduce != nullptr);
    auto data = std::make_shared<std::vector<u8>>(box.bytes);
    run_bulk(
        warp, lane, epochs.group,
        [data, holder, from, box] {
          for (u64 i = 0; i < box.bytes; i += 16) {
            std::memcpy(&(*data)[i], &holder->shared[swizzled(from + i, box.map->swizzle)], 16);
          }
        },
        [data, box, reduce] {
          for_rows(box, [&](u64 row, u64 address, u64 bytes, u64 skip) {
            const u8* line = &(*data)[row * box.inner_bytes + skip];
            u8* to = reinterpret_cast<u8*>(address);
            if (!reduce) {
              std::memcpy(to, line, bytes);
              return;
            }
            u64 element = static_cast<u64>(box.map->element_bytes);
            for (u64 i = 0; i < bytes; i += element) reduce(to + i, line + i);
          });
        });
  }
  return Step::kYield;
}

Step nothing(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    u64 address = warp.value(op.list[0], first_lane(lanes), true) + op.imm;
    if (!warp.world->maps.count(address)) {
      fail("out-of-bounds", "no tensor map at " + hex(address), first_lane(lanes));
    }
  }
  return Step::kNext;
}

void bind_map_operand(const Arg& arg, Decoder& decoder, Op& op) {
  Op part;
  decoder.address(arg, part);
  if (!part.aux2) fail("unsupported", "tensor map address narrower than 64 bits");
  op.list.push_back(part.a);
  op.imm = part.imm;
  for (size_t i = 1; i < arg.list.size(); i++) op.list.push_back(decoder.use(arg.list[i], 4));
}

}  // namespace

bool decode_tensor(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& text = inst.text;
  if (text.starts_with("prefetch") && inst.has("tensormap")) {
    bind_map_operand(inst.args.at(0), decoder, op);
    op.fn = nothing;
    return true;
  }
  bool reduce = text.starts_with("cp.reduce.async.bulk.tensor.");
  if (!reduce && !text.starts_with("cp.async.bulk.tensor.")) return false;
  for (const std::string& part : inst.parts) {
    if (part.starts_with("im2col") || part.starts_with("tile::")) return false;
  }
  const std::string& to = inst.parts.at(reduce ? 6 : 5);
  Op part;
  if (to == "global") {
    bind_map_operand(inst.args.at(0), decoder, op);
    decoder.address(inst.args.at(1), part);
    op.a = part.a;
    op.aux = part.aux2;
    op.c = static_cast<u32>(part.imm);
    op.f = kNone;
    const char* names[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
    for (u32 i = 0; reduce && i < 8; i++) {
      if (inst.has(names[i])) op.f = i;
    }
    if (reduce && op.f == kNone) return false;
    op.fn = store;
    return true;
  }
  if (reduce || !to.starts_with("shared")) return false;
  decoder.address(inst.args.at(0), part);
  op.a = part.a;
  op.c = static_cast<u32>(part.imm);
  op.aux = part.aux2;
  bind_map_operand(inst.args.at(1), decoder, op);
  decoder.address(inst.args.at(2), part);
  op.b = part.a;
  op.f = static_cast<u32>(part.imm);
  op.aux |= part.aux2 << 1;
  if (inst.has("multicast::cluster")) {
    op.aux |= 4;
    op.d = decoder.use(inst.args.at(3), 4);
  }
  op.fn = load;
  return true;
}

}  // namespace sim
