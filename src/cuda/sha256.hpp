// SHA-256 (FIPS 180-4): names what the compile cache holds, and finds files that were damaged.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace flashspark::cuda {

class Sha256 {
 public:
  using Digest = std::array<uint8_t, 32>;

  void add(std::string_view bytes);
  // With its length before it, so that what follows cannot be taken for a part of it.
  void add_field(std::string_view bytes);
  // Nothing may be added after that.
  Digest finish();
  // 64 hexadecimal digits.
  std::string finish_hex();

 private:
  void add_block(const uint8_t *block);

  static constexpr size_t kBlockBytes = 64;
  std::array<uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                    0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, kBlockBytes> pending_{};
  uint64_t length_ = 0;  // bytes added; those of the last, partial block are pending
};

}  // namespace flashspark::cuda
