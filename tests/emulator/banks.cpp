#include "banks.hpp"

#include <algorithm>
#include <array>

namespace flashspark::emulator {

namespace {

// Counts, over all banks, the distinct units (of 4 or 16 bytes) beyond the first.
uint32_t conflicts(const uint32_t *unit, uint32_t count, uint32_t banks) {
  uint32_t result = 0;
  for (uint32_t i = 0; i < count; i++) {
    bool shares_bank = false;
    bool repeated = false;
    for (uint32_t j = 0; j < i; j++) {
      repeated |= unit[j] == unit[i];
      shares_bank |= unit[j] % banks == unit[i] % banks;
    }
    if (shares_bank && !repeated) result++;
  }
  return result;
}

struct Instruction {
  std::array<uint32_t, 32> address;
  uint32_t lanes = 0;
};

uint32_t conflicts(const Instruction &instruction, uint32_t bytes) {
  const uint32_t phase = 32 * 4 / bytes;  // number of lanes served at a time
  uint32_t result = 0;
  for (uint32_t first = 0; first < 32; first += phase) {
    uint32_t unit[32];
    uint32_t count = 0;
    for (uint32_t lane = first; lane < first + phase; lane++) {
      if (instruction.lanes >> lane & 1) unit[count++] = instruction.address[lane] / bytes;
    }
    result += conflicts(unit, count, phase);
  }
  return result;
}

}  // namespace

uint32_t row_conflicts(const uint32_t *address, uint32_t count) {
  uint32_t unit[8];
  for (uint32_t i = 0; i < count; i++) unit[i] = address[i] / 16;
  return conflicts(unit, count, 8);
}

uint64_t BankCounter::take() {
  if (accesses_.empty()) return 0;
  std::sort(accesses_.begin(), accesses_.end(),
            [](const Access &x, const Access &y) { return x.site != y.site ? x.site < y.site : x.order < y.order; });
  uint64_t result = 0;
  for (auto access = accesses_.begin(); access != accesses_.end();) {
    const uint64_t site = access->site;
    const uint32_t bytes = access->bytes;
    std::vector<Instruction> instructions;
    std::array<uint32_t, 32> times{};
    for (; access != accesses_.end() && access->site == site; ++access) {
      const uint32_t time = times[access->lane]++;
      if (time == instructions.size()) instructions.emplace_back();
      instructions[time].address[access->lane] = access->address;
      instructions[time].lanes |= 1u << access->lane;
    }
    for (const Instruction &instruction : instructions) result += conflicts(instruction, bytes);
  }
  accesses_.clear();
  return result;
}

}  // namespace flashspark::emulator
