// The grid while it runs: warps and their lane groups, CTAs, clusters, global memory, operations under way.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <optional>

#include "mbarrier_state.h"
#include "program.h"
#include "shadow.h"

namespace sim {

struct Cta;
struct Cluster;
struct World;

// Where lanes that went apart meet again: the immediate post-dominator of the branch.
struct Join {
  u32 pc, expected, arrived;
  std::shared_ptr<Join> outer;
};

// Lanes of a warp at the same instruction.
struct Group {
  u32 pc = 0, mask = 0;
  std::shared_ptr<Join> join;
  bool blocked = false;
  u64 blocked_at = 0;  // World::events when it blocked
  u32 sync_mask = 0;   // waits for these lanes of the warp at this instruction
  u64 ticket = 0;      // barrier generation it waits for + 1
  const Mbarrier* waits_on = nullptr;
  bool timed_out = false;
};

struct BulkGroup {
  u32 reads = 0, writes = 0;  // operations not yet done
};

// Bulk groups of one thread (PTX ISA 9.7.9.27.2 "bulk async-groups").
struct BulkQueue {
  u32 read_agent, write_agent;
  u32 committed = 0;                // groups
  std::map<u32, BulkGroup> groups;  // unfinished, by number from 1
  u32 waited_read = 0, waited = 0;
  u32 open_operations = 0;
};

// cp.async groups of one warp: lanes in step.
struct CopyQueue {
  u32 agent = kNone, committed = 0, waited = 0, issued_open = 0;
  std::map<u32, u32> unfinished;  // group -> operations
};

struct WgmmaGroupRegisters {
  u32 group;
  std::vector<u32> accumulators, fragments;
};

struct Warp {
  Cta* cta = nullptr;
  World* world = nullptr;
  int index = 0;                   // in the CTA
  u32 agent = 0;                   // of what several lanes do together
  std::map<int, u32> lane_agents;  // of what a lane did alone
  Clock clock;
  u32 synced = 0;  // step of its agents up to which every lane knows what the others did

  u8* file = nullptr;
  u32* init = nullptr;   // per slot: lanes that hold a defined value
  u32* preds = nullptr;  // per predicate: lanes
  u32* pred_init = nullptr;
  std::unique_ptr<u8[]> storage;
  std::vector<u8> local;  // 32 lanes x local bytes
  std::vector<u8> local_init;

  std::list<Group> groups;
  Group* group = nullptr;  // the one that runs
  u32 pc = 0, exec = 0;    // of the instruction that runs
  u32 alive = 0;           // lanes that have not exited
  u64 steps = 0;

  u32 wrote_shared = 0, wrote_global = 0;  // lanes with ordinary writes that no proxy fence followed
  u32 initialised_barriers = 0;            // lanes
  std::optional<Clock>
      at_fence;  // what the last fence of memory ordered: relaxed writes after it publish this
  std::optional<Clock>
      observed;  // published by others, seen through relaxed reads; the next fence takes it over

  std::map<int, BulkQueue> bulk;  // per lane
  CopyQueue copies;
  u32 registers = 0;  // per thread, by setmaxnreg

  // wgmma
  bool wgmma_fenced = false;
  u32 wgmma_committed = 0, wgmma_issued = 0, wgmma_open = 0, wgmma_waited = 0;
  u64 fence_stamp = 0, commit_stamp = 0;
  // Per slot that wgmma uses: when an ordinary instruction last touched it, when a mov last wrote it.
  std::vector<u64> stamp, move_stamp;
  std::vector<u16> busy_accumulator, busy_fragment;
  std::vector<WgmmaGroupRegisters> in_flight;

  template <class T>
  T* reg(u32 slot) {
    return reinterpret_cast<T*>(file + u64{slot} * 128);
  }
  // Value of an operand that must be defined: an address, a size, a mask.
  u64 value(u32 slot, int lane, bool wide);
  u32 value32(u32 slot, int lane) { return static_cast<u32>(value(slot, lane, false)); }
  // The same in all executing lanes.
  u32 uniform(u32 slot, const char* what);
  void defined(u32 slot) { init[slot] |= exec; }
  void set_pred(u32 index, u32 lanes) {
    preds[index] = (preds[index] & ~exec) | (lanes & exec);
    pred_init[index] |= exec;
  }
  void advance_clock();
  void sync_lanes();
  u32 acting_agent();
  // What the executing lanes know: of other lanes' work since the last bar.warp.sync, a lane alone knows
  // nothing.
  const Clock& view();
  u64 epoch() { return Epoch::make(cluster_id, acting_agent(), step); }
  u32 cluster_id = 0;
  Clock lane_view;
  u32 step = 1;
  Access access(bool write, bool atomic = false) { return {&clock, epoch(), pc, write, false, atomic}; }
};

struct NamedBarrier {
  u32 expected = 0, arrived = 0;  // threads
  u64 generation = 0;
  Clock arriving, completed;
  u32 reduction_or = 0, reduction_and = 1, reduction_count = 0, result_or = 0, result_and = 0,
      result_count = 0;
};

// One wgmma.mma_async of a warpgroup: it exists once its four warps have issued it.
struct WgmmaOp {
  u32 pc = 0, group = 0, issued = 0;  // warps that issued it
  u64 a = 0, b = 0;
  bool accumulate = false;
  Clock clocks[4];
};

struct Warpgroup {
  u32 agents[4] = {kNone, kNone, kNone, kNone};     // of each warp's part of the products
  std::map<u32, std::shared_ptr<WgmmaOp>> forming;  // by issue number
  std::map<u32, u32> unfinished;                    // commit group -> products not done
  u32 launched = 0, finished = 0;                   // products, in order
};

struct Cta {
  World* world = nullptr;
  Cluster* cluster = nullptr;
  u32 id[3] = {}, linear = 0, rank = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<u8> shared;
  std::unique_ptr<Shadow> shadow;
  std::map<u32, Mbarrier> mbarriers;
  u32 mbarriers_from = kNone, mbarriers_to = 0;  // bounds of their bytes
  NamedBarrier barriers[16];
  std::vector<Warpgroup> warpgroups;
  u32 running = 0;  // warps not exited
  u32 register_pool = 0;
  Clock exit_clock;
  std::map<u32, u32> remote;  // agent -> last step of traffic from other CTAs
  std::map<u32, u32> remote_pc;
};

// CTAs that share a happens-before domain: agents are numbered within it.
struct Cluster {
  World* world = nullptr;
  u32 id = 0;
  u32 position[3] = {};
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::pair<AgentKind, u32>> agents;  // kind, owner: warp as rank << 8 | index
  NamedBarrier barrier;
  std::unordered_map<u32, u64> arrived_lanes;  // agent * 32 + lane -> generation of barrier it arrived at
  u32 pending = 0;                             // asynchronous operations of its CTAs
  u32 add_agent(AgentKind kind, u32 owner);
};

struct TensorMap {
  u64 address = 0;
  int element_bytes = 2;
  std::string type;
  std::vector<i64> extents, strides, box;
  int swizzle = 0;
};

struct Region {
  u64 base, bytes;
  bool writable, constant;
  int index;  // in the caller's list; -1: of the module
  std::unique_ptr<Shadow> shadow;
};

// Something that will happen at a time the adversary chooses, once `ready` (in-order queues) allows.
struct Pending {
  std::function<void()> act;
  std::function<bool()> ready;
  Cluster* cluster;
};

struct Launch {
  std::string kernel;
  u32 grid[3], block[3], cluster[3];
  u32 shared_bytes = 0;
  std::vector<u8> params;
  std::vector<TensorMap> maps;
  u64 seed = 0, max_steps = 0;
  u32 resident = 4;
};

struct World {
  World(const Module& module, const Launch& launch);
  ~World();
  void add_region(u64 base, u64 bytes, bool writable, bool initialised, int index);
  void run();

  Launch launch;
  Module module;
  Program program;
  Random random;
  std::vector<Region> regions;
  std::map<u64, const TensorMap*> maps;  // by the address of their parameter slot
  std::vector<u8> param_storage;
  u8* params = nullptr;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Pending> pending;
  std::unordered_map<u64, std::map<u32, Clock>>
      locations;  // address -> cluster -> what its releases published
  ReadSets read_sets;
  u64 events = 1, progress = 0, steps = 0, barrier_phases = 0, copies = 0, products = 0;
  u32 max_shared = 0, elect_choice = 0;
  std::vector<u64> counts;  // per instruction
  u32 threads = 0, warps_per_cta = 0, cluster_size = 1;

  // Global memory
  Region& global(u64 address, u64 bytes, bool write, int lane);
  // Checks and records an access; the bytes.
  u8* touch_global(u64 address, u64 bytes, const Access& access, int lane);
  u8* touch_shared(Warp& warp, u64 address, u64 bytes, const Access& access, int lane);
  // The CTA whose shared memory an address of the shared window means; `offset` inside it.
  Cta& owner(Warp& warp, u64 address, u64 bytes, u32& offset, int lane);

  void event() {
    events++;
    progress++;
  }
  void later(Cluster& cluster, std::function<void()> act, std::function<bool()> ready = {});
  AgentKind agent_kind(u64 epoch) const;
  std::string describe(u64 epoch, u32 pc) const;
  std::string place(u32 pc) const;
  void reach_join(Warp& warp);
  void exit_lanes(Warp& warp, u32 lanes);
  void exit_warp(Warp& warp);
  void touch_remote(Warp& warp, Cta& target);

 private:
  void bind();
  void start_cluster(u32 id);
  void start_warp(Warp& warp);
  void finish(Cluster& cluster);
  void run_slice(Warp& warp, Group& group);
  bool complete_some();
  Cluster* find_cluster(u32 id) const;
  [[noreturn]] void deadlock();
  void check_wgmma_registers(Warp& warp, u32 index);
  u32 next_cluster_ = 0, total_clusters_ = 0;
  const Warp* current_ = nullptr;
};

// Generic addresses (PTX ISA 5.1.7, 9.7.9.1): global memory is host memory; the shared window of a cluster
// holds its CTAs 16 MiB apart, with the executing CTA's own at the start; local memory likewise.
constexpr u64 kSharedWindow = u64{0x7e00} << 40, kLocalWindow = u64{0x7d00} << 40,
              kWindowBytes = u64{1} << 32;
constexpr u32 kCtaStride = 1u << 24;

// The same check for groups that must hold all of `lanes`: true if they are here, else the group waits.
bool converged(Warp& warp, u32 lanes);
// Synchronisation through memory (PTX ISA 8.8 to 8.10): strong writes publish, strong reads learn, directly
// or by a fence.
void publish(Warp& warp, u64 key, bool release);
void observe(Warp& warp, u64 key, bool acquire);
void memory_fence(Warp& warp);
// Arrivals and bytes on an mbarrier; `where` is the CTA that holds it.
Mbarrier& find_mbarrier(Cta& cta, u32 offset, int lane);
void arrive(World& world, Mbarrier& barrier, u32 count, int lane);
void complete_phase_if_done(World& world, Mbarrier& barrier);
// An asynchronous copy towards an mbarrier: checks its initialisation, returns the epoch of what it writes.
u64 begin_copy(Warp& warp, Cta& cta, u32 offset, int lane);
void end_copy(World& world, Cta& cta, u32 offset, u32 phase, u64 bytes);
// The bulk groups of a lane, and an operation that joins the open one: the epochs of its reads and its
// writes.
BulkQueue& bulk_queue(Warp& warp, int lane);
struct BulkEpochs {
  u64 read, write;
  u32 group;
};
BulkEpochs begin_bulk(Warp& warp, int lane);
// Two moments: `read` takes the source, `write` changes the destination.
void run_bulk(Warp& warp, int lane, u32 group, std::function<void()> read, std::function<void()> write);
// One value of a reduction on global memory: into op= from. False if the type or operation is not known.
using Reduce = void (*)(u8* into, const u8* from);
Reduce find_reduce(const std::string& operation, const std::string& type);
void check_multicast(const World& world, u32 mask, int lane);
u32 shared_offset(Warp& warp, u64 address, u64 bytes, u64 alignment, Cta** cta, int lane);

}  // namespace sim
