// Selection (VSA, section 2.2) among few cubes: the same lists as select.cuh's, with every score made once.
//
// A CTA takes a run of query rows of one head, so few that the CTAs fill the SMs, and all keys of the head.
// Each warpgroup multiplies some of the key tiles by the query tile, S^T = key query^T, and stores the scores
// in shared memory. Then a warp takes one row, or two side by side, 32 keys a lane, 8 bits at a time from the
// highest: a lane turns its keys into bit planes (bit i of a plane is a bit of key i), and the lanes of a row
// go down the planes together. For each a popcount and a reduction over the warp tell whether the topk-th key
// has that bit. When no more keys agree with it than are wanted, or after 32 bits, the lanes write their
// keys.
//
//   warpgroup g | load tiles g, g + 6, .. | product, scores to shared memory | barrier | search, write lists
//
// Budget, B1 H12 N364 D128 topk 32: 132 CTAs of 34 rows. Each loads 109 KB, all together 1.7 us at 8.5 TB/s,
// beside which the products take 1,536 clocks. A warp's two rows take up to 760 instructions, 410 of them on
// the integer pipe (2 clocks each), and a scheduler has up to 5 such warps: 4,100 clocks, the longest part.
#pragma once

#include "kernels/select_common.cuh"
#include "tiles/wgmma.cuh"

namespace vsa {

template <int kHeadDim, class T>
struct SelectSmallShared {
  using Tile = SharedTile<T, kCubeTokens, kHeadDim>;
  static constexpr int kStages = select_small_stages(kHeadDim);

  Tile query;
  Tile keys[kSelectSmallWarpgroups][kStages];  // a ring for each warpgroup
  Barrier query_full;
  Barrier full[kSelectSmallWarpgroups][kStages];
};

// Behind the tiles, [rows][row_words]: what select_key makes of the scores. Chunks of 4 keys are shuffled
// within each run of 32, so that all banks are in use where a warp writes 8 keys of 4 pairs of rows at once,
// and where it reads one chunk of each of 8 runs.
struct SelectScores {
  uint32_t* data;
  int row_words;

  VSA_DEVICE static uint32_t swizzle(uint32_t row, uint32_t key) {
    return (key / kSelectLaneKeys ^ row / 2 * 2) % 8 * 4;
  }
};

template <class Shared>
struct SelectSmallCta {
  Shared& shared;
  const SelectMaps& maps;
  const SelectParams& params;
  SelectTask task;
  SelectScores scores;
};

// One thread of the warpgroup.
template <class Shared>
VSA_DEVICE void select_small_load(const SelectSmallCta<Shared>& cta, int group, int tile, int stage) {
  Barrier& full = cta.shared.full[group][stage];
  full.arrive_expect(sizeof(typename Shared::Tile));
  load_cube(cta.shared.keys[group][stage], cta.maps.key, cta.params.key,
            {cta.task.batch, cta.task.head, {0, 0, tile * kCubeTokens}}, full);
}

// One thread of the warpgroup: what has room at once.
template <class Shared>
VSA_DEVICE void select_small_load_first(const SelectSmallCta<Shared>& cta, int group) {
  if (group == 0) {
    cta.shared.query_full.arrive_expect(sizeof(cta.shared.query));
    // Rows beyond the last cube arrive as zeros.
    load_cube(cta.shared.query, cta.maps.query, cta.params.query,
              {cta.task.batch, cta.task.head, {0, 0, cta.task.first_row}}, cta.shared.query_full);
  }
  for (int stage = 0; stage < Shared::kStages; stage++) {
    int tile = group + stage * kSelectSmallWarpgroups;
    if (tile < cta.task.tiles) select_small_load(cta, group, tile, stage);
  }
}

// Keys by queries; columns beyond the CTA's rows are left out, 8 at a time.
template <class Shared>
VSA_DEVICE void select_small_store(const SelectSmallCta<Shared>& cta, const FloatTile<kCubeTokens>& product,
                                   int first_key) {
  int row = tile_column(), row_words = cta.scores.row_words;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int key = first_key + tile_row(half);
    // All rows of a lane have the swizzle of its first one.
    uint32_t* column = cta.scores.data + row * row_words + (key ^ SelectScores::swizzle(row, key));
#pragma unroll
    for (int j = 0; j < kSelectSmallMostRows / kSelectScoreRows; j++) {
      if (j * kSelectScoreRows >= cta.task.rows) break;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float score = product.data[4 * j + 2 * half + i] * cta.params.scale;
        column[(j * kSelectScoreRows + i) * row_words] = select_key(score);
      }
    }
  }
}

template <class Shared>
VSA_DEVICE void select_small_multiply(const SelectSmallCta<Shared>& cta) {
  Shared& shared = cta.shared;
  int group = warpgroup_id();
  bool first_warp = warp_in_warpgroup() == 0;
  if (first_warp && elect_one()) select_small_load_first(cta, group);
  shared.query_full.wait(0);
  RingPosition<Shared::kStages> at;
  for (int tile = group; tile < cta.task.tiles; tile += kSelectSmallWarpgroups, at.advance()) {
    shared.full[group][at.stage].wait(at.phase);
    FloatTile<kCubeTokens> product;
    mma_fence();
    mma_ABt(product, shared.keys[group][at.stage], shared.query, false);
    mma_commit();
    mma_wait<0>(product);
    int next = tile + Shared::kStages * kSelectSmallWarpgroups;
    if (next < cta.task.tiles) {
      named_barrier_sync(1 + group, kWarpgroupThreads);  // all four warps have read the tile
      if (first_warp && elect_one()) select_small_load(cta, group, next, at.stage);
    }
    select_small_store(cta, product, tile * kCubeTokens);
  }
}

// The part of a row that a lane searches. The warp's rows, of `lanes` lanes each, are added up side by side
// in the halves of a word; sums are at most kSelectSmallCubes.
struct SelectLane {
  int row, first_key, lanes;
  uint32_t unit, pick;  // 1 in this row's half; how __byte_perm takes this half
};

VSA_DEVICE SelectLane select_lane(int num_cubes) {
  int lanes = select_small_lanes(num_cubes), rows = kWarpThreads / lanes;
  bool upper = lane_id() >= lanes;
  return {warp_id() * rows + upper, lane_id() % lanes * kSelectLaneKeys, lanes, upper ? 1u << 16 : 1u,
          upper ? 0x4432u : 0x4410u};
}

// Sum over the lanes of this lane's row.
VSA_DEVICE int32_t select_row_sum(const SelectLane& lane, int32_t x) {
  return __byte_perm(__reduce_add_sync(0xffffffffu, x * lane.unit), 0, lane.pick);
}

// a where the mask has ones, else b.
VSA_DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & mask); }

// planes[p], bit i: bit p of byte `byte` of keys[i]. Four transpositions of 8 x 8 bits side by side.
VSA_DEVICE void select_planes(uint32_t (&planes)[8], const uint32_t (&keys)[kSelectLaneKeys], int byte) {
  uint32_t pick = byte | (4 + byte) << 4;  // the byte of each of two words
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint32_t low = __byte_perm(keys[i], keys[i + 8], pick);
    uint32_t high = __byte_perm(keys[i + 16], keys[i + 24], pick);
    planes[i] = __byte_perm(low, high, 0x5410);
  }
  int lower[] = {0x55555555, 0x33333333, 0x0f0f0f0f};
#pragma unroll
  for (int step = 2; step >= 0; step--) {
    int distance = 1 << step;
    forget(lower[step]);  // of a constant the compiler makes two operations of what is one
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i & distance) continue;
      uint32_t x = planes[i], y = planes[i + distance];
      planes[i] = select_bits(lower[step], x, y << distance);
      planes[i + distance] = select_bits(lower[step], x >> distance, y);
    }
  }
}

// How far the search for a row's topk-th key is: masks of this lane's keys, and a number of the whole row.
struct SelectSearch {
  uint32_t above;       // larger than the topk-th key
  uint32_t candidates;  // equal to it in all bits looked at
  int32_t wanted;       // candidates to take
};

// The next bit of the topk-th key: a one if that many candidates have one in `plane`. By masks, not
// conditions: a lane's work is bound by integer instructions.
VSA_DEVICE void select_step(SelectSearch& search, const SelectLane& lane, uint32_t plane) {
  uint32_t ones = search.candidates & plane;
  uint32_t count = select_row_sum(lane, __popc(ones));
  int32_t zero = int32_t(count - search.wanted) >> 31;  // -1 if the bit is a zero
  search.above |= ones & zero;
  search.candidates &= plane ^ zero;
  search.wanted += count * zero;
}

// A lane beyond the last row or key has no candidates; it reads keys of another one.
template <class Shared>
VSA_DEVICE SelectSearch select_search(const SelectSmallCta<Shared>& cta, const SelectLane& lane) {
  SelectSearch search{};
  int count = min(max(cta.params.num_cubes - lane.first_key, 0), kSelectLaneKeys);
  if (lane.row < cta.task.rows) {
    search.candidates = uint32_t((uint64_t(1) << count) - 1);
    search.wanted = cta.params.topk;
  }

  int row = min(lane.row, cta.task.rows - 1), first_key = count > 0 ? lane.first_key : 0;
  const uint32_t* words = cta.scores.data + row * cta.scores.row_words + first_key;
  uint32_t swizzle = SelectScores::swizzle(row, first_key);
  uint32_t keys[kSelectLaneKeys];
#pragma unroll
  for (int i = 0; i < kSelectLaneKeys; i += 4) {
    uint4 chunk = *reinterpret_cast<const uint4*>(words + (i ^ swizzle));
    keys[i] = chunk.x, keys[i + 1] = chunk.y, keys[i + 2] = chunk.z, keys[i + 3] = chunk.w;
  }

#pragma unroll 1
  for (int byte = 3; byte >= 0; byte--) {
    uint32_t planes[8];
    select_planes(planes, keys, byte);
    if (byte == 3) planes[7] = ~planes[7];  // the sign
#pragma unroll
    for (int i = 7; i >= 0; i--) select_step(search, lane, planes[i]);
    int32_t candidates = select_row_sum(lane, __popc(search.candidates));
    if (!__any_sync(0xffffffffu, candidates > search.wanted)) break;
  }
  return search;
}

// This lane's part of its row's list, which follows those of the lanes before: all keys above the topk-th,
// and of its equals in the row the lowest.
VSA_DEVICE void select_small_write(const SelectSearch& search, const SelectLane& lane,
                                   const SelectParams& params, int64_t output_row) {
  int32_t own = __popc(search.candidates) << 16 | __popc(search.above), sum = own;
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    int32_t before = __shfl_up_sync(0xffffffffu, sum, distance, lane.lanes);
    if (lane_id() % lane.lanes >= distance) sum += before;
  }
  int32_t candidates_before = (sum - own) >> 16, above_before = (sum - own) & 0xffff;
  int32_t taken_before = min(candidates_before, search.wanted);
  int32_t taken = min(__popc(search.candidates), search.wanted - taken_before);
  uint32_t chosen = search.above | uint32_t(select_lowest(search.candidates, taken));
  int32_t* list = params.indices + output_row * params.topk + above_before + taken_before;
#pragma unroll 1
  for (; chosen; chosen &= chosen - 1) *list++ = lane.first_key + __ffs(chosen) - 1;
}

template <int kHeadDim, class T>
VSA_DEVICE void select_small(const SelectMaps& maps, const SelectParams& params) {
  using Shared = SelectSmallShared<kHeadDim, T>;
  static_assert(sizeof(Shared) == select_small_tile_bytes(kHeadDim));
  extern __shared__ __align__(1024) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  SelectScores scores{reinterpret_cast<uint32_t*>(&shared + 1), select_small_row_words(params.num_cubes)};
  SelectSmallCta<Shared> cta{shared, maps, params, select_task(params), scores};

  select_store_counts(params, cta.task);
  if (params.topk == params.num_cubes) return select_all(params, cta.task);

  if (threadIdx.x == 0) {
    prefetch_map(maps.query);
    prefetch_map(maps.key);
    shared.query_full.init(1);
    for (int group = 0; group < kSelectSmallWarpgroups; group++) {
      for (int i = 0; i < Shared::kStages; i++) shared.full[group][i].init(1);
    }
    fence_barrier_init();
  }
  __syncthreads();
  select_small_multiply(cta);
  __syncthreads();

  SelectLane lane = select_lane(params.num_cubes);
  if (__all_sync(0xffffffffu, lane.row >= cta.task.rows)) return;
  SelectSearch search = select_search(cta, lane);
  select_small_write(search, lane, params, cta.task.output_row + lane.row);
}

}  // namespace vsa
