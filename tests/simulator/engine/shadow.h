// What happened to each byte of a memory: the last write, the reads since, whether it was ever written.
// FastTrack's idea (Flanagan and Freund, PLDI 2009) with interned read sets, in cells of 4 bytes that split
// into bytes when needed.
#pragma once

#include <array>
#include <map>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace sim {

struct Access {
  const Clock* clock;  // what the accessing agent knows
  u64 epoch;           // the access itself
  u32 pc;
  bool write, async, atomic;
};

struct Cell {
  u64 write = 0;  // epoch; 0: never written since the launch
  u32 reads = 0;  // interned set
  u32 info = 0;   // pc of the write << 3 | kSplit | kAtomic | kAsync
};

// Sets of (epoch, pc), one entry per agent, each kept once.
class ReadSets {
 public:
  struct Entry {
    u64 epoch;
    u32 pc;  // << 1 | atomic
    bool operator==(const Entry&) const = default;
    auto operator<=>(const Entry&) const = default;
  };
  ReadSets() : sets_(1) {}
  u32 add(u32 set, Entry entry);
  const std::vector<Entry>& operator[](u32 set) const { return sets_[set]; }
  size_t size() const { return sets_.size(); }

 private:
  std::vector<std::vector<Entry>> sets_;
  std::map<std::vector<Entry>, u32> ids_;
  u32 last_set_ = kNone, last_result_ = 0;
  Entry last_entry_{};
};

struct World;

class Shadow {
 public:
  static constexpr u32 kSplit = 1, kAtomic = 2, kAsync = 4;
  static constexpr int kShared = -2;
  // index: of the global memory in the caller's list, or kShared.
  Shadow(World& world, u64 base, u64 bytes, int index, bool initialised, bool tracked);
  void access(u64 address, u64 bytes, const Access& access);
  // Further bytes of the same access as the call before.
  void access_more(u64 address, u64 bytes, const Access& access);
  void require_initialised(u64 address, u64 bytes, const char* what);
  u64 unwritten() const;

 private:
  void touch(Cell& cell, u64 address, const Access& access);
  void slow(Cell& cell, u64 address, const Access& access);
  void split(u64 address, u64 bytes, const Access& access);
  std::string byte(u64 address) const;
  bool known(u64 epoch, const Access& access) const;
  [[noreturn]] void report(u64 address, u64 epoch, u32 pc, bool write, const Access& access) const;
  World& world_;
  u64 base_;
  int index_;
  bool global_;
  std::unique_ptr<Cell[], void (*)(void*)> cells_;  // from calloc: untouched pages cost nothing
  std::unordered_map<u64, std::array<Cell, 4>> split_;
  std::vector<u8> initialised_;
  // The last transition of a cell; neighbours usually repeat it.
  Cell before_{}, after_{};
  bool memo_valid_ = false;
};

}  // namespace sim
