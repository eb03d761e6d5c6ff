// Makes the schedule of a fine kernel: for every task, its blocks' lists cut into stages of one or two blocks
// that the same consumers chose.
//
// A warp takes a task. It reads 32 entries of each list at a time, a lane each, and finds their members in
// the other lists. Pairs that several consumers chose come first, beside each a pair of the one that is left
// out, if it is one; then those of one alone, in turns. So no consumer waits long for its next. Of three
// consumers, stages of which each has one are marked as a round. A block without a partner waits for the next
// entries; at the end it goes to each of its lists alone, which pairs what it got.
#pragma once

#include "kernels/block_window.cuh"
#include "kernels/schedule_params.h"
#include "kernels/task.cuh"

namespace vsa {

// The stages of one task as a warp writes them, any lane any half.
struct StageWriter {
  const ScheduleParams& params;
  StagePlaces places;

  // Whatever a list says, nobody reads elsewhere.
  VSA_DEVICE int existing(int block) const {
    return min(uint32_t(block), uint32_t(params.listed_grid.num_cubes() - 1));
  }

  VSA_DEVICE void put(int stage, int half, int block, uint32_t members, uint32_t flags = 0) const {
    const CubeGrid& grid = params.listed_grid;
    block = existing(block);
    if (params.block_sizes && __ldg(params.block_sizes + block) < kCubeTokens) flags |= kStagePartial;
    if (!grid.is_full(grid.origin(block))) flags |= kStagePartial;
    Stage& place = params.schedule.stages[places.index(stage)];
    (half ? place.second : place.first) = uint32_t(block) | flags | (half ? 0 : members << kStageBlockBits);
  }

  VSA_DEVICE void put_alone(int stage, int block, uint32_t members) const {
    put(stage, 0, block, members);
    put(stage, 1, block, members, kStagePadded | kStagePartial);
  }
};

constexpr bool several(uint32_t set) { return (set & (set - 1)) != 0; }
constexpr int lowest(uint32_t set) { return set & 1 ? 0 : 1 + lowest(set >> 1); }

// The thin cubes that the sets of a task's lists have, each set's in rows of its own.
template <int kLists, int kBlocks>
struct ThinScheduler {
  static constexpr uint32_t kSets = 1u << kLists;

  const StageWriter& writer;
  const Task& task;
  int index;  // of the task
  int count[kSets] = {};
  uint32_t partial = 0;  // a bit for each set that has one with a slot that holds no token

  // Where the rows of a set begin.
  VSA_DEVICE int64_t first_row(uint32_t set) const {
    const Schedule& schedule = writer.params.schedule;
    const CubeGrid& grid = writer.params.grid;
    if (kLists != 2 || !schedule.offsets) {
      return (int64_t(index) * thin_sets(kLists) + set - 1) * schedule.set_thin_rows;
    }
    // The first list's, or the second's own; after the first one's own those of both.
    int row = task.block(grid, set == 2 ? 1 : 0);
    const int32_t* offsets = schedule.offsets + task.head_row * (grid.num_cubes() + int64_t(1)) + row;
    int offset = __ldg(offsets);
    int64_t first = task.head_row * schedule.head_thin_rows + first_thin_row(offset, row);
    return first + (set == 3 ? most_thin_rows(__ldg(offsets + 1) - offset) : 0);
  }
  VSA_DEVICE void put(uint32_t set, int number, uint32_t word, uint32_t valid) const {
    ThinRow& row = writer.params.schedule.thin[first_row(set) + number / kThinCubes];
    row.cubes[number % kThinCubes] = word;
    row.valid[number % kThinCubes] = valid;
  }

  // Takes the thin cubes out of a window: their sets become 0.
  VSA_DEVICE void take(const int (&block)[kLists], uint32_t (&set)[kLists]) {
    if (!writer.params.schedule.thin) return;
    const CubeGrid& grid = writer.params.listed_grid;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      uint32_t cube = writer.existing(block[i]);
      Extent3 origin = grid.origin(cube);
      int side = grid.thin_side(origin);
      if (!__any_sync(0xffffffffu, side >= 0 && set[i] != 0)) continue;
      uint32_t word = cube | uint32_t(side) << kStageBlockBits;
      uint32_t valid = uint32_t(grid.thinned(side).valid_slots(origin) & CubeGrid::ones(kThinTokens));
      // A set's cubes are the lowest list's.
#pragma unroll
      for (uint32_t s = 1; s < kSets; s++) {
        if (lowest(s) != i) continue;
        bool mine = side >= 0 && set[i] == s;
        uint32_t lanes = __ballot_sync(0xffffffffu, mine);
        if (lanes == 0) continue;
        if (mine) put(s, count[s] + __popc(lanes & ((1u << lane_id()) - 1)), word, valid);
        count[s] += __popc(lanes);
        bool full = valid == (1u << kThinTokens) - 1;
        if (__any_sync(0xffffffffu, mine && !full)) partial |= 1u << s;
      }
      if (side >= 0) set[i] = 0;
    }
  }

  // Stages of what was taken, from number `stages` on; where they end.
  VSA_DEVICE int take_rest(int stages) const {
    if (!writer.params.schedule.thin) return stages;
    constexpr int kStageCubes = kBlocks * kThinCubes;
    const CubeGrid& grid = writer.params.listed_grid;
    uint32_t side = grid.log2_cube.t >= 2 ? 0 : grid.log2_cube.h >= 2 ? 1 : 2;  // with a quarter
    uint32_t nothing = grid.num_cubes() | side << kStageBlockBits;
#pragma unroll
    for (uint32_t s = 1; s < kSets; s++) {
      int made = ceil_div(count[s], kStageCubes), missing = made * kStageCubes - count[s];
      if (lane_id() < missing) put(s, count[s] + lane_id(), nothing, 0);
#pragma unroll 1
      for (int i = lane_id(); i < made; i += kWarpThreads) {
        uint32_t flag = partial >> s & 1 || (i == made - 1 && missing) ? kStagePartial : 0;
        Stage& place = writer.params.schedule.stages[writer.places.index(stages + i)];
        place = {s << kStageBlockBits | flag, uint32_t(first_row(s) + i * kBlocks) | kStageThin | flag};
      }
      stages += made;
    }
    return stages;
  }
};

// Stages of two blocks. Sets of consumers are bit masks; those of one consumer are its "own".
template <int kLists>
struct PairScheduler {
  static constexpr uint32_t kSets = 1u << kLists, kEveryone = kSets - 1;
  static constexpr bool kRounds = kLists == 3;  // turns of two consumers cost what they gain (bench/NOTES.md)
  static_assert(kLists * kSets <= kWarpThreads);

  const StageWriter& writer;
  ThinScheduler<kLists, 2>& thin;
  int stages = 0;      // written
  int waiting = 0;     // lane s: the block without a partner of set s
  uint32_t waits = 0;  // a bit for each set that has one

  // All pairs of the next 32 entries of each list and of what waits from before.
  VSA_DEVICE void take(BlockWindow<kLists>& window) {
    int block[kLists], pairs[kSets], begin[kSets];
    uint32_t set[kLists], lanes[kSets];
    window.load(block, set);
    thin.take(block, set);
#pragma unroll
    for (uint32_t s = 1; s < kSets; s++) {
      lanes[s] = __ballot_sync(0xffffffffu, set[lowest(s)] == s);
      pairs[s] = (__popc(lanes[s]) + (waits >> s & 1)) / 2;
    }
    int total = stages;
    // Of several that leave one out, and of that one: its own stages that stand between those of the set.
    int beside[kSets] = {};
#pragma unroll
    for (uint32_t s = 1; s < kSets; s++) {
      if (!several(s)) continue;
      begin[s] = total;
      total += pairs[s];
      if (__popc(s) != kLists - 1) continue;
      beside[s] = beside[kEveryone ^ s] = min(pairs[s], pairs[kEveryone ^ s]);
      total += beside[s];
    }
    int begin_own = total;
    int own_rounds = kWarpThreads;  // in which every consumer has a stage
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      int own = pairs[1u << i] - beside[1u << i];
      own_rounds = min(own_rounds, own);
      total += own;
    }

    // Of the block that waits in this lane, and of the lane's entry of each list.
    int waiting_stage = -1, next_waiting = waiting;
    uint32_t waiting_flag = 0;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      int stage = -1, half = 0;
      uint32_t flag = 0;
#pragma unroll
      for (uint32_t s = 1; s < kSets; s++) {
        if (lowest(s) != i) continue;
        // Of the set's pairs so many, the first ones.
        int in_rounds = kRounds ? beside[s] + (several(s) ? 0 : own_rounds) : 0;
        auto stage_of = [&pairs, &begin, &beside, begin_own, s](int pair) {
          if (several(s)) return begin[s] + pair + min(pair, beside[s]);
          int own = pair - beside[s];
          if (own < 0) return begin[kEveryone ^ s] + 2 * pair + 1;
          int result = begin_own;
#pragma unroll
          for (int k = 0; k < kLists; k++) {
            result += min(pairs[1u << k] - beside[1u << k], own + (k < lowest(s)));
          }
          return result;
        };
        int before = waits >> s & 1;
        int rank = before + __popc(lanes[s] & ((1u << lane_id()) - 1));
        if (set[i] == s && rank / 2 < pairs[s]) {
          stage = stage_of(rank / 2);
          half = rank % 2;
          flag = half == 0 && rank / 2 < in_rounds ? kStageTurn : 0;
        }
        if (lane_id() == s && before && pairs[s] > 0) {
          waiting_stage = stage_of(0);
          waiting_flag = in_rounds > 0 ? kStageTurn : 0;
        }
        bool left = (__popc(lanes[s]) + before) % 2;
        if (left && lanes[s]) {
          int last = __shfl_sync(0xffffffffu, block[i], 31 - __clz(lanes[s]));
          if (lane_id() == s) next_waiting = last;
        }
        waits = (waits & ~(1u << s)) | uint32_t(left) << s;
      }
      if (stage >= 0) writer.put(stage, half, block[i], set[i], flag);
    }
    if (waiting_stage >= 0) writer.put(waiting_stage, 0, waiting, lane_id(), waiting_flag);
    waiting = next_waiting;
    stages = total;
  }

  // When the lists have ended. A lane for each list and set.
  VSA_DEVICE void take_rest() {
    int list = lane_id() / kSets, set = lane_id() % kSets;
    bool mine = list < kLists && set >> list & 1 && waits >> set & 1;
    uint32_t left = __ballot_sync(0xffffffffu, mine);
    int block = __shfl_sync(0xffffffffu, waiting, set), begin = stages;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      int made = (__popc(left >> i * kSets & ((1u << kSets) - 1)) + 1) / 2;
      if (i < list) begin += made;
      stages += made;
    }
    if (mine) {
      uint32_t of_list = left >> list * kSets & ((1u << kSets) - 1);
      int rank = __popc(of_list & ((1u << set) - 1));
      bool alone = rank % 2 == 0 && rank + 1 == __popc(of_list);
      writer.put(begin + rank / 2, rank % 2, block, 1u << list);
      if (alone) writer.put(begin + rank / 2, 1, block, 1u << list, kStagePadded | kStagePartial);
    }
    stages = thin.take_rest(stages);
  }
};

// Stages of one block.
template <int kLists>
struct SingleScheduler {
  const StageWriter& writer;
  ThinScheduler<kLists, 1>& thin;
  int stages = 0;

  VSA_DEVICE void take(BlockWindow<kLists>& window) {
    int block[kLists], before = stages;
    uint32_t set[kLists], lanes[kLists];
    window.load(block, set);
    thin.take(block, set);
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      lanes[i] = __ballot_sync(0xffffffffu, set[i] != 0);
      before += __popc(lanes[i] & ((1u << lane_id()) - 1));
      stages += __popc(lanes[i]);
    }
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      if (set[i] == 0) continue;
      writer.put_alone(before, block[i], set[i]);
      before++;
    }
  }

  VSA_DEVICE void take_rest() { stages = thin.take_rest(stages); }
};

template <int kConsumers, int kBlocks>
VSA_DEVICE void make_schedule(const ScheduleParams& params) {
  if (blockIdx.x == 0 && threadIdx.x == 0) params.schedule.counts[params.num_tasks] = 0;
  int index = blockIdx.x * kScheduleWarps + warp_id();
  if (index >= params.num_tasks) return;
  Task task =
      task_at<kConsumers>(params.grid, params.heads, params.groups, params.schedule.whole_tasks, index);
  StageWriter writer{params, stage_places<kConsumers, kBlocks>(params.schedule, params.grid, task, index)};

  ThinScheduler<kConsumers, kBlocks> thin{writer, task, index};
  BlockWindow<kConsumers> window;
  int64_t entries = 0;
#pragma unroll
  for (int i = 0; i < kConsumers; i++) {
    bool exists = i < task.blocks;
    int block = task.block(params.grid, exists ? i : 0);
    const int32_t* list;
    int count;
    if (params.compressed.offsets) {
      const int32_t* row = params.compressed.offsets + task.head_row * (params.grid.num_cubes() + 1) + block;
      list = params.compressed.entries + task.head_row * params.compressed.entries_per_head + row[0];
      count = row[1] - row[0];
    } else {
      list = params.lists.list(task.batch, task.head, block);
      count = params.lists.count(task.batch, task.head, block);
    }
    if (!exists) count = 0;
    window.start(i, list, count);
    entries += count;
  }
  if (params.mark_words) {
    extern __shared__ uint32_t marks[];
    window.mark(marks + warp_id() * kConsumers * params.mark_words, params.mark_words);
  }
  std::conditional_t<kBlocks == 2, PairScheduler<kConsumers>, SingleScheduler<kConsumers>> scheduler{writer,
                                                                                                     thin};
  while (!window.ended()) scheduler.take(window);
  scheduler.take_rest();
  if (lane_id() != 0) return;
  params.schedule.counts[index] = scheduler.stages;
  const EarlyTasks& early = params.schedule.early;
  if (!early.count || entries <= params.usual_entries) return;
  early.tasks[atomicAdd(early.count, 1)] = index;
  early.is_early[index] = 1;
}

}  // namespace vsa
