// Derives decisions from the fuzzer's bytes. An exhausted stream yields zeros, so every prefix of an input is an input.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace flashspark::fuzz {

class Stream {
 public:
  Stream(const uint8_t *data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }

  template <class T>
  T raw() {
    T value{};
    const size_t n = left_ < sizeof(T) ? left_ : sizeof(T);
    std::memcpy(&value, data_, n);
    data_ += n;
    left_ -= n;
    return value;
  }
  int64_t below(int64_t n) { return raw<uint16_t>() % n; }

  // Mostly small numbers, often near a power of two, occasionally arbitrary bits.
  int64_t number() {
    switch (raw<uint8_t>() % 4) {
      case 0:
        return raw<int8_t>();
      case 1:
        return raw<int16_t>();
      case 2: {
        const uint64_t power = uint64_t{1} << raw<uint8_t>() % 64;
        return static_cast<int64_t>(power + static_cast<uint64_t>(static_cast<int64_t>(raw<int8_t>() % 3)));
      }
      default:
        return raw<int64_t>();
    }
  }

 private:
  const uint8_t *data_;
  size_t left_;
};

// A scalar field of a params struct: its offset and width.
struct Field {
  size_t offset, size;

  void set(void *params, int64_t value) const { std::memcpy(static_cast<char *>(params) + offset, &value, size); }
};

// Allocates rows of `width` elements for `extents` = (batch, tokens, heads) at the given strides, exactly as large as
// the addresses span. Returns false if that exceeds a test's limit.
struct Block {
  std::vector<unsigned char> bytes;
  unsigned char *origin = nullptr;

  bool fit(const int64_t (&extents)[3], const int64_t (&strides)[3], int64_t width, int64_t element_size) {
    constexpr __int128 kMost = 1 << 20;
    if (width <= 0) return true;  // must be rejected before any address is computed
    __int128 low = 0, high = width;
    for (int n = 0; n < 3; ++n) {
      if (extents[n] <= 0) return true;  // no element is addressed
      const __int128 reach = static_cast<__int128>(extents[n] - 1) * strides[n];
      (reach < 0 ? low : high) += reach;
    }
    if (high - low > kMost) return false;
    bytes.resize(static_cast<size_t>((high - low) * element_size));
    for (size_t n = 0; n < bytes.size(); ++n) bytes[n] = static_cast<unsigned char>(0x30 + n * 7 % 13);
    origin = bytes.data() + static_cast<int64_t>(-low) * element_size;
    return true;
  }
};

}  // namespace flashspark::fuzz
