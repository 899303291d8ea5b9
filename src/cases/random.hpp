// Random numbers that depend on a few integers only, the same on every machine and in every order of calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace flashspark::cases {

// Splitmix64 over a state mixed from the arguments.
class Random {
 public:
  template <class... Keys>
  explicit Random(uint64_t seed, Keys... keys) : state_(seed) {
    ((state_ = next() ^ static_cast<uint64_t>(keys)), ...);
  }

  uint64_t bits() { return next(); }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t from(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t n) { return below(n) == 0; }
  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  double uniform() { return static_cast<double>((next() >> 11) + 1) * 0x1p-53; }  // (0, 1]

  double normal() {
    if (have_spare_) {
      have_spare_ = false;
      return spare_;
    }
    const float radius = std::sqrt(-2.0f * std::log(static_cast<float>(uniform())));
    const float angle = 6.2831853f * static_cast<float>(uniform());
    spare_ = radius * std::sin(angle);
    have_spare_ = true;
    return radius * std::cos(angle);
  }

  template <class T>
  void shuffle(std::vector<T> &items) {
    for (int64_t i = static_cast<int64_t>(items.size()) - 1; i > 0; --i) std::swap(items[i], items[below(i + 1)]);
  }

 private:
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
  double spare_ = 0;
  bool have_spare_ = false;
};

}  // namespace flashspark::cases
