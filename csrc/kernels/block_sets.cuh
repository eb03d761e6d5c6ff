// The lists of a CTA's consumers as one sequence of blocks, each with the set of consumers that chose it: a
// tile that several of them need is loaded once.
#pragma once

#include "kernels/block_window.cuh"

namespace vsa {

// Walked by a whole warp. Entries of the lists take turns, so that no consumer waits long for its next.
template <int kLists>
class BlockSets {
 public:
  VSA_DEVICE void start(int list, const int32_t* first, int count) {
    window_.start(list, first, count);
    todo_[list] = 0;
  }

  // The members of the next block, a bit a list; 0 at the end.
  VSA_DEVICE uint32_t next(int& block) {
    while (true) {
      uint32_t lanes = 0;
#pragma unroll
      for (int i = 0; i < kLists; i++) lanes |= todo_[i];
      if (lanes) {
        int lane = __ffs(lanes) - 1, entry = 0;
        uint32_t members = 0;
        bool found = false;
#pragma unroll
        for (int i = 0; i < kLists; i++) {
          bool here = !found && (todo_[i] >> lane & 1);
          entry = here ? block_[i] : entry;
          members = here ? set_[i] : members;
          todo_[i] = here ? todo_[i] & ~(1u << lane) : todo_[i];
          found |= here;
        }
        block = __shfl_sync(0xffffffffu, entry, lane);
        return __shfl_sync(0xffffffffu, members, lane);
      }
      if (window_.ended()) return 0;
      window_.load(block_, set_);
#pragma unroll
      for (int i = 0; i < kLists; i++) todo_[i] = __ballot_sync(0xffffffffu, set_[i] != 0);
    }
  }

 private:
  BlockWindow<kLists> window_;
  int block_[kLists];
  uint32_t set_[kLists], todo_[kLists];  // todo: a bit for each lane whose entry is still to come
};

}  // namespace vsa
