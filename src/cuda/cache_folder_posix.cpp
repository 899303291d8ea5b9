#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "cuda/cache_folder.hpp"

namespace flashspark::cuda {
namespace {

constexpr mode_t kOwnerOnlyFolder = 0700, kOwnerOnlyFile = 0600;

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

// Why a folder is not used, or "".
std::string fault_of(int folder) {
  if (folder < 0) return std::strerror(errno);
  struct stat facts{};
  if (fstat(folder, &facts) != 0) return std::strerror(errno);
  if (facts.st_uid != geteuid()) return "not used, since another user owns it";
  if ((facts.st_mode & (S_IWGRP | S_IWOTH)) != 0) return "not used, since others may write to it: chmod go-w";
  return "";
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

bool write_all(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t count = ::write(file, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

}  // namespace

void CacheFolder::make(const std::string &path) {
  for (size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1))
    mkdir(path.substr(0, end).c_str(), kOwnerOnlyFolder);
  mkdir(path.c_str(), kOwnerOnlyFolder);
}

CacheFolder::CacheFolder(const std::string &path)
    : folder_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), fault_(fault_of(folder_)) {
  if (!fault_.empty()) fault_ = path + ": " + fault_;
}

CacheFolder::~CacheFolder() {
  if (folder_ >= 0) close(folder_);
}

std::vector<CacheFolder::File> CacheFolder::list() const {
  std::vector<File> files;
  const int again = openat(folder_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  DIR *names = again < 0 ? nullptr : fdopendir(again);
  if (names == nullptr) {
    if (again >= 0) close(again);
    return files;
  }
  while (const dirent *each = readdir(names)) {
    struct stat facts{};
    if (fstatat(folder_, each->d_name, &facts, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(facts.st_mode)) continue;
    files.push_back(
        {each->d_name, facts.st_size, int64_t{facts.st_mtim.tv_sec} * 1'000'000'000 + facts.st_mtim.tv_nsec});
  }
  closedir(names);
  return files;
}

std::optional<std::vector<char>> CacheFolder::read(const std::string &name, int64_t max_bytes) const {
  const Descriptor file(openat(folder_, name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC));
  struct stat facts{};
  if (file < 0 || fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode) || facts.st_size > max_bytes) return std::nullopt;
  std::vector<char> bytes(static_cast<size_t>(facts.st_size));
  if (!read_all(file, bytes.data(), bytes.size())) return std::nullopt;
  return bytes;
}

bool CacheFolder::write(const std::string &name, std::string_view begin, std::string_view rest) const {
  const Descriptor file(openat(folder_, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, kOwnerOnlyFile));
  return file >= 0 && write_all(file, begin) && write_all(file, rest);
}

bool CacheFolder::rename(const std::string &from, const std::string &to) const {
  return renameat(folder_, from.c_str(), folder_, to.c_str()) == 0;
}

void CacheFolder::remove(const std::string &name) const {
  unlinkat(folder_, name.c_str(), 0);
}

void CacheFolder::mark_used(const std::string &name) const {
  utimensat(folder_, name.c_str(), nullptr, AT_SYMLINK_NOFOLLOW);
}

}  // namespace flashspark::cuda
