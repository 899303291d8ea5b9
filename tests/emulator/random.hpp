// The random number generator (xorshift64*) behind every choice that the hardware leaves open.
#pragma once

#include <cstdint>

namespace flashspark::emulator {

class Random {
 public:
  explicit Random(uint64_t seed) {
    // The finaliser of splitmix64 separates the seeds 1, 2, 3, ...; the state must not be 0.
    uint64_t z = seed + 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    state_ = (z ^ z >> 31) | 1;
  }

  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1d >> 32);
  }
  // Uniform in [0, limit).
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>(uint64_t{next()} * limit >> 32); }

  template <class Sequence>
  void shuffle(Sequence &sequence) {
    for (uint32_t i = static_cast<uint32_t>(sequence.size()); i > 1; i--) {
      const auto last = sequence[i - 1];
      const uint32_t other = below(i);
      sequence[i - 1] = sequence[other];
      sequence[other] = last;
    }
  }

 private:
  uint64_t state_;
};

}  // namespace flashspark::emulator
