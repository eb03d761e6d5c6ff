// Several ascending block lists walked as one: each block comes once, with a bit for every list that holds
// it. This is how the consumers of a CTA share the tiles that more than one of them chose.
#pragma once

#include "kernels/block_list.h"
#include "tiles/common.cuh"

namespace vsa {

template <int kLists>
class MergedList {
 public:
  // `count` blocks from `first` on, or blocks 0 to count - 1 where `first` is null.
  VSA_DEVICE void start(int list, const int32_t* first, int count) {
    entries_[list] = first;
    count_[list] = count;
    front_[list] = count > 0 ? entry(list, 0) : kEnd;
    after_[list] = count > 1 ? entry(list, 1) : kEnd;
    position_[list] = 0;
  }

  // The lowest block not yet given and its members; members is 0 at the end. One entry a list is read ahead,
  // so that a step does not wait for memory.
  VSA_DEVICE uint32_t next(int& block) {
    block = kEnd;
#pragma unroll
    for (int i = 0; i < kLists; i++) block = min(block, front_[i]);
    uint32_t members = 0;
    if (block == kEnd) return members;
#pragma unroll
    for (int i = 0; i < kLists; i++) {
      if (front_[i] != block) continue;
      members |= 1u << i;
      front_[i] = after_[i];
      position_[i]++;
      after_[i] = position_[i] + 1 < count_[i] ? entry(i, position_[i] + 1) : kEnd;
    }
    return members;
  }

 private:
  static constexpr int kEnd = 0x7fffffff;

  VSA_DEVICE int entry(int list, int i) const { return entries_[list] ? __ldg(entries_[list] + i) : i; }

  const int32_t* entries_[kLists];
  int count_[kLists], position_[kLists];  // position_: of front_ in its list
  int front_[kLists], after_[kLists];     // the next two blocks, kEnd where there are none
};

}  // namespace vsa
