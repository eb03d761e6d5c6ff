// Setting up a launch: addresses, register files, special registers, memory regions.
#include "world.h"

#include <algorithm>

namespace sim {

namespace {

u64 align_up(u64 value, u64 to) { return (value + to - 1) / to * to; }

u64 special_value(const Warp& warp, Special special, u32 lane) {
  const Cta& cta = *warp.cta;
  const Launch& launch = warp.world->launch;
  u32 thread = static_cast<u32>(warp.index) * kLanes + lane;
  auto axis = [special](Special first) { return static_cast<int>(special) - static_cast<int>(first); };
  switch (special) {
    case Special::kTidX:
      return thread % launch.block[0];
    case Special::kTidY:
      return thread / launch.block[0] % launch.block[1];
    case Special::kTidZ:
      return thread / launch.block[0] / launch.block[1];
    case Special::kNtidX:
    case Special::kNtidY:
    case Special::kNtidZ:
      return launch.block[axis(Special::kNtidX)];
    case Special::kCtaidX:
    case Special::kCtaidY:
    case Special::kCtaidZ:
      return cta.id[axis(Special::kCtaidX)];
    case Special::kNctaidX:
    case Special::kNctaidY:
    case Special::kNctaidZ:
      return launch.grid[axis(Special::kNctaidX)];
    case Special::kLane:
      return lane;
    case Special::kWarp:
      return static_cast<u64>(warp.index);
    case Special::kNwarp:
      return warp.world->warps_per_cta;
    case Special::kSm:
      return cta.cluster->id % 132;
    case Special::kNsm:
      return 132;
    case Special::kDynamicShared:
      return launch.shared_bytes;
    case Special::kTotalShared:
    case Special::kAggregateShared:
      return cta.shared.size();
    case Special::kClusterX:
    case Special::kClusterY:
    case Special::kClusterZ:
      return cta.cluster->position[axis(Special::kClusterX)];
    case Special::kNclusterX:
    case Special::kNclusterY:
    case Special::kNclusterZ: {
      int i = axis(Special::kNclusterX);
      return launch.grid[i] / launch.cluster[i];
    }
    case Special::kClusterCtaX:
    case Special::kClusterCtaY:
    case Special::kClusterCtaZ: {
      int i = axis(Special::kClusterCtaX);
      return cta.id[i] % launch.cluster[i];
    }
    case Special::kClusterNctaX:
    case Special::kClusterNctaY:
    case Special::kClusterNctaZ:
      return launch.cluster[axis(Special::kClusterNctaX)];
    case Special::kClusterRank:
      return cta.rank;
    case Special::kClusterCount:
      return warp.world->cluster_size;
    case Special::kExplicitCluster:
      return warp.world->cluster_size > 1;
    case Special::kLaneEq:
      return 1u << lane;
    case Special::kLaneLt:
      return (1u << lane) - 1;
    case Special::kLaneLe:
      return (2ull << lane) - 1;
    case Special::kLaneGt:
      return static_cast<u32>(~((2ull << lane) - 1));
    case Special::kLaneGe:
      return static_cast<u32>(~((1ull << lane) - 1));
    case Special::kGrid:
      return 0;
  }
  return 0;
}

}  // namespace

u32 Cluster::add_agent(AgentKind kind, u32 owner) {
  agents.emplace_back(kind, owner);
  if (agents.size() >> Epoch::kAgentBits) fail("unsupported", "too many asynchronous agents in a cluster");
  return static_cast<u32>(agents.size()) - 1;
}

World::World(const Module& source, const Launch& given) : launch(given), module(source), random(given.seed) {
  threads = launch.block[0] * launch.block[1] * launch.block[2];
  cluster_size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  if (threads == 0 || threads > 1024) {
    fail("limit", "block of " + std::to_string(threads) + " threads, at most 1024");
  }
  for (int i = 0; i < 3; i++) {
    if (launch.cluster[i] == 0 || launch.grid[i] == 0 || launch.grid[i] % launch.cluster[i]) {
      fail("limit", "grid of " + std::to_string(launch.grid[i]) + " in dimension " + std::to_string(i) +
                        " is not a positive multiple of the cluster's " + std::to_string(launch.cluster[i]));
    }
  }
  if (cluster_size > 8) fail("limit", "cluster of " + std::to_string(cluster_size) + " CTAs, at most 8");
  warps_per_cta = (threads + kLanes - 1) / kLanes;
  total_clusters_ = launch.grid[0] * launch.grid[1] * launch.grid[2] / cluster_size;
  if (total_clusters_ >> Epoch::kClusterBits) fail("limit", "grid of more than 4 million clusters");
  elect_choice = launch.seed ? random.below(kLanes) : 0;
  bind();
}

World::~World() = default;

// Addresses of parameters and variables, then the decoded program.
void World::bind() {
  auto found = module.entries.find(launch.kernel);
  if (found == module.entries.end()) fail("unsupported", "no entry " + launch.kernel + " in the PTX");
  const Entry& entry = found->second;
  if (entry.max_threads && threads > entry.max_threads) {
    fail("limit", "block of " + std::to_string(threads) + " threads, __launch_bounds__ says " +
                      std::to_string(entry.max_threads));
  }
  program.entry = &entry;
  // Parameters: [maps,] params, as the brief of the launch plan lays down.
  u64 offset = 0, alignment = 128;
  std::vector<u64> offsets;
  for (const Variable& param : entry.params) {
    offset = align_up(offset, std::max<u64>(param.align, 1));
    offsets.push_back(offset);
    offset += param.size;
  }
  param_storage.assign(offset + alignment, 0);
  params = param_storage.data() +
           (alignment - reinterpret_cast<u64>(param_storage.data()) % alignment) % alignment;
  program.param_address = reinterpret_cast<u64>(params);
  size_t expected = launch.maps.empty() ? 0 : 1;
  if (!launch.params.empty()) expected++;
  if (entry.params.size() != expected) {
    fail("unsupported", "entry has " + std::to_string(entry.params.size()) + " parameters, the plan gives " +
                            std::to_string(expected));
  }
  if (!launch.maps.empty()) {
    if (entry.params[0].size != 128 * launch.maps.size()) {
      fail("unsupported", "the plan has " + std::to_string(launch.maps.size()) +
                              " maps, the entry's first parameter " + std::to_string(entry.params[0].size) +
                              " bytes");
    }
    for (size_t i = 0; i < launch.maps.size(); i++) {
      maps[program.param_address + offsets[0] + 128 * i] = &launch.maps[i];
    }
  }
  if (!launch.params.empty()) {
    if (entry.params.back().size != launch.params.size()) {
      fail("unsupported", "params of " + std::to_string(launch.params.size()) + " bytes, the entry takes " +
                              std::to_string(entry.params.back().size));
    }
    std::memcpy(params + offsets.back(), launch.params.data(), launch.params.size());
  }
  for (size_t i = 0; i < entry.params.size(); i++) {
    program.symbols[entry.param_names[i]] = program.param_address + offsets[i];
  }
  // Shared memory starts at 1024: the system keeps the first KiB of a CTA's window.
  u64 shared = 1024, local = 0, dynamic_align = 16;
  program.shared_start = 1024;
  auto place = [this, &shared, &local, &dynamic_align](const std::string& name, Variable& variable) {
    if (variable.space == "shared" && variable.external) {
      dynamic_align = std::max(dynamic_align, variable.align);
    } else if (variable.space == "shared") {
      shared = align_up(shared, variable.align);
      program.symbols[name] = shared;
      shared += variable.size;
    } else if (variable.space == "local") {
      local = align_up(local, variable.align);
      program.symbols[name] = local;
      local += variable.size;
    } else {
      variable.init.resize(std::max<u64>(variable.size, 1) + 64);
      u64 address = align_up(reinterpret_cast<u64>(variable.init.data()), std::min<u64>(variable.align, 64));
      std::vector<u8> content(variable.init.begin(),
                              variable.init.begin() + static_cast<long>(variable.size));
      std::memcpy(reinterpret_cast<void*>(address), content.data(), content.size());
      program.symbols[name] = address;
      add_region(address, variable.size, variable.space == "global", true, -1);
    }
  };
  std::map<std::string, Variable> locals = entry.variables;
  for (auto& [name, variable] : module.variables) place(name, variable);
  for (auto& [name, variable] : locals) place(name, variable);
  program.static_shared = static_cast<u32>(shared - 1024);
  shared = align_up(shared, dynamic_align);
  for (auto& [name, variable] : module.variables) {
    if (variable.space == "shared" && variable.external) program.symbols[name] = shared;
  }
  max_shared = static_cast<u32>(shared + launch.shared_bytes);
  if (max_shared - 1024 > 227 * 1024) {
    fail("limit", "shared memory of " + std::to_string(max_shared - 1024) + " bytes, at most 232448 a CTA");
  }
  program.dynamic_shared = launch.shared_bytes;
  program.local_bytes = static_cast<u32>(align_up(local, 16));
  Decoder(program, module).run();
  counts.assign(program.ops.size(), 0);
}

void World::add_region(u64 base, u64 bytes, bool writable, bool initialised, int index) {
  if (bytes == 0) return;
  for (const Region& other : regions) {
    if (base < other.base + other.bytes && other.base < base + bytes && (writable || other.writable)) {
      fail("unsupported",
           "memory entries " + std::to_string(other.index) + " and " + std::to_string(index) + " overlap");
    }
  }
  Region region{base, bytes, writable, index < 0, index, nullptr};
  region.shadow = std::make_unique<Shadow>(*this, base, bytes, index, initialised, writable);
  auto at = std::upper_bound(regions.begin(), regions.end(), base,
                             [](u64 a, const Region& r) { return a < r.base; });
  regions.insert(at, std::move(region));
}

void World::start_warp(Warp& warp) {
  size_t bytes = u64{program.slots} * 128, masks = program.slots + 2 * program.preds;
  warp.storage = std::make_unique<u8[]>(bytes + 64 + 4 * masks);
  warp.file = warp.storage.get() + (64 - reinterpret_cast<u64>(warp.storage.get()) % 64) % 64;
  warp.init = reinterpret_cast<u32*>(warp.file + bytes);
  warp.preds = warp.init + program.slots;
  warp.pred_init = warp.preds + program.preds;
  auto fill = [&warp](u32 slot, bool wide, auto value) {
    warp.init[slot] = kAllLanes;
    for (u32 lane = 0; lane < kLanes; lane++) {
      if (wide) {
        warp.reg<u64>(slot)[lane] = value(lane);
      } else {
        warp.reg<u32>(slot)[lane] = static_cast<u32>(value(lane));
      }
    }
  };
  for (const Constant& constant : program.constants) {
    fill(constant.slot, constant.wide, [&constant](u32) { return constant.value; });
  }
  for (const SpecialSlot& special : program.specials) {
    fill(special.slot, special.wide,
         [&warp, &special](u32 lane) { return special_value(warp, special.special, lane); });
  }
  u32 first = static_cast<u32>(warp.index) * kLanes;
  u32 lanes = std::min<u32>(kLanes, threads - first);
  warp.alive = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  warp.groups.push_back(Group{});
  warp.groups.back().mask = warp.alive;
  warp.local.assign(u64{program.local_bytes} * kLanes, 0);
  warp.local_init.assign(warp.local.size(), 0);
  warp.stamp.assign(program.slots, 0);
  warp.move_stamp.assign(program.slots, 0);
  warp.busy_accumulator.assign(program.slots, 0);
  warp.busy_fragment.assign(program.slots, 0);
  warp.cluster_id = warp.cta->cluster->id;
  warp.clock.learn(warp.agent, warp.step);
  u32 limit = program.entry->max_registers;
  if (!limit) {  // what ptxas would grant: an equal share of 64K registers, in steps of 8
    u32 bound = program.entry->max_threads ? program.entry->max_threads : threads;
    limit = std::min<u32>(65536 / std::max<u32>(align_up(bound, 128), 128) / 8 * 8, 255);
    if (limit == 255) limit = 256;
  }
  warp.registers = limit;
}

void World::start_cluster(u32 id) {
  auto cluster = std::make_unique<Cluster>();
  cluster->world = this;
  cluster->id = id;
  u32 shape[3];
  for (int i = 0; i < 3; i++) shape[i] = launch.grid[i] / launch.cluster[i];
  cluster->position[0] = id % shape[0];
  cluster->position[1] = id / shape[0] % shape[1];
  cluster->position[2] = id / shape[0] / shape[1];
  cluster->barrier.expected = cluster_size * threads;
  for (u32 rank = 0; rank < cluster_size; rank++) {
    auto cta = std::make_unique<Cta>();
    cta->world = this;
    cta->cluster = cluster.get();
    cta->rank = rank;
    u32 inside[3] = {rank % launch.cluster[0], rank / launch.cluster[0] % launch.cluster[1],
                     rank / launch.cluster[0] / launch.cluster[1]};
    for (int i = 0; i < 3; i++) cta->id[i] = cluster->position[i] * launch.cluster[i] + inside[i];
    cta->linear = (cta->id[2] * launch.grid[1] + cta->id[1]) * launch.grid[0] + cta->id[0];
    cta->shared.assign(max_shared, 0xa5);  // what nobody wrote is not zero
    cta->shadow = std::make_unique<Shadow>(*this, 0, max_shared, Shadow::kShared, false, true);
    cta->warpgroups.resize((warps_per_cta + 3) / 4);
    cta->running = warps_per_cta;
    for (u32 w = 0; w < warps_per_cta; w++) {
      auto warp = std::make_unique<Warp>();
      warp->cta = cta.get();
      warp->world = this;
      warp->index = static_cast<int>(w);
      warp->agent = cluster->add_agent(AgentKind::kWarp, rank << 8 | w);
      start_warp(*warp);
      cta->warps.push_back(std::move(warp));
    }
    cluster->ctas.push_back(std::move(cta));
  }
  resident.push_back(std::move(cluster));
}

}  // namespace sim
