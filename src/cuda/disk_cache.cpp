#include "cuda/disk_cache.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string_view>

#include "cuda/cache_folder.hpp"
#include "cuda/compile_environment.hpp"
#include "cuda/sha256.hpp"

namespace flashspark::cuda {
namespace {

constexpr std::string_view kMagic = "FSCUBIN1", kSuffix = ".cubin", kUnfinished = ".unfinished-";
constexpr size_t kKeyDigits = 64;
constexpr int64_t kMaxEntryBytes = int64_t{1} << 30;

// An entry: this, then the cubin.
struct Header {
  std::array<char, 8> magic;
  std::array<char, kKeyDigits> key;
  uint64_t length;          // of the cubin
  Sha256::Digest checksum;  // of the cubin
};
static_assert(sizeof(Header) == 112);  // without padding: compared as bytes

Header header_of(const std::string &key, std::string_view cubin) {
  Header header{.magic = {}, .key = {}, .length = cubin.size(), .checksum = {}};
  std::copy(kMagic.begin(), kMagic.end(), header.magic.begin());
  std::copy_n(key.begin(), std::min(key.size(), kKeyDigits), header.key.begin());
  Sha256 sum;
  sum.add(cubin);
  header.checksum = sum.finish();
  return header;
}

std::string file_of(const std::string &key) {
  return key + std::string(kSuffix);
}

bool is_entry(std::string_view name) {
  return name.size() == kKeyDigits + kSuffix.size() && name.ends_with(kSuffix);
}

// Cubins and what killed processes have left; nothing else in the folder is ours.
std::vector<CacheFolder::File> list(const CacheFolder &folder) {
  std::vector<CacheFolder::File> files = folder.list();
  std::erase_if(files, [](const auto &file) { return !is_entry(file.name) && !file.name.starts_with(kUnfinished); });
  return files;
}

void evict(const CacheFolder &folder, int64_t max_bytes) {
  constexpr std::chrono::nanoseconds kAbandoned = std::chrono::hours(1);
  std::vector<CacheFolder::File> files = list(folder);
  std::sort(files.begin(), files.end(), [](const auto &a, const auto &b) { return a.used < b.used; });
  const int64_t now = std::chrono::nanoseconds(std::chrono::system_clock::now().time_since_epoch()).count();
  int64_t bytes = 0;
  for (const auto &file : files) bytes += file.bytes;
  for (const auto &file : files) {
    const bool unfinished = file.name.starts_with(kUnfinished);
    const bool goes = unfinished ? file.used < now - kAbandoned.count() : bytes > max_bytes;
    if (!goes) continue;
    folder.remove(file.name);
    bytes -= file.bytes;
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
  const CacheFolder folder(folder_);
  if (!folder.is_open()) return std::nullopt;
  auto bytes = folder.read(file_of(key), kMaxEntryBytes);
  if (!bytes || bytes->size() <= sizeof(Header)) return std::nullopt;
  const Header expected = header_of(key, {bytes->data() + sizeof(Header), bytes->size() - sizeof(Header)});
  if (std::memcmp(bytes->data(), &expected, sizeof expected) != 0) return std::nullopt;
  folder.mark_used(file_of(key));
  bytes->erase(bytes->begin(), bytes->begin() + sizeof(Header));
  return bytes;
}

void DiskCache::store(const std::string &key, const std::vector<char> &cubin) const {
  const Header header = header_of(key, {cubin.data(), cubin.size()});
  if (static_cast<int64_t>(sizeof header + cubin.size()) > max_bytes_ || folder_.empty()) return;
  CacheFolder::make(folder_);
  const CacheFolder folder(folder_);
  if (!folder.is_open()) return;
  const std::string name = unfinished_name();
  const std::string_view begin(reinterpret_cast<const char *>(&header), sizeof header);
  if (!folder.write(name, begin, {cubin.data(), cubin.size()}) || !folder.rename(name, file_of(key)))
    folder.remove(name);
  evict(folder, max_bytes_);
}

std::string DiskCache::description() const {
  if (folder_.empty())
    return std::string("no folder for it: ") + kHomeVariable + " and FLASHSPARK_CACHE_DIR are not set";
  const CacheFolder folder(folder_);
  if (!folder.is_open()) return folder.fault();
  int64_t bytes = 0, cubins = 0;
  for (const auto &file : list(folder)) {
    bytes += file.bytes;
    cubins += is_entry(file.name) ? 1 : 0;
  }
  std::array<char, 96> counts{};
  std::snprintf(counts.data(), counts.size(), ", %lld cubins, %.1f of %lld MiB", static_cast<long long>(cubins),
                static_cast<double>(bytes) / (1 << 20), static_cast<long long>(max_bytes_ >> 20));
  return folder_ + counts.data();
}

}  // namespace flashspark::cuda
