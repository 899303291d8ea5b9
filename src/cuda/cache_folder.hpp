// The folder of a DiskCache, as far as systems differ: a POSIX half and a Windows half. Paths are UTF-8.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace flashspark::cuda {

class CacheFolder {
 public:
  struct File {
    std::string name;
    int64_t bytes;
    int64_t used;  // nanoseconds since 1970
  };

  // Makes what is missing of the path, for this user alone.
  static void make(const std::string &path);

  // Not open if there is no such folder, or another user owns it or can write to it. What was looked at is what is
  // used: the folder cannot be exchanged while it is open.
  explicit CacheFolder(const std::string &path);
  ~CacheFolder();
  CacheFolder(const CacheFolder &) = delete;
  CacheFolder &operator=(const CacheFolder &) = delete;

  // Why it is not open, in words; "" if it is.
  const std::string &fault() const { return fault_; }
  bool is_open() const { return fault_.empty(); }

  // What follows is for open folders. Links are not followed and not listed; names have no folders in them.
  std::vector<File> list() const;
  std::optional<std::vector<char>> read(const std::string &name, int64_t max_bytes) const;
  // Of a new file; false if it is not whole.
  bool write(const std::string &name, std::string_view begin, std::string_view rest) const;
  // Replaces `to` at once.
  bool rename(const std::string &from, const std::string &to) const;
  void remove(const std::string &name) const;
  void mark_used(const std::string &name) const;

 private:
#if defined(_WIN32)
  void *folder_ = nullptr;
  std::string path_;
#else
  int folder_ = -1;
#endif
  std::string fault_;
};

}  // namespace flashspark::cuda
