// Selection (VSA, section 2.2): for each query cube the topk key cubes with the largest coarse scores
// S = query_pooled key_pooled^T * scale (fp32), as an ascending list. Equal scores go to the lower index; -0
// equals +0; NaN is above +inf, and all NaNs are equal. So exactly topk distinct cubes come out, the same in
// every run.
//
// Radix select, and S is never in memory: every pass makes it again on the tensor cores. A pass counts, for
// each row, the next 8 bits of the keys that share the prefix found so far, and then finds the bin in which
// the topk-th key lies; when in every row all keys of that bin are wanted, or after 32 bits, a last pass
// writes the indices. Of the two warpgroups that share 64 rows, one takes the lower half of the keys upwards
// and fills a row's list from its front, the other takes the upper half downwards and fills it from its back:
// neither needs the other's count.
//
//   producer warp | keys of pass 0 | keys of pass 1, as far as the rings reach | ...
//   warpgroups    | scores, count  | find the bin, clear the bins | scores, count | ...  | scores, write
#pragma once

#include "kernels/select_common.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

// What is known of a row's topk-th key: its leading bits, of the keys with these bits how many there are, and
// how many of them, from the largest, are wanted.
struct SelectRow {
  uint32_t prefix;  // of the key with its sign bit flipped, which orders keys as unsigned numbers
  int32_t candidates, wanted;
};

template <int kRowGroups_, int kHeadDim_, class T_>
struct Select {
  using T = T_;
  static constexpr int kRowGroups = kRowGroups_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kRowGroups * kCubeTokens;
  static constexpr int kStages = select_stages(kRowGroups, kHeadDim);
  static constexpr int kConsumerThreads = kRowGroups * kSelectKeyHalves * kWarpgroupThreads;

  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  using Bins = uint32_t[kSelectBins];
  struct Shared {
    union {
      Tile query[kRowGroups];  // until it is in registers
      Bins bins[kRows];        // bin b of row r lies at b ^ select_bin_swizzle(r)
    };
    Tile keys[kSelectKeyHalves][kStages];  // a ring for each half
    SelectRow rows[kRows];
    uint32_t undecided[kSelectPasses];  // not 0: after this pass, some row has more candidates than wanted
    Barrier query_full;
    Barrier decided[kSelectPasses];  // `undecided` is final; the producer may look a pass late
    Barrier full[kSelectKeyHalves][kStages], empty[kSelectKeyHalves][kStages];
  };
  static_assert(sizeof(Shared) == select_shared_bytes(kRowGroups, kHeadDim));
};

// The key tiles of a key half: the lower half, which has the odd tile, upwards; the upper half downwards.
VSA_DEVICE int select_half_tiles(const SelectTask& task, int key_half) {
  return (task.tiles + 1 - key_half) / 2;
}
VSA_DEVICE int select_tile(const SelectTask& task, int key_half, int i) {
  return key_half == 0 ? i : task.tiles - 1 - i;
}

// The lowest of the 8 bits that counting pass `pass` looks at.
VSA_DEVICE int select_shift(int pass) { return 24 - 8 * pass; }

// Whether the pass after counting pass `pass` is the last one.
template <class Kernel>
VSA_DEVICE bool select_finished(const typename Kernel::Shared& shared, int pass) {
  return pass == kSelectPasses - 1 || shared.undecided[pass] == 0;
}

// One thread. Loads of a pass start before the pass is known to be needed: a counting pass always has a
// successor.
template <class Kernel>
VSA_DEVICE void select_produce(typename Kernel::Shared& shared, const SelectMaps& maps,
                               const SelectParams& params, const SelectTask& task) {
  shared.query_full.arrive_expect(sizeof(shared.query));
#pragma unroll
  for (int i = 0; i < Kernel::kRowGroups; i++) {
    // Rows beyond the last cube arrive as zeros.
    load_cube(shared.query[i], maps.query, params.query,
              {task.batch, task.head, {0, 0, task.first_row + i * kCubeTokens}}, shared.query_full);
  }
  auto load_tile = [&shared, &maps, &params, &task](int half, RingPosition<Kernel::kStages>& at, int tile) {
    Barrier& full = shared.full[half][at.stage];
    shared.empty[half][at.stage].wait(at.phase ^ 1);
    full.arrive_expect(sizeof(typename Kernel::Tile));
    load_cube(shared.keys[half][at.stage], maps.key, params.key,
              {task.batch, task.head, {0, 0, tile * kCubeTokens}}, full);
    at.advance();
  };
  RingPosition<Kernel::kStages> up, down;
  for (int pass = 0;; pass++) {
    for (int i = 0; i < select_half_tiles(task, 0); i++) {
      load_tile(0, up, select_tile(task, 0, i));
      if (i < select_half_tiles(task, 1)) load_tile(1, down, select_tile(task, 1, i));
    }
    if (pass == 0) continue;
    shared.decided[pass - 1].wait(0);
    if (select_finished<Kernel>(shared, pass - 1)) return;
  }
}

// Spreads equal bins of the 8 rows that a warp counts at once over all banks.
VSA_DEVICE uint32_t select_bin_swizzle(int row) { return row % 8 * 4; }

// What a consumer warpgroup holds through all passes.
template <class Kernel>
struct SelectConsumer {
  typename Kernel::Shared& shared;
  const SelectParams& params;
  const SelectTask& task;
  int row_group, key_half;
  RingPosition<Kernel::kStages> at;
  HalfTile<typename Kernel::T, Kernel::kHeadDim> query;

  // Row in the CTA.
  VSA_DEVICE int row(int half) const { return row_group * kCubeTokens + tile_row(half); }
};

// Calls visit(first_column, keys) for each tile of this warpgroup's key half; keys lie as the scores do in a
// FloatTile, kSelectNoKey in columns beyond the last cube.
template <class Kernel, class Visit>
VSA_DEVICE void select_sweep(SelectConsumer<Kernel>& self, Visit visit) {
  for (int step = 0; step < select_half_tiles(self.task, self.key_half); step++) {
    self.shared.full[self.key_half][self.at.stage].wait(self.at.phase);
    FloatTile<kCubeTokens> scores;
    mma_fence();
    mma_ABt(scores, self.query, self.shared.keys[self.key_half][self.at.stage], false);
    mma_commit();
    mma_wait<0>(scores);
    __syncwarp();
    if (elect_one()) self.shared.empty[self.key_half][self.at.stage].arrive();
    self.at.advance();

    int32_t keys[scores.kRegisters];
#pragma unroll
    for (int i = 0; i < scores.kRegisters; i++) keys[i] = select_key(scores.data[i] * self.params.scale);
    int first_column = select_tile(self.task, self.key_half, step) * kCubeTokens;
    int columns = self.params.num_cubes - first_column;
    if (columns < kCubeTokens) {
#pragma unroll
      for (int i = 0; i < scores.kRegisters; i++) {
        if (tile_column() + i / 4 * 8 + i % 2 >= columns) keys[i] = kSelectNoKey;
      }
    }
    visit(first_column, keys);
  }
}

// Counts the bits of this pass in the keys that agree with their row's prefix above them.
template <class Kernel>
VSA_DEVICE void select_count(SelectConsumer<Kernel>& self, int pass) {
  int shift = select_shift(pass);
  uint32_t* bins[2];
  uint32_t flip[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = self.row(half);
    bins[half] = self.shared.bins[row];
    flip[half] = self.shared.rows[row].prefix ^ uint32_t(kSelectNoKey) ^ select_bin_swizzle(row) << shift;
  }
  select_sweep(self, [&bins, &flip, shift](int, const int32_t (&keys)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) {
      uint32_t bin = (keys[i] ^ flip[i / 2 % 2]) >> shift;
      if (bin < kSelectBins) atomicAdd(bins[i / 2 % 2] + bin, 1u);
    }
  });
}

// Each lane of a quad has one of four counts, the lane's number their order. Finds the last one such that it
// and those after it make up `wanted`, and takes those after it from `wanted`.
VSA_DEVICE int select_descend(uint32_t count, int32_t& wanted) {
  int found = 3;
  bool searching = true;
#pragma unroll
  for (int lane = 3; lane > 0; lane--) {
    int32_t here = __shfl_sync(0xffffffffu, count, lane, 4);
    searching = searching && wanted > here;
    if (searching) {
      wanted -= here;
      found--;
    }
  }
  return found;
}

// A quad finds the bin of its row's topk-th key: a descent over 4 x 4 x 4 x 4 bins. Leaves the bins cleared.
VSA_DEVICE SelectRow select_find_bin(uint32_t (&bins)[kSelectBins], int row, SelectRow state, int shift) {
  auto* chunks = reinterpret_cast<uint4*>(bins);  // of 4 bins; chunk c lies at c ^ swizzle
  int lane = lane_id() % 4, swizzle = select_bin_swizzle(row) / 4;
  auto sum = [](uint4 chunk) { return chunk.x + chunk.y + chunk.z + chunk.w; };

  // The whole quarter in any order: one in which the 8 lanes of two rows meet in no bank.
  int spread = 2 * lane + row % 2;
  uint32_t count = 0;
#pragma unroll
  for (int i = 0; i < 16; i++) count += sum(chunks[16 * lane + (i ^ spread)]);
  int first = 16 * select_descend(count, state.wanted);

  count = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) count += sum(chunks[(first + 4 * lane + i) ^ swizzle]);
  first += 4 * select_descend(count, state.wanted);

  first += select_descend(sum(chunks[(first + lane) ^ swizzle]), state.wanted);

  count = bins[(4 * first + lane) ^ 4 * swizzle];
  int bin = select_descend(count, state.wanted);
  state.candidates = __shfl_sync(0xffffffffu, count, bin, 4);
  state.prefix |= uint32_t(4 * first + bin) << shift;

#pragma unroll
  for (int i = 0; i < 16; i++) chunks[16 * lane + (i ^ spread)] = uint4{0, 0, 0, 0};
  return state;
}

// A row's list as one warpgroup fills it: upwards from the front, or downwards from the back. Every lane of
// the quad has the same values.
struct SelectList {
  int32_t position;  // of the next entry; downwards, one past it
  int32_t ties;      // candidates still to take; downwards, still to leave out
};

// The columns to take of a tile: all `above`, and of the candidates as many as are wanted, lowest column
// first.
template <bool kDown>
VSA_DEVICE uint64_t select_choose(SelectList& list, uint64_t above, uint64_t candidates, int& start) {
  int count = __popcll(candidates);
  int settled = min(count, list.ties);
  list.ties -= settled;
  uint64_t chosen = above | select_lowest(candidates, kDown ? count - settled : settled);
  int taken = __popcll(chosen);
  if (kDown) list.position -= taken;
  start = list.position;
  if (!kDown) list.position += taken;
  return chosen;
}

// The last pass: every key above its row's candidates, and of these the lowest columns.
template <class Kernel, bool kDown>
VSA_DEVICE void select_write(SelectConsumer<Kernel>& self, int pass) {
  int32_t below = (1 << select_shift(pass - 1)) - 1;  // the bits under the prefixes
  const SelectParams& params = self.params;
  SelectList lists[2];
  int32_t lowest[2];
  int32_t rows_left = self.task.rows - self.row(0);
  int32_t* indices = params.indices + (self.task.output_row + self.row(0)) * params.topk;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    SelectRow state = self.shared.rows[self.row(half)];
    lists[half] =
        kDown ? SelectList{params.topk, state.candidates - state.wanted} : SelectList{0, state.wanted};
    lowest[half] = int32_t(state.prefix ^ uint32_t(kSelectNoKey));
  }
  auto visit = [&lists, &lowest, &params, rows_left, indices, below](int first_column,
                                                                     const int32_t (&keys)[32]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int32_t highest = lowest[half] | below;
      uint32_t above[2] = {0, 0}, at_least[2] = {0, 0};  // bit a column, 32 in each
#pragma unroll
      for (int i = 0; i < 16; i++) {
        int32_t key = keys[i / 2 * 4 + 2 * half + i % 2];
        uint32_t bit = 1u << (i / 2 % 4 * 8 + i % 2);
        if (key > highest) above[i / 8] |= bit;
        if (key >= lowest[half]) at_least[i / 8] |= bit;
      }
#pragma unroll
      for (int word = 0; word < 2; word++) {
        above[word] = quad_or(above[word] << tile_column());
        at_least[word] = quad_or(at_least[word] << tile_column());
      }
      uint64_t above_bits = above[0] | uint64_t(above[1]) << 32;
      uint64_t candidates = (at_least[0] | uint64_t(at_least[1]) << 32) & ~above_bits;
      int start;
      uint64_t chosen = select_choose<kDown>(lists[half], above_bits, candidates, start);
      uint64_t mine = 8 * half < rows_left ? chosen & 0x0303030303030303u << tile_column() : 0;
      int32_t* list = indices + int64_t(8 * half) * params.topk + start;
      while (mine) {
        int column = __ffsll(mine) - 1;
        mine &= mine - 1;
        list[__popcll(chosen & ((uint64_t(1) << column) - 1))] = first_column + column;
      }
    }
  };
  select_sweep(self, visit);
}

template <class Kernel>
VSA_DEVICE void select_consume(SelectConsumer<Kernel>& self) {
  typename Kernel::Shared& shared = self.shared;
  constexpr int kThreads = Kernel::kConsumerThreads;
  constexpr int kBarrier = 1;

  shared.query_full.wait(0);
  load(self.query, shared.query[self.row_group]);
  named_barrier_sync(kBarrier, kThreads);  // the queries are read: their place becomes the bins
  auto* chunks = reinterpret_cast<uint4*>(shared.bins);
  for (int i = threadIdx.x; i < int(sizeof(shared.bins) / sizeof(uint4)); i += kThreads)
    chunks[i] = uint4{0, 0, 0, 0};
  for (int i = threadIdx.x; i < Kernel::kRows; i += kThreads) {
    shared.rows[i] = SelectRow{0, self.params.num_cubes, self.params.topk};
  }
  named_barrier_sync(kBarrier, kThreads);

  int pass = 0;
  do {
    select_count(self, pass);
    named_barrier_sync(kBarrier, kThreads);  // all keys are counted

    int row = self.row(self.key_half);
    SelectRow state = select_find_bin(shared.bins[row], row, shared.rows[row], select_shift(pass));
    __syncwarp();  // the quad has read the row
    if (lane_id() % 4 == 0) shared.rows[row] = state;
    bool undecided = row < self.task.rows && state.candidates > state.wanted;
    if (__any_sync(0xffffffffu, undecided) && elect_one()) atomicOr(&shared.undecided[pass], 1u);
    named_barrier_sync(kBarrier, kThreads);  // rows, undecided and the cleared bins are there for all
    if (threadIdx.x == 0) shared.decided[pass].arrive();
  } while (!select_finished<Kernel>(shared, pass++));

  if (self.key_half == 0) {
    select_write<Kernel, false>(self, pass);
  } else {
    select_write<Kernel, true>(self, pass);
  }
}

template <int kRowGroups, int kHeadDim, class T>
VSA_DEVICE void select(const SelectMaps& maps, const SelectParams& params) {
  using Kernel = Select<kRowGroups, kHeadDim, T>;
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<typename Kernel::Shared*>(shared_bytes);

  SelectTask task = select_task(params);
  select_store_counts(params, task);
  if (params.topk == params.num_cubes) return select_all(params, task);

  if (threadIdx.x == 0) {
    shared.query_full.init(1);
    for (int half = 0; half < kSelectKeyHalves; half++) {
      for (int i = 0; i < Kernel::kStages; i++) {
        shared.full[half][i].init(1);
        shared.empty[half][i].init(kRowGroups * kWarpgroupThreads / kWarpThreads);
      }
    }
    for (int i = 0; i < kSelectPasses; i++) {
      shared.decided[i].init(1);
      shared.undecided[i] = 0;
    }
    fence_barrier_init();
  }
  __syncthreads();

  int warpgroup = warpgroup_id();
  if (warpgroup < kRowGroups * kSelectKeyHalves) {
    SelectConsumer<Kernel> consumer{
        shared, params, task, warpgroup / kSelectKeyHalves, warpgroup % kSelectKeyHalves, {}, {}};
    select_consume(consumer);
  } else if (elect_one()) {
    select_produce<Kernel>(shared, maps, params, task);
  }
}

}  // namespace vsa
