// The cache of cubins: what a key is made of, threads and processes that ask at once, damaged and foreign files, and
// its bound. Most of it with a compiler that is none.
#include "cuda/compile_cache.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <set>
#include <thread>

#include "cuda/processes.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr unsigned kNobody = 65534;

CompileRequest request(const std::string &source) {
  return {.source = source, .entry = "e", .macros = {}, .architecture = "sm_90", .headers = {}, .user_source = false};
}

std::string key_of(int n) {
  std::string key(64, 'a');
  key.replace(0, 4, std::to_string(1000 + n));
  return key;
}

std::vector<char> cubin_of(size_t bytes, int seed = 1) {
  std::vector<char> cubin(bytes);
  for (size_t i = 0; i < bytes; ++i) cubin[i] = static_cast<char>(i * 31 + static_cast<size_t>(seed));
  return cubin;
}

// Its "cubins" are the sources.
struct FakeCompiler {
  std::atomic<int> calls{0};
  std::chrono::milliseconds takes{0};
  std::string fault;

  Compiler compiler() {
    return {.version = [] { return std::string("1.0"); },
            .compile =
                [this](const CompileRequest &r) {
                  ++calls;
                  std::this_thread::sleep_for(takes);
                  if (!fault.empty()) throw Error(FLASHSPARK_INTERNAL, fault);
                  return std::vector<char>(r.source.begin(), r.source.end());
                }};
  }
};

std::string text_of(const Cubin &cubin) {
  return {cubin->begin(), cubin->end()};
}

TEST(CacheKey, EverythingThatMattersIsInIt) {
  const CompileRequest plain = request("source");
  std::vector<CompileRequest> others(11, plain);
  others[0].source = "other";
  others[1].entry = "f";
  others[2].macros = {"A"};
  others[3].macros = {"A", "B"};
  others[4].macros = {"A-DB"};
  others[5].macros = {"B", "A"};
  others[6].architecture = "sm_80";
  others[7].headers = {{"h", "text"}};
  others[8].headers = {{"ht", "ext"}};
  others[9].headers = {{"h", "text"}, {"", ""}};
  others[10].source = "";
  std::set<std::string> keys = {cache_key(plain, "13.0"), cache_key(plain, "13.1")};
  for (const CompileRequest &other : others) keys.insert(cache_key(other, "13.0"));
  EXPECT_EQ(keys.size(), others.size() + 2);
  for (const std::string &key : keys) EXPECT_EQ(key.find_first_not_of("0123456789abcdef"), key.npos);
  CompileRequest users = plain;
  users.user_source = true;  // says who is to blame, not what the cubin is
  EXPECT_EQ(cache_key(users, "13.0"), cache_key(plain, "13.0"));
}

TEST(CompileCache, ThreadsThatAskAtOnceWaitForOneCompilation) {
  FakeCompiler fake;
  fake.takes = std::chrono::milliseconds(100);
  CompileCache cache(fake.compiler(), DiskCache("", kMiB));
  std::vector<Cubin> cubins(32);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < cubins.size(); ++i)
    threads.emplace_back([&, i] { cubins[i] = cache.get(request("source " + std::to_string(i % 2))); });
  for (std::thread &thread : threads) thread.join();
  EXPECT_EQ(fake.calls, 2);
  for (size_t i = 0; i < cubins.size(); ++i) {
    EXPECT_EQ(cubins[i], cubins[i % 2]);
    EXPECT_EQ(text_of(cubins[i]), "source " + std::to_string(i % 2));
  }
}

TEST(CompileCache, AFailureReachesAllThatWaitAndIsNotKept) {
  FakeCompiler fake;
  fake.takes = std::chrono::milliseconds(100);
  fake.fault = "broken";
  const TemporaryFolder folder;
  CompileCache cache(fake.compiler(), DiskCache(folder.path, kMiB));
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      try {
        cache.get(request("source"));
      } catch (const Error &e) {
        failures += e.status() == FLASHSPARK_INTERNAL && std::string(e.what()) == "broken" ? 1 : 0;
      }
    });
  }
  for (std::thread &thread : threads) thread.join();
  EXPECT_EQ(failures, 8);
  EXPECT_TRUE(names_in(folder.path).empty());
  fake.fault.clear();
  EXPECT_EQ(text_of(cache.get(request("source"))), "source");
}

TEST(CompileCache, MemoryHoldsABoundedNumber) {
  FakeCompiler fake;
  CompileCache cache(fake.compiler(), DiskCache("", kMiB));
  for (int i = 0; i < 1000; ++i) cache.get(request(std::to_string(i)));
  EXPECT_EQ(fake.calls, 1000);
  cache.get(request("999"));
  EXPECT_EQ(fake.calls, 1000);
  cache.get(request("0"));
  EXPECT_EQ(fake.calls, 1001);
}

TEST(CompileCache, AnotherProcessFindsItOnTheDisk) {
  const TemporaryFolder folder;
  const std::filesystem::path nested = folder.path / "a/b";
  FakeCompiler first, second;
  EXPECT_EQ(text_of(CompileCache(first.compiler(), DiskCache(nested, kMiB)).get(request("source"))), "source");
  EXPECT_EQ(text_of(CompileCache(second.compiler(), DiskCache(nested, kMiB)).get(request("source"))), "source");
  EXPECT_EQ(first.calls, 1);
  EXPECT_EQ(second.calls, 0);
  ASSERT_EQ(names_in(nested).size(), 1u);
  EXPECT_EQ(mode_of(nested / names_in(nested)[0]), 0600u);
  EXPECT_EQ(mode_of(nested), 0700u);
  EXPECT_EQ(mode_of(folder.path / "a"), 0700u);
}

TEST(DiskCache, DamagedEntriesAreIgnoredAndReplaced) {
  const TemporaryFolder folder;
  const DiskCache disk(folder.path, kMiB);
  const std::vector<char> cubin = cubin_of(200);
  disk.store(key_of(0), cubin);
  ASSERT_EQ(names_in(folder.path).size(), 1u);
  const std::filesystem::path file = folder.path / names_in(folder.path)[0];
  const std::string whole = read_file(file);
  ASSERT_GT(whole.size(), cubin.size());
  std::vector<std::string> damaged = {"", whole + "x", whole + whole, std::string(whole.size(), '\0')};
  for (size_t i = 0; i < whole.size(); ++i) {
    damaged.push_back(whole.substr(0, i));
    damaged.push_back(whole);
    damaged.back()[i] ^= 1;
  }
  for (const std::string &text : damaged) {
    write_file(file, text);
    ASSERT_FALSE(disk.load(key_of(0)));
  }
  std::filesystem::copy_file(file, folder.path / (key_of(1) + ".cubin"));
  write_file(folder.path / (key_of(1) + ".cubin"), whole);  // another entry's bytes
  EXPECT_FALSE(disk.load(key_of(1)));
  std::filesystem::remove(file);
  std::filesystem::create_symlink(folder.path / (key_of(1) + ".cubin"), file);
  EXPECT_FALSE(disk.load(key_of(0)));
  disk.store(key_of(0), cubin);
  EXPECT_EQ(disk.load(key_of(0)), cubin);
  EXPECT_EQ(read_file(file), whole);
  EXPECT_FALSE(std::filesystem::is_symlink(file));
}

TEST(DiskCache, UnusableFoldersAreAsIfEmpty) {
  const TemporaryFolder folder;
  write_file(folder.path / "file", "");
  for (const std::string &path : {std::string(), (folder.path / "file").string(), (folder.path / "file/x").string(),
                                  std::string("/proc/no/such"), std::string("/dev/null")}) {
    const DiskCache disk(path, kMiB);
    disk.store(key_of(0), cubin_of(10));
    EXPECT_FALSE(disk.load(key_of(0))) << path;
    EXPECT_NE(disk.description(), "");
    EXPECT_EQ(disk.description().find("cubins,"), std::string::npos) << disk.description();
  }
  EXPECT_EQ(read_file(folder.path / "file"), "");
}

TEST(DiskCache, OthersMayNotBeAbleToWrite) {
  for (const mode_t mode : {0720, 0702, 0777, 01777}) {
    const TemporaryFolder folder;
    const DiskCache disk(folder.path, kMiB);
    disk.store(key_of(0), cubin_of(10));
    chmod(folder.path.c_str(), mode);
    EXPECT_FALSE(disk.load(key_of(0)));
    disk.store(key_of(1), cubin_of(10));
    EXPECT_EQ(names_in(folder.path).size(), 1u);
    EXPECT_EQ(disk.description(), folder.path.string() + ": not used, since others may write to it: chmod go-w");
  }
}

TEST(DiskCache, AnotherUsersFolderIsNotUsed) {
  if (geteuid() != 0) {
    const DiskCache disk("/usr", kMiB);
    disk.store(key_of(0), cubin_of(10));
    EXPECT_EQ(disk.description(), "/usr: not used, since another user owns it");
    return;
  }
  const TemporaryFolder folder;
  const DiskCache disk(folder.path, kMiB);
  disk.store(key_of(0), cubin_of(10));
  ASSERT_EQ(chown(folder.path.c_str(), kNobody, kNobody), 0);
  EXPECT_FALSE(disk.load(key_of(0)));
  disk.store(key_of(1), cubin_of(10));
  EXPECT_EQ(names_in(folder.path).size(), 1u);
  EXPECT_EQ(disk.description(), folder.path.string() + ": not used, since another user owns it");
}

TEST(DiskCache, AReadOnlyFolderStillServes) {
  EXPECT_TRUE(succeeded(start([] {
    // Root may write everywhere.
    if (geteuid() == 0 && (setegid(kNobody) != 0 || seteuid(kNobody) != 0)) return false;
    const TemporaryFolder folder;
    const DiskCache disk(folder.path, kMiB);
    disk.store(key_of(0), cubin_of(10));
    chmod(folder.path.c_str(), 0500);
    disk.store(key_of(1), cubin_of(10));
    disk.store(key_of(0), cubin_of(20));
    const bool right =
        disk.load(key_of(0)) == cubin_of(10) && !disk.load(key_of(1)) && names_in(folder.path).size() == 1;
    FakeCompiler fake;
    const bool compiles = text_of(CompileCache(fake.compiler(), disk).get(request("source"))) == "source";
    chmod(folder.path.c_str(), 0700);
    return right && compiles;
  })));
}

TEST(DiskCache, ProcessesThatStoreAtOnceLeaveWholeEntries) {
  const TemporaryFolder folder;
  constexpr int kProcesses = 4, kKeys = 5, kRounds = 100;
  std::vector<pid_t> children;
  for (int process = 0; process < kProcesses; ++process) {
    children.push_back(start([&] {
      const DiskCache disk(folder.path / "made by all", kMiB);
      for (int round = 0; round < kRounds; ++round) {
        const int n = (round + process) % kKeys;
        disk.store(key_of(n), cubin_of(20000, n));
        if (disk.load(key_of(n)) != cubin_of(20000, n)) return false;
      }
      return true;
    }));
  }
  for (const pid_t child : children) EXPECT_TRUE(succeeded(child));
  EXPECT_EQ(names_in(folder.path / "made by all").size(), size_t{kKeys});
}

// As if the entry had last been used so many seconds ago.
void age(const std::filesystem::path &file, int seconds) {
  const timespec then{.tv_sec = std::time(nullptr) - seconds, .tv_nsec = 0}, times[2] = {then, then};
  ASSERT_EQ(utimensat(AT_FDCWD, file.c_str(), times, 0), 0);
}

TEST(DiskCache, EntriesThatWereNotUsedForLongestGo) {
  const TemporaryFolder folder;
  const DiskCache disk(folder.path, kMiB);
  const auto file = [&](int n) { return folder.path / (key_of(n) + ".cubin"); };
  for (int n = 0; n < 4; ++n) {
    disk.store(key_of(n), cubin_of(200 << 10, n));
    age(file(n), 1000 - n);
  }
  write_file(folder.path / "mine.txt", std::string(2 * kMiB, 'x'));
  write_file(folder.path / "short.cubin", std::string(2 * kMiB, 'x'));
  write_file(folder.path / ".unfinished-0", "left by a process that was killed");
  age(folder.path / ".unfinished-0", 4000);
  write_file(folder.path / ".unfinished-1", "being written");
  EXPECT_TRUE(disk.load(key_of(0)));  // used just now
  disk.store(key_of(4), cubin_of(200 << 10, 4));
  EXPECT_EQ(names_in(folder.path).size(), 8u);
  disk.store(key_of(5), cubin_of(300 << 10, 5));  // two must go
  EXPECT_FALSE(disk.load(key_of(1)));
  EXPECT_FALSE(disk.load(key_of(2)));
  for (const int n : {0, 3, 4}) EXPECT_EQ(disk.load(key_of(n)), cubin_of(200 << 10, n));
  EXPECT_EQ(disk.load(key_of(5)), cubin_of(300 << 10, 5));
  EXPECT_EQ(disk.description(), folder.path.string() + ", 4 cubins, 0.9 of 1 MiB");
  disk.store(key_of(6), cubin_of(kMiB, 6));  // with its header it is larger than all may be
  EXPECT_FALSE(disk.load(key_of(6)));
  for (const int n : {0, 3, 4}) EXPECT_TRUE(disk.load(key_of(n)));
  EXPECT_TRUE(std::filesystem::exists(folder.path / "mine.txt"));
  EXPECT_TRUE(std::filesystem::exists(folder.path / "short.cubin"));
  EXPECT_FALSE(std::filesystem::exists(folder.path / ".unfinished-0"));
  EXPECT_TRUE(std::filesystem::exists(folder.path / ".unfinished-1"));
}

// With NVRTC, in processes whose environment says where to keep cubins.
Cubin real_cubin(const char *what) {
  CompileRequest r = request("#include \"forward/forward.cu\"\n");
  r.macros = {"FLASHSPARK_NAME=d128_prefill_mod", "FLASHSPARK_ELEMENT=Bfloat16"};
  nvrtc_version();  // loads it
  const auto begin = std::chrono::steady_clock::now();
  Cubin cubin = cubin_for(r);
  const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
  std::printf("  %s: %.2f ms, %zu bytes\n", what, ms.count(), cubin->size());
  std::fflush(stdout);
  return cubin;
}

bool compiles(const char *what) {
  const Cubin cubin = real_cubin(what);
  return cubin->size() > 1000 && real_cubin("the same process again") == cubin;
}

TEST(CubinForDeathTest, TwoProcessesAtOnceAndOneThatComesLater) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  expect_in_a_process([]() -> std::string {
    const TemporaryFolder folder;
    setenv("FLASHSPARK_CACHE_DIR", folder.path.c_str(), 1);
    const pid_t one = start([] { return compiles("one of two at once"); });
    const pid_t two = start([] { return compiles("two of two at once"); });
    if (!succeeded(one) || !succeeded(two) || names_in(folder.path).size() != 1) return "two at once fail";
    if (!succeeded(start([] { return compiles("from the disk"); }))) return "one that comes later fails";
    const std::string said = compile_cache_description();
    return said == folder.path.string() + ", 1 cubins, 0.1 of 256 MiB" ? "" : said;
  });
}

TEST(CubinForDeathTest, NothingIsKeptWhereTheCacheIsOff) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  expect_in_a_process([]() -> std::string {
    const TemporaryFolder folder;
    setenv("FLASHSPARK_CACHE_DIR", folder.path.c_str(), 1);
    setenv("FLASHSPARK_CACHE", "0", 1);
    if (!compiles("cache off")) return "fails";
    if (!names_in(folder.path).empty()) return "something is kept";
    return compile_cache_description() == "off: FLASHSPARK_CACHE is 0" ? "" : compile_cache_description();
  });
}

}  // namespace
}  // namespace flashspark::cuda
