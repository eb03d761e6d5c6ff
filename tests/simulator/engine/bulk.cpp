// PTX ISA 9.7.9.25 "Data Movement and Conversion Instructions: Asynchronous copy", the bulk forms, and their
// groups.
#include "half_type.h"
#include "world.h"

namespace sim {

namespace {

enum class Direction : u32 { kGlobalToShared, kSharedToShared, kSharedToGlobal };

template <class T, class F>
void apply(u8* into, const u8* from, F function) {
  T a, b;
  std::memcpy(&a, into, sizeof a);
  std::memcpy(&b, from, sizeof b);
  a = function(a, b);
  std::memcpy(into, &a, sizeof a);
}

template <class T>
Reduce reduce_integer(const std::string& name) {
  if (name == "add") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return static_cast<T>(x + y); }); };
  }
  if (name == "min") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return std::min(x, y); }); };
  }
  if (name == "max") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return std::max(x, y); }); };
  }
  if (name == "and") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return static_cast<T>(x & y); }); };
  }
  if (name == "or") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return static_cast<T>(x | y); }); };
  }
  if (name == "xor") {
    return [](u8* a, const u8* b) { apply<T>(a, b, [](T x, T y) { return static_cast<T>(x ^ y); }); };
  }
  if (name == "inc") {
    return [](u8* a, const u8* b) {
      apply<T>(a, b, [](T x, T y) { return x >= y ? T{0} : static_cast<T>(x + 1); });
    };
  }
  if (name == "dec") {
    return [](u8* a, const u8* b) {
      apply<T>(a, b, [](T x, T y) { return x == 0 || x > y ? y : static_cast<T>(x - 1); });
    };
  }
  return nullptr;
}

template <class H>
Reduce reduce_half(const std::string& name) {
  if (name == "add") {
    return [](u8* a, const u8* b) {
      apply<u16>(a, b, [](u16 x, u16 y) { return H::narrow_to(add_to_odd(H::widen(x), H::widen(y))); });
    };
  }
  if (name == "min") {
    return [](u8* a, const u8* b) {
      apply<u16>(a, b, [](u16 x, u16 y) { return H::widen(y) < H::widen(x) ? y : x; });
    };
  }
  if (name == "max") {
    return [](u8* a, const u8* b) {
      apply<u16>(a, b, [](u16 x, u16 y) { return H::widen(y) > H::widen(x) ? y : x; });
    };
  }
  return nullptr;
}

u64 read_address(Warp& warp, u32 slot, bool wide, u64 offset, int lane) {
  return warp.value(slot, lane, wide) + offset;
}

// Operands after the three places: op.list = {destination, source, barrier or kNone, size, multicast mask or
// kNone}; op.list2: for each, 1 where the register is 64 bits wide; then the offsets of the three places.
struct Operands {
  u64 destination, source, barrier;
  u32 size, mask;
};

Operands read_operands(Warp& warp, const Op& op, int lane) {
  Operands result{};
  auto offset = [&op](int i) {
    return static_cast<u64>(static_cast<i64>(static_cast<i32>(op.list2[5 + static_cast<size_t>(i)])));
  };
  result.destination = read_address(warp, op.list[0], op.list2[0], offset(0), lane);
  result.source = read_address(warp, op.list[1], op.list2[1], offset(1), lane);
  if (op.list[2] != kNone) result.barrier = read_address(warp, op.list[2], op.list2[2], offset(2), lane);
  result.size = warp.value32(op.list[3], lane);
  if (op.list[4] != kNone) result.mask = warp.value32(op.list[4], lane) & 0xffff;
  if (result.size == 0 || result.size % 16) {
    fail("misaligned", "bulk copy of " + std::to_string(result.size) + " bytes, expected a multiple of 16",
         lane);
  }
  return result;
}

void check_global(u64 address, int lane) {
  if (address % 16) {
    fail("misaligned", "bulk copy: global address " + hex(address) + ", expected a multiple of 16", lane);
  }
}

void load_one(Warp& warp, const Op& op, int lane) {
  World& world = *warp.world;
  Operands operands = read_operands(warp, op, lane);
  const Clock& known = warp.view();
  bool multicast = op.list[4] != kNone;
  if (multicast) check_multicast(world, operands.mask, lane);
  Direction direction = static_cast<Direction>(op.aux);
  u32 bytes = operands.size;
  for (u32 rank = 0; rank < world.cluster_size; rank++) {
    if (multicast && !(operands.mask >> rank & 1)) continue;
    u64 window = multicast ? u64{rank + 1} * kCtaStride : 0, mask = multicast ? kCtaStride - 1 : ~u64{0};
    Cta *target, *holder;
    u32 to = shared_offset(warp, (operands.destination & mask) + window, bytes, 16, &target, lane);
    u32 barrier = shared_offset(warp, (operands.barrier & mask) + window, 8, 8, &holder, lane);
    if (target != holder) fail("barrier", "bulk copy: destination and mbarrier are in different CTAs", lane);
    u64 epoch = begin_copy(warp, *holder, barrier, lane);
    u32 phase = Epoch::step(epoch) - 1;
    Access write{&known, epoch, warp.pc, true, true, false}, read = write;
    read.write = false;
    const u8* from;
    if (direction == Direction::kGlobalToShared) {
      check_global(operands.source, lane);
      from = world.touch_global(operands.source, bytes, read, lane);
    } else {
      Cta* source;
      shared_offset(warp, operands.source, bytes, 16, &source, lane);
      from = world.touch_shared(warp, operands.source, bytes, read, lane);
    }
    world.touch_remote(warp, *target);
    target->shadow->access(to, bytes, write);
    world.copies++;
    World* w = &world;
    world.later(*warp.cta->cluster, [w, holder, target, from, to, barrier, phase, bytes] {
      std::memcpy(&target->shared[to], from, bytes);
      end_copy(*w, *holder, barrier, phase, bytes);
    });
    if (!multicast) break;
  }
}

void store_one(Warp& warp, const Op& op, int lane) {
  World& world = *warp.world;
  Operands operands = read_operands(warp, op, lane);
  const Clock& known = warp.view();
  u32 bytes = operands.size, element = op.size;
  check_global(operands.destination, lane);
  Cta* source;
  u32 from = shared_offset(warp, operands.source, bytes, 16, &source, lane);
  BulkEpochs epochs = begin_bulk(warp, lane);
  Reduce reduce = bits_as<Reduce>(op.imm);
  Access read{&known, epochs.read, warp.pc, false, true, false};
  Access write{&known, epochs.write, warp.pc, true, true, reduce != nullptr};
  world.touch_shared(warp, operands.source, bytes, read, lane);
  if (reduce) {
    Region& region = world.global(operands.destination, bytes, true, lane);
    region.shadow->require_initialised(operands.destination, bytes, "reduction into");
  }
  u8* to = world.touch_global(operands.destination, bytes, write, lane);
  auto data = std::make_shared<std::vector<u8>>(bytes);
  run_bulk(
      warp, lane, epochs.group,
      [data, source, from, bytes] { std::memcpy(data->data(), &source->shared[from], bytes); },
      [data, to, bytes, element, reduce] {
        if (!reduce) {
          std::memcpy(to, data->data(), bytes);
          return;
        }
        for (u32 i = 0; i < bytes; i += element) reduce(to + i, data->data() + i);
      });
}

Step bulk_copy(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    if (static_cast<Direction>(op.aux) == Direction::kSharedToGlobal) {
      store_one(warp, op, first_lane(lanes));
    } else {
      load_one(warp, op, first_lane(lanes));
    }
  }
  return Step::kYield;
}

Step commit(Warp& warp, const Op&) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    BulkQueue& queue = bulk_queue(warp, first_lane(lanes));
    queue.committed++;
    queue.open_operations = 0;
  }
  return Step::kYield;
}

// aux: 1 for .read; imm: groups that may stay unfinished.
Step wait(Warp& warp, const Op& op) {
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    auto found = warp.bulk.find(first_lane(lanes));
    if (found == warp.bulk.end()) continue;
    for (auto& [number, group] : found->second.groups) {
      if (number + op.imm > found->second.committed) break;
      if (group.reads || (!op.aux && group.writes)) return Step::kBlock;
    }
  }
  for (u32 lanes = warp.exec; lanes; lanes &= lanes - 1) {
    auto found = warp.bulk.find(first_lane(lanes));
    if (found == warp.bulk.end() || found->second.committed < op.imm) continue;
    BulkQueue& queue = found->second;
    u32 done = queue.committed - static_cast<u32>(op.imm);
    queue.waited_read = std::max(queue.waited_read, done);
    warp.clock.learn(queue.read_agent, done);
    if (op.aux) continue;
    queue.waited = std::max(queue.waited, done);
    warp.clock.learn(queue.write_agent, done);
  }
  return Step::kYield;
}

Step nothing(Warp&, const Op&) { return Step::kNext; }

}  // namespace

Reduce find_reduce(const std::string& operation, const std::string& type) {
  if (type == "u32" || type == "b32") return reduce_integer<u32>(operation);
  if (type == "s32") return reduce_integer<i32>(operation);
  if (type == "u64" || type == "b64") return reduce_integer<u64>(operation);
  if (type == "s64") return reduce_integer<i64>(operation);
  if (type == "f16") return reduce_half<Half>(operation);
  if (type == "bf16") return reduce_half<Bfloat>(operation);
  if (operation != "add") return nullptr;
  if (type == "f32") {
    return [](u8* a, const u8* b) { apply<float>(a, b, [](float x, float y) { return x + y; }); };
  }
  if (type == "f64") {
    return [](u8* a, const u8* b) { apply<double>(a, b, [](double x, double y) { return x + y; }); };
  }
  return nullptr;
}

u32 shared_offset(Warp& warp, u64 address, u64 bytes, u64 alignment, Cta** cta, int lane) {
  u32 offset;
  *cta = &warp.world->owner(warp, address, bytes, offset, lane);
  if (offset % alignment) {
    fail("misaligned",
         "shared memory " + hex(offset) + ", expected a multiple of " + std::to_string(alignment), lane);
  }
  return offset;
}

void check_multicast(const World& world, u32 mask, int lane) {
  if (mask >> world.cluster_size) {
    fail("out-of-bounds",
         "multicast mask " + hex(mask) + " in a cluster of " + std::to_string(world.cluster_size) + " CTAs",
         lane);
  }
}

BulkQueue& bulk_queue(Warp& warp, int lane) {
  auto [found, inserted] = warp.bulk.try_emplace(lane);
  if (inserted) {
    u32 owner = warp.cta->rank << 8 | static_cast<u32>(warp.index);
    found->second.read_agent = warp.cta->cluster->add_agent(AgentKind::kBulkRead, owner);
    found->second.write_agent = warp.cta->cluster->add_agent(AgentKind::kBulkWrite, owner);
  }
  return found->second;
}

BulkEpochs begin_bulk(Warp& warp, int lane) {
  BulkQueue& queue = bulk_queue(warp, lane);
  u32 cluster = warp.cta->cluster->id, group = queue.committed + 1;
  queue.groups[group].reads++;
  queue.groups[group].writes++;
  queue.open_operations++;
  warp.world->copies++;
  return {Epoch::make(cluster, queue.read_agent, group), Epoch::make(cluster, queue.write_agent, group),
          group};
}

void run_bulk(Warp& warp, int lane, u32 group, std::function<void()> read, std::function<void()> write) {
  World* world = warp.world;
  Cluster* cluster = warp.cta->cluster;
  BulkQueue* queue = &bulk_queue(warp, lane);
  world->later(*cluster, [world, cluster, queue, group, read = std::move(read), write = std::move(write)] {
    read();
    queue->groups[group].reads--;
    world->later(*cluster, [queue, group, write] {
      write();
      if (--queue->groups[group].writes == 0 && queue->groups[group].reads == 0) queue->groups.erase(group);
    });
  });
}

bool decode_bulk(const Inst& inst, Decoder& decoder, Op& op) {
  const std::string& text = inst.text;
  if (text.starts_with("cp.async.bulk.commit_group")) {
    op.fn = commit;
    return true;
  }
  if (text.starts_with("cp.async.bulk.wait_group")) {
    op.aux = inst.has("read");
    op.imm = inst.args.at(0).value;
    op.fn = wait;
    return true;
  }
  if (text.starts_with("cp.async.bulk.prefetch")) {
    op.fn = nothing;
    return true;
  }
  bool reduce = text.starts_with("cp.reduce.async.bulk.");
  if ((!reduce && !text.starts_with("cp.async.bulk.")) || inst.has("tensor") || inst.has("cp_mask")) {
    return false;
  }
  const std::string &to = inst.parts.at(reduce ? 4 : 3), &from = inst.parts.at(reduce ? 5 : 4);
  Direction direction = to == "global"     ? Direction::kSharedToGlobal
                        : from == "global" ? Direction::kGlobalToShared
                                           : Direction::kSharedToShared;
  if (reduce) {
    if (direction != Direction::kSharedToGlobal) return false;
    const std::string& type = inst.type();
    const std::string& operation = inst.parts[inst.parts.size() - (inst.has("noftz") ? 3 : 2)];
    op.imm = bits_as<u64>(find_reduce(operation, type));
    op.size = static_cast<u8>(std::stoi(type.substr(type.find_first_of("0123456789"))) / 8);
    if (!op.imm) return false;
  }
  op.aux = static_cast<u32>(direction);
  Op part;
  std::vector<u32> wide, offsets;
  auto add = [&](const Arg& arg) {
    decoder.address(arg, part);
    op.list.push_back(part.a);
    wide.push_back(part.aux2);
    offsets.push_back(static_cast<u32>(part.imm));
  };
  add(inst.args.at(0));
  add(inst.args.at(1));
  bool load = direction != Direction::kSharedToGlobal;
  if (load) {
    add(inst.args.at(3));
  } else {
    op.list.push_back(kNone);
    wide.push_back(0);
    offsets.push_back(0);
  }
  op.list.push_back(decoder.use(inst.args.at(2), 4));
  op.list.push_back(inst.has("multicast::cluster") ? decoder.use(inst.args.at(4), 4) : kNone);
  wide.resize(5);
  op.list2 = wide;
  op.list2.insert(op.list2.end(), offsets.begin(), offsets.end());
  op.fn = bulk_copy;
  return true;
}

}  // namespace sim
