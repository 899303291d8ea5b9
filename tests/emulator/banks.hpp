// Counts shared-memory bank conflicts: 32 banks of 4 bytes. A 16-byte access is served eight lanes at a time, as if
// there were 8 banks of 16 bytes. Lanes that access the same bytes do not conflict.
#pragma once

#include <cstdint>
#include <vector>

namespace flashspark::emulator {

// Conflicts of one phase of ldmatrix: `count` <= 8 row addresses, each of 16 bytes.
uint32_t row_conflicts(const uint32_t *address, uint32_t count);

// Ordinary loads and stores. On the host the lanes run one after another, on the device together: the n-th access of
// each lane at a site counts as one instruction.
class BankCounter {
 public:
  void record(uint64_t site, uint32_t lane, uint32_t address, uint32_t bytes) {
    accesses_.push_back({site, static_cast<uint32_t>(accesses_.size()), lane, address, bytes});
  }
  // Conflicts among the accesses recorded since the last call.
  uint64_t take();

 private:
  struct Access {
    uint64_t site;
    uint32_t order, lane, address, bytes;
  };
  std::vector<Access> accesses_;
};

}  // namespace flashspark::emulator
