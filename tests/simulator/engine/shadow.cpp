#include "shadow.h"

#include <cstdlib>

#include "world.h"

namespace sim {

u32 ReadSets::add(u32 set, Entry entry) {
  if (set == last_set_ && entry == last_entry_) return last_result_;
  std::vector<Entry> entries = sets_[set];
  auto same = std::find_if(entries.begin(), entries.end(),
                           [entry](const Entry& other) { return other.epoch >> 32 == entry.epoch >> 32; });
  if (same == entries.end()) {
    entries.push_back(entry);
    std::sort(entries.begin(), entries.end());
  } else if (same->epoch <= entry.epoch) {
    *same = entry;
  }
  auto [found, inserted] = ids_.try_emplace(entries, static_cast<u32>(sets_.size()));
  if (inserted) sets_.push_back(entries);
  last_set_ = set;
  last_entry_ = entry;
  return last_result_ = found->second;
}

Shadow::Shadow(World& world, u64 base, u64 bytes, int index, bool initialised, bool tracked)
    : world_(world), base_(base), index_(index), global_(index != kShared), cells_(nullptr, std::free) {
  if (tracked) {
    u64 count = (bytes + (base & 3) + 3) / 4;
    cells_.reset(static_cast<Cell*>(std::calloc(std::max<u64>(count, 1), sizeof(Cell))));
  }
  if (!initialised) initialised_.assign(bytes, 0);
}

std::string Shadow::byte(u64 address) const {
  if (!global_) return "shared memory " + hex(address);
  return "byte " + std::to_string(address - base_) + " of global memory " + std::to_string(index_);
}

bool Shadow::known(u64 epoch, const Access& access) const {
  if (Epoch::cluster(epoch) == Epoch::cluster(access.epoch)) {
    return access.clock->known(Epoch::agent(epoch)) >= Epoch::step(epoch);
  }
  return access.clock->known_of(Epoch::cluster(epoch), Epoch::agent(epoch), Epoch::step(epoch));
}

void Shadow::report(u64 address, u64 epoch, u32 pc, bool write, const Access& access) const {
  AgentKind kind = world_.agent_kind(epoch);
  std::string text = std::string(access.write ? "write of " : "read of ") + byte(address) +
                     (access.async ? " by the async proxy" : "") + " is not ordered after the " +
                     (write ? "write" : "read") + " by " + world_.describe(epoch, pc);
  fail(!write && kind == AgentKind::kBulkRead ? "bulk-read" : "race", text);
}

void Shadow::slow(Cell& cell, u64 address, const Access& access) {
  if (cell.write != 0 && cell.write != access.epoch && !(access.atomic && (cell.info & kAtomic))) {
    if (!known(cell.write, access)) report(address, cell.write, cell.info >> 3, true, access);
    if (access.async && !(cell.info & kAsync) && Epoch::cluster(cell.write) == Epoch::cluster(access.epoch) &&
        Clock::at(global_ ? access.clock->fenced_global : access.clock->fenced_shared,
                  Epoch::agent(cell.write)) < Epoch::step(cell.write)) {
      fail("missing-fence", std::string("async-proxy ") + (access.write ? "write" : "read") + " of " +
                                byte(address) + ": no fence.proxy.async after the ordinary write by " +
                                world_.describe(cell.write, cell.info >> 3));
    }
  } else if (cell.write == access.epoch && access.async && access.write && !access.atomic) {
    report(address, cell.write, cell.info >> 3, true, access);
  }
  if (!access.write) {
    cell.reads = world_.read_sets.add(cell.reads, {access.epoch, access.pc << 1 | access.atomic});
    return;
  }
  for (const ReadSets::Entry& read : world_.read_sets[cell.reads]) {
    if (access.atomic && (read.pc & 1)) continue;
    if (read.epoch != access.epoch && !known(read.epoch, access)) {
      report(address, read.epoch, read.pc >> 1, false, access);
    }
  }
  cell.write = access.epoch;
  cell.reads = 0;
  cell.info = access.pc << 3 | (access.atomic ? kAtomic : 0) | (access.async ? kAsync : 0);
}

void Shadow::touch(Cell& cell, u64 address, const Access& access) {
  if (memo_valid_ && cell.write == before_.write && cell.reads == before_.reads &&
      cell.info == before_.info) {
    cell = after_;
    return;
  }
  before_ = cell;
  memo_valid_ = false;
  slow(cell, address, access);
  after_ = cell;
  memo_valid_ = true;
}

void Shadow::split(u64 address, u64 bytes, const Access& access) {
  u64 index = (address - (base_ & ~u64{3})) / 4;
  Cell& cell = cells_[index];
  u64 word = address & ~u64{3};
  if (!(cell.info & kSplit)) {
    split_[index].fill(cell);
    cell.info |= kSplit;
  }
  std::array<Cell, 4>& parts = split_[index];
  for (u64 i = 0; i < bytes; i++) slow(parts[address - word + i], address + i, access);
  if (bytes == 4 && access.write) cell = parts[0];
}

void Shadow::access(u64 address, u64 bytes, const Access& access) {
  memo_valid_ = false;
  access_more(address, bytes, access);
}

void Shadow::access_more(u64 address, u64 bytes, const Access& access) {
  if (!initialised_.empty() && access.write) std::memset(&initialised_[address - base_], 1, bytes);
  if (!cells_) return;
  u64 end = address + bytes, origin = base_ & ~u64{3};
  while (address < end) {
    u64 next = std::min((address & ~u64{3}) + 4, end);
    Cell& cell = cells_[(address - origin) / 4];
    if (next - address < 4 || (cell.info & kSplit)) {
      split(address, next - address, access);
    } else {
      touch(cell, address, access);
    }
    address = next;
  }
}

void Shadow::require_initialised(u64 address, u64 bytes, const char* what) {
  if (initialised_.empty()) return;
  const u8* start = &initialised_[address - base_];
  if (const void* found = std::memchr(start, 0, bytes)) {
    u64 at = address + (static_cast<const u8*>(found) - start);
    fail("uninitialised", std::string(what) + " of " + byte(at) + ", which was never written");
  }
}

u64 Shadow::unwritten() const { return std::count(initialised_.begin(), initialised_.end(), 0); }

}  // namespace sim
