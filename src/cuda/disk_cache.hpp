// A folder of cubins that processes share, each in a file named after its key. It is a help and no more: whatever goes
// wrong with it is as if it were empty. No other user can write to it, or it is not used.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace flashspark::cuda {

class DiskCache {
 public:
  // `folder`: made when something is stored; "": nothing is kept. `max_bytes`: of all entries.
  DiskCache(std::string folder, int64_t max_bytes) : folder_(std::move(folder)), max_bytes_(max_bytes) {}

  // Keys are 64 hexadecimal digits. A damaged entry is as if it were not there.
  std::optional<std::vector<char>> load(const std::string &key) const;
  // Replaces the entry at once and whole, so that others see the old one or the new one. Then entries go that have not
  // been used for longest, until `max_bytes` hold the others.
  void store(const std::string &key, const std::vector<char> &cubin) const;

  // "/home/me/.cache/flashspark, 3 cubins, 0.3 of 256 MiB", or why there is none.
  std::string description() const;

 private:
  std::string folder_;
  int64_t max_bytes_;
};

}  // namespace flashspark::cuda
