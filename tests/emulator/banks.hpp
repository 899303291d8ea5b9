// Counts bank conflicts: 32 banks of 4 bytes. An access of 16 bytes a lane is served eight lanes at a time, so there a
// bank is 16 bytes wide and there are 8 of them. Lanes that want the same bytes share them.
#pragma once

#include <cstdint>
#include <vector>

namespace flashspark::emulator {

// Rows of 16 bytes that one phase cannot serve: those beyond the first in a bank, of `count` <= 8 addresses.
uint32_t row_conflicts(const uint32_t *address, uint32_t count);

// Single loads and stores of lanes that run one after another on the host, but together on the device: the n-th time
// that each lane is at a place of the source is taken as one instruction.
class BankCounter {
 public:
  void record(uint64_t place, uint32_t lane, uint32_t address, uint32_t bytes) {
    accesses_.push_back({place, static_cast<uint32_t>(accesses_.size()), lane, address, bytes});
  }
  // Conflicts of what was recorded since the last call.
  uint64_t take();

 private:
  struct Access {
    uint64_t place;
    uint32_t order, lane, address, bytes;
  };
  std::vector<Access> accesses_;
};

}  // namespace flashspark::emulator
