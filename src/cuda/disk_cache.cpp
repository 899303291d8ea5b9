#include "cuda/disk_cache.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <random>
#include <string_view>

#include "cuda/sha256.hpp"

namespace flashspark::cuda {
namespace {

constexpr std::string_view kMagic = "FSCUBIN1", kSuffix = ".cubin", kUnfinished = ".unfinished-";
constexpr size_t kKeyDigits = 64;
constexpr int64_t kMaxEntryBytes = int64_t{1} << 30;
constexpr mode_t kOwnerOnlyFolder = 0700, kOwnerOnlyFile = 0600;

// An entry: this, then the cubin.
struct Header {
  std::array<char, 8> magic;
  std::array<char, kKeyDigits> key;
  uint64_t length;          // of the cubin
  Sha256::Digest checksum;  // of the cubin
};
static_assert(sizeof(Header) == 112);  // without padding: compared as bytes

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  operator int() const { return fd_; }  // NOLINT: used where a descriptor is

 private:
  int fd_;
};

struct Opened {
  int folder = -1;
  std::string fault;  // why there is no folder
};

Header header_of(const std::string &key, std::string_view cubin) {
  Header header{.magic = {}, .key = {}, .length = cubin.size(), .checksum = {}};
  std::copy(kMagic.begin(), kMagic.end(), header.magic.begin());
  std::copy_n(key.begin(), std::min(key.size(), kKeyDigits), header.key.begin());
  Sha256 sum;
  sum.add(cubin);
  header.checksum = sum.finish();
  return header;
}

void make_folders(const std::string &path) {
  for (size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1))
    mkdir(path.substr(0, end).c_str(), kOwnerOnlyFolder);
  mkdir(path.c_str(), kOwnerOnlyFolder);
}

// Everything that follows goes through the descriptor: what was looked at is what is used.
Opened open_folder(const std::string &path) {
  if (path.empty()) return {.folder = -1, .fault = "no folder for it: HOME and FLASHSPARK_CACHE_DIR are not set"};
  const int folder = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return {.folder = -1, .fault = path + ": " + std::strerror(errno)};
  struct stat facts{};
  std::string fault;
  if (fstat(folder, &facts) != 0) {
    fault = std::strerror(errno);
  } else if (facts.st_uid != geteuid()) {
    fault = "not used, since another user owns it";
  } else if ((facts.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    fault = "not used, since others may write to it: chmod go-w";
  } else {
    return {.folder = folder, .fault = ""};
  }
  close(folder);
  return {.folder = -1, .fault = path + ": " + fault};
}

bool read_all(int file, void *to, size_t bytes) {
  for (char *at = static_cast<char *>(to); bytes > 0;) {
    const ssize_t count = read(file, at, bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    at += count, bytes -= static_cast<size_t>(count);
  }
  return true;
}

bool write_all(int file, const void *from, size_t bytes) {
  for (const char *at = static_cast<const char *>(from); bytes > 0;) {
    const ssize_t count = write(file, at, bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    at += count, bytes -= static_cast<size_t>(count);
  }
  return true;
}

struct Entry {
  std::string name;
  int64_t bytes;
  timespec used;
};

bool used_before(const Entry &a, const Entry &b) {
  return a.used.tv_sec != b.used.tv_sec ? a.used.tv_sec < b.used.tv_sec : a.used.tv_nsec < b.used.tv_nsec;
}

// Cubins and what killed processes have left; nothing else in the folder is ours.
std::vector<Entry> list(int folder) {
  std::vector<Entry> entries;
  const int again = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *names = again < 0 ? nullptr : fdopendir(again);
  if (names == nullptr) {
    if (again >= 0) close(again);
    return entries;
  }
  while (const dirent *each = readdir(names)) {
    const std::string_view name = each->d_name;
    const bool is_cubin = name.size() == kKeyDigits + kSuffix.size() && name.ends_with(kSuffix);
    struct stat facts{};
    if (!is_cubin && !name.starts_with(kUnfinished)) continue;
    if (fstatat(folder, each->d_name, &facts, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(facts.st_mode)) continue;
    entries.push_back({std::string(name), facts.st_size, facts.st_mtim});
  }
  closedir(names);
  return entries;
}

void evict(int folder, int64_t max_bytes) {
  constexpr time_t kAbandonedSeconds = 3600;
  std::vector<Entry> entries = list(folder);
  std::sort(entries.begin(), entries.end(), used_before);
  int64_t bytes = 0;
  for (const Entry &entry : entries) bytes += entry.bytes;
  for (const Entry &entry : entries) {
    const bool unfinished = entry.name.starts_with(kUnfinished);
    const bool goes = unfinished ? entry.used.tv_sec < std::time(nullptr) - kAbandonedSeconds : bytes > max_bytes;
    if (!goes) continue;
    unlinkat(folder, entry.name.c_str(), 0);
    bytes -= entry.bytes;
  }
}

std::string unfinished_name() {
  std::random_device random;
  std::array<char, 17> digits{};
  std::snprintf(digits.data(), digits.size(), "%08x%08x", random(), random());
  return std::string(kUnfinished) + digits.data();
}

}  // namespace

std::optional<std::vector<char>> DiskCache::load(const std::string &key) const {
  const Descriptor folder(open_folder(folder_).folder);
  if (folder < 0) return std::nullopt;
  const Descriptor file(openat(folder, (key + std::string(kSuffix)).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  struct stat facts{};
  if (file < 0 || fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) return std::nullopt;
  Header found{};
  const int64_t length = facts.st_size - static_cast<int64_t>(sizeof found);
  if (length <= 0 || length > kMaxEntryBytes || !read_all(file, &found, sizeof found)) return std::nullopt;
  std::vector<char> cubin(static_cast<size_t>(length));
  if (!read_all(file, cubin.data(), cubin.size())) return std::nullopt;
  const Header expected = header_of(key, {cubin.data(), cubin.size()});
  if (std::memcmp(&found, &expected, sizeof found) != 0) return std::nullopt;
  futimens(file, nullptr);  // used now
  return cubin;
}

void DiskCache::store(const std::string &key, const std::vector<char> &cubin) const {
  const Header header = header_of(key, {cubin.data(), cubin.size()});
  if (static_cast<int64_t>(sizeof header + cubin.size()) > max_bytes_ || folder_.empty()) return;
  make_folders(folder_);
  const Descriptor folder(open_folder(folder_).folder);
  if (folder < 0) return;
  const std::string name = unfinished_name();
  bool whole = false;
  {
    const Descriptor file(openat(folder, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, kOwnerOnlyFile));
    if (file < 0) return;
    whole = write_all(file, &header, sizeof header) && write_all(file, cubin.data(), cubin.size());
  }
  if (!whole || renameat(folder, name.c_str(), folder, (key + std::string(kSuffix)).c_str()) != 0)
    unlinkat(folder, name.c_str(), 0);
  evict(folder, max_bytes_);
}

std::string DiskCache::description() const {
  Opened opened = open_folder(folder_);
  const Descriptor folder(opened.folder);
  if (folder < 0) return opened.fault;
  int64_t bytes = 0, cubins = 0;
  for (const Entry &entry : list(folder)) {
    bytes += entry.bytes;
    cubins += entry.name.ends_with(kSuffix) ? 1 : 0;
  }
  std::array<char, 96> counts{};
  std::snprintf(counts.data(), counts.size(), ", %lld cubins, %.1f of %lld MiB", static_cast<long long>(cubins),
                static_cast<double>(bytes) / (1 << 20), static_cast<long long>(max_bytes_ >> 20));
  return folder_ + counts.data();
}

}  // namespace flashspark::cuda
