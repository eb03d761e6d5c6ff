// The lists of a CTA's consumers, cut into pairs of blocks that the same consumers chose. A pair is what one
// stage of a ring holds: consumers share what several of them chose, and each works on 128 keys at a time.
#pragma once

#include "kernels/block_window.cuh"
#include "kernels/pair_ring.h"

namespace vsa {

struct BlockPair {
  int first, second;  // the same block twice where `padded`: the second counts for nothing
  uint32_t members;   // bit per consumer; 0 only where all lists are empty
  bool padded;
  bool last;
};

// What a warp plans ahead, and the block that waits for a partner, for each set of members.
template <int kLists>
struct PairPlan {
  static_assert(kLists * kWarpThreads / 2 + (1 << kLists) / 2 <= kPairPlanStages);
  int32_t first[kPairPlanStages], second[kPairPlanStages];  // second: -1 where there is none
  uint8_t members[kPairPlanStages];
  int32_t waiting[1 << kLists];
};

// Walked by a whole warp, which plans 32 entries of each list at a time. Pairs of several lists come first,
// then those of one list alone, in turns, so that no consumer waits long for its next.
template <int kLists>
class BlockPairs {
 public:
  VSA_DEVICE explicit BlockPairs(PairPlan<kLists>& plan) : plan_(plan) {}

  VSA_DEVICE void start(int list, const int32_t* first, int count) {
    window_.start(list, first, count);
    taken_ = planned_ = 0;
    state_ = State::kInLists;
  }

  // The next pair; not called again after the last.
  VSA_DEVICE BlockPair next() {
    while (taken_ == planned_ && state_ != State::kEnd) {
      __syncwarp();  // every lane has read the plan
      if (state_ == State::kInLists) {
        plan_lists();
      } else {
        plan_rest();
      }
      __syncwarp();
    }
    if (planned_ == 0) return {.first = 0, .second = 0, .members = 0, .padded = true, .last = true};
    BlockPair pair;
    pair.first = plan_.first[taken_];
    pair.second = plan_.second[taken_];
    pair.members = plan_.members[taken_];
    pair.padded = pair.second < 0;
    if (pair.padded) pair.second = pair.first;
    taken_++;
    pair.last = state_ == State::kEnd && taken_ == planned_;
    return pair;
  }

 private:
  enum class State { kInLists, kAtRest, kEnd };
  static constexpr uint32_t kSets = 1u << kLists;
  static constexpr int kNone = -1;

  static constexpr bool shared(uint32_t set) { return (set & (set - 1)) != 0; }
  static constexpr int lowest(uint32_t set) { return set & 1 ? 0 : 1 + lowest(set >> 1); }

  // Plans all pairs of the next 32 entries of each list and of what waits from before.
  VSA_DEVICE void plan_lists() {
    int block[kLists];
    uint32_t set[kLists], lanes[kSets];
    int pairs[kSets], begin[kSets];
    window_.load(block, set);
    int total = 0;
#pragma unroll
    for (uint32_t s = 1; s < kSets; s++) {
      lanes[s] = __ballot_sync(0xffffffffu, set[lowest(s)] == s);
      pairs[s] = (__popc(lanes[s]) + waits(s)) / 2;
      begin[s] = total;
      if (shared(s)) total += pairs[s];
    }
    int begin_own = total;
#pragma unroll
    for (int i = 0; i < kLists; i++) total += pairs[1u << i];

    uint32_t waiting = 0;
#pragma unroll
    for (uint32_t s = 1; s < kSets; s++) {
      auto stage_of = [&pairs, &begin, begin_own, s](int pair) {
        if (shared(s)) return begin[s] + pair;
        int stage = begin_own;
#pragma unroll
        for (int i = 0; i < kLists; i++) stage += min(pairs[1u << i], pair + (i < lowest(s)));
        return stage;
      };
      bool mine = set[lowest(s)] == s;
      int rank = waits(s) + __popc(lanes[s] & ((1u << lane_id()) - 1));
      if (waits(s) && pairs[s] > 0 && lane_id() == 0) put(stage_of(0), 0, plan_.waiting[s], s);
      __syncwarp();  // read before it is overwritten
      if (mine && rank / 2 < pairs[s]) put(stage_of(rank / 2), rank % 2, block[lowest(s)], s);
      if (mine && rank / 2 == pairs[s]) plan_.waiting[s] = block[lowest(s)];
      waiting |= uint32_t((__popc(lanes[s]) + waits(s)) % 2) << s;
    }
    waiting_ = waiting;
    planned_ = total;
    taken_ = 0;
    if (window_.ended()) state_ = waiting_ ? State::kAtRest : State::kEnd;
  }

  // When the lists have ended: a block that found no partner goes to each of its lists, which pairs what it
  // got.
  VSA_DEVICE void plan_rest() {
    int total = 0;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      int count = 0;
#pragma unroll
      for (uint32_t s = 1; s < kSets; s++) {
        if (!(s >> i & 1) || !waits(s)) continue;
        if (lane_id() == 0) {
          put(total + count / 2, count % 2, plan_.waiting[s], 1u << i);
          if (count % 2 == 0) plan_.second[total + count / 2] = kNone;
        }
        count++;
      }
      total += (count + 1) / 2;
    }
    waiting_ = 0;
    planned_ = total;
    taken_ = 0;
    state_ = State::kEnd;
  }

  VSA_DEVICE int waits(uint32_t set) const { return waiting_ >> set & 1; }

  VSA_DEVICE void put(int stage, int half, int block, uint32_t set) {
    (half ? plan_.second : plan_.first)[stage] = block;
    plan_.members[stage] = uint8_t(set);
  }

  PairPlan<kLists>& plan_;
  BlockWindow<kLists> window_;
  int taken_ = 0, planned_ = 0;  // stages of the plan
  uint32_t waiting_ = 0;         // bit per set of members
  State state_ = State::kInLists;
};

}  // namespace vsa
