// Several block lists read together, 32 entries of each at a time, one a lane.
#pragma once

#include "tiles/common.cuh"

namespace vsa {

template <int kLists>
class BlockWindow {
 public:
  // A list of `count` blocks from `first` on, ascending.
  VSA_DEVICE void start(int list, const int32_t* first, int count) {
    first_[list] = first;
    count_[list] = count;
    position_ = 0;
  }

  // After all lists have started: a bit for each of their blocks in `marks` [kLists][words], shared memory of
  // this warp, which spares the search for them. Not what is no block: it is in no list but its own then.
  VSA_DEVICE void mark(uint32_t* marks, int words) {
    marks_ = marks;
    words_ = words;
    for (int i = lane_id(); i < kLists * words; i += kWarpThreads) marks[i] = 0;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kLists; j++) {
      for (int i = lane_id(); i < count_[j]; i += kWarpThreads) {
        uint32_t block = __ldg(first_[j] + i);
        if (block / 32 < words) atomicOr(marks + j * words + block / 32, 1u << block % 32);
      }
    }
    __syncwarp();
  }

  // The next 32 entries of each list and the sets of lists that hold them, a bit a list. A set is 0 beyond
  // the list (the block too), and where a lower list holds the block: every block comes once.
  VSA_DEVICE void load(int (&block)[kLists], uint32_t (&set)[kLists]) {
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      int index = position_ + lane_id();
      block[i] = set[i] = 0;
      if (index >= count_[i]) continue;
      block[i] = __ldg(first_[i] + index);
      set[i] = 1u << i;
#pragma unroll
      for (int j = 0; j < kLists; j++) {
        if (j == i || !contains(j, block[i])) continue;
        set[i] = j < i ? 0 : set[i] ? set[i] | 1u << j : 0;
      }
    }
    position_ += kWarpThreads;
  }

  VSA_DEVICE bool ended() const {
    bool more = false;
#pragma unroll
    for (int i = 0; i < kLists; i++) more |= position_ < count_[i];
    return !more;
  }

 private:
  VSA_DEVICE bool contains(int list, int block) const {
    if (!marks_) return search(list, block);
    uint32_t word = uint32_t(block) / 32;
    return word < words_ && marks_[list * words_ + word] >> uint32_t(block) % 32 & 1;
  }

  // By halving; the number of steps is the same in all lanes.
  VSA_DEVICE bool search(int list, int block) const {
    const int32_t* first = first_[list];
    int count = count_[list];
    if (count == 0) return false;
    int low = 0;
    for (int size = count; size > 1;) {
      int half = size / 2;
      if (__ldg(first + low + half - 1) < block) low += half;
      size -= half;
    }
    return __ldg(first + low) == block || (low + 1 < count && __ldg(first + low + 1) == block);
  }

  const int32_t* first_[kLists];
  int count_[kLists];
  int position_ = 0;  // of all lists
  const uint32_t* marks_ = nullptr;
  int words_ = 0;
};

}  // namespace vsa
