// Compilation at run time with the real NVRTC, without a GPU: what is embedded is enough for the kernels, errors name
// what the user wrote, and what is said where NVRTC is missing or old.
#include "cuda/nvrtc.hpp"

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <link.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>

#include "cuda/compile_environment.hpp"
#include "cuda/kernel_sources.hpp"
#include "cuda/processes.hpp"
#include "cuda/sha256.hpp"
#include "error.hpp"

namespace flashspark::cuda {
namespace {

constexpr uint16_t kCudaMachine = 190;  // ELF's e_machine of a cubin
constexpr size_t kMachineOffset = 18;

CompileRequest forward(const std::string &instance, const std::string &architecture) {
  return {.source = "#include \"forward/forward.cu\"\n",
          .entry = "flashspark_test_" + instance,
          .macros = {"FLASHSPARK_NAME=" + instance, "FLASHSPARK_ELEMENT=Bfloat16"},
          .architecture = architecture,
          .headers = {},
          .user_source = false};
}

// One thread that writes what an expression gives.
CompileRequest small(const std::string &expression) {
  return {.source =
              "#include \"ptx/ptx.cuh\"\n"
              "FLASHSPARK_KERNEL(32, 1) FLASHSPARK_ENTRY(float *out) { *out = " +
              expression + "; }\n",
          .entry = "small",
          .macros = {},
          .architecture = "sm_90",
          .headers = {},
          .user_source = false};
}

void expect_cubin(const std::vector<char> &cubin, const std::string &entry) {
  ASSERT_GT(cubin.size(), size_t{1000});
  EXPECT_EQ(std::memcmp(cubin.data(), "\177ELF", 4), 0);
  uint16_t machine = 0;
  std::memcpy(&machine, cubin.data() + kMachineOffset, sizeof machine);
  EXPECT_EQ(machine, kCudaMachine);
  const std::string bytes(cubin.begin(), cubin.end());
  EXPECT_NE(bytes.find(".text." + entry + '\0'), bytes.npos);
}

struct Failure {
  flashspark_status status = FLASHSPARK_OK;
  std::string text;
};
Failure failure(const CompileRequest &request) {
  try {
    compile(request);
  } catch (const Error &e) {
    return {e.status(), e.what()};
  }
  return {};
}

TEST(Sha256, StandardExamples) {
  const auto hash = [](std::string_view text, size_t step) {
    Sha256 sum;
    for (; !text.empty(); text.remove_prefix(std::min(step, text.size()))) sum.add(text.substr(0, step));
    return sum.finish_hex();
  };
  EXPECT_EQ(hash("", 1), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 5),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  for (const size_t step : {1u, 63u, 64u, 65u, 1000000u}) {
    EXPECT_EQ(hash(std::string(1000000, 'a'), step),
              "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  }
}

TEST(KernelSources, AreThereUnderTheNamesByWhichTheyAreIncluded) {
  size_t found = 0, bytes = 0;
  for (const SourceFile &file : kernel_sources()) {
    EXPECT_EQ(std::strlen(file.text.data()), file.text.size()) << file.name;
    EXPECT_FALSE(file.text.empty()) << file.name;
    bytes += file.text.size();
    for (const char *name : {"forward/forward.cu", "forward/kernel.cuh", "forward/scheduler/stream_k.cuh",
                             "kernels.def", "ptx/ptx.cuh", "cstdint", "type_traits", "prelude.hpp"})
      found += std::strcmp(file.name, name) == 0 ? 1 : 0;
  }
  EXPECT_EQ(found, 8u);
  EXPECT_GT(bytes, size_t{100000});
  EXPECT_EQ(kernel_sources_hash().size(), 64u);
}

TEST(Nvrtc, CompilesAForwardKernelFromWhatIsEmbedded) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  for (const char *architecture : {"sm_120f", "sm_90", "sm_80"}) {
    const CompileRequest request = forward("d128_prefill_mod", architecture);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<char> cubin = compile(request);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("  %s for %s: %.2f s, %zu bytes\n", request.entry.c_str(), architecture, seconds.count(), cubin.size());
    expect_cubin(cubin, request.entry);
  }
}

TEST(Nvrtc, CompilesInSeveralThreads) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  std::vector<std::vector<char>> cubins(8);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < cubins.size(); ++i)
    threads.emplace_back([&cubins, i] { cubins[i] = compile(small(std::to_string(i / 2) + ".0f")); });
  for (std::thread &thread : threads) thread.join();
  for (size_t i = 0; i < cubins.size(); i += 2) {
    expect_cubin(cubins[i], "small");
    EXPECT_EQ(cubins[i], cubins[i + 1]);
    EXPECT_NE(cubins[i], cubins[(i + 2) % cubins.size()]);
  }
}

TEST(Nvrtc, HasTheBuiltinsThatKernelsUse) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  CompileRequest request = small("__builtin_fmaxf(*out, __builtin_fminf(*out + 1, -__builtin_huge_valf()))");
  request.source =
      "#include <cstdint>\n#include <type_traits>\n" + request.source +
      "static_assert(sizeof(uintptr_t) == 8 && sizeof(int64_t) == 8 && sizeof(int32_t) == 4 && sizeof(uint8_t) == 1);\n"
      "static_assert(std::is_same_v<std::conditional_t<false, float, int8_t>, signed char> && int16_t(-1) < 0);\n"
      "static_assert(INT32_MAX > 0 && INT32_MIN < 0 && INT32_MAX + INT32_MIN == -1 && UINT32_MAX + 1 == 0);\n";
  expect_cubin(compile(request), "small");
}

TEST(Nvrtc, ErrorsInTheUsersTextNameItsFileAndLine) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  CompileRequest request = small("user(1.0f)");
  request.user_source = true;
  request.headers = {{"bias.cuh", "__device__ float user(float x) {\n  return x +\n      unknown;\n}\n"}};
  request.source = "#include \"bias.cuh\"\n" + request.source;
  Failure f = failure(request);
  EXPECT_EQ(f.status, FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(f.text.rfind("the function does not compile:\nbias.cuh(3): error: identifier \"unknown\"", 0), 0u)
      << f.text;
  EXPECT_NE(f.text.back(), '\n');

  request.source = "// ours\n\n#line 1 \"score_mod\"\n" + request.headers[0].text + small("user(1.0f)").source;
  request.headers.clear();
  f = failure(request);
  EXPECT_EQ(f.status, FLASHSPARK_INVALID_ARGUMENT);
  EXPECT_EQ(f.text.rfind("the function does not compile:\nscore_mod(3): error", 0), 0u) << f.text;

  request.source.clear();
  for (int i = 0; i < 1000; ++i)
    request.source += "int x" + std::to_string(i) + " = unknown" + std::to_string(i) + ";\n";
  f = failure(request);
  EXPECT_LT(f.text.size(), size_t{4200});
}

TEST(Nvrtc, ErrorsInOurTextAreInternal) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  const Failure f = failure(small("unknown"));
  EXPECT_EQ(f.status, FLASHSPARK_INTERNAL);
  EXPECT_NE(f.text.find("compiling small for sm_90:\nkernel.cu(2): error: identifier \"unknown\""), f.text.npos)
      << f.text;
  CompileRequest request = small("1.0f");
  request.architecture = "sm_1";
  request.user_source = true;  // who cannot do anything about it
  EXPECT_EQ(failure(request).status, FLASHSPARK_INTERNAL);
  EXPECT_NE(failure(request).text.find("sm_1"), std::string::npos);
}

TEST(Nvrtc, IncludesNothingFromTheCurrentFolder) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  const TemporaryFolder folder;
  const std::filesystem::path before = std::filesystem::current_path();
  std::filesystem::create_directory(folder.path / "ptx");
  write_file(folder.path / "ptx/ptx.cuh", "#error the wrong file\n");
  write_file(folder.path / "other.cuh", "");
  std::filesystem::current_path(folder.path);
  EXPECT_EQ(failure(small("1.0f")).text, "");
  CompileRequest request = small("1.0f");
  request.source += "#include \"other.cuh\"\n";
  EXPECT_NE(failure(request).text.find("other.cuh"), std::string::npos);
  std::filesystem::current_path(before);
}

// NVRTC is loaded once a process, so these tests have processes of their own.
std::string refusal(const std::string &file, const std::string &fault) {
  setenv("FLASHSPARK_NVRTC", file.c_str(), 1);
  const Failure f = failure(small("1.0f"));
  const bool right = f.status == FLASHSPARK_UNSUPPORTED &&
                     f.text.rfind("FLASHSPARK_NVRTC = " + file + ": " + fault, 0) == 0 &&
                     f.text.find("pip install nvidia-cuda-nvrtc") != f.text.npos && nvrtc_description() == f.text;
  return right ? "" : "wrong: " + f.text;
}

TEST(NvrtcDeathTest, MissingNamesTheMend) {
  expect_in_a_process([] { return refusal("/no/such/libnvrtc.so.13", "/no/such/libnvrtc.so.13: cannot open"); });
}

TEST(NvrtcDeathTest, AnotherLibraryNamesTheMend) {
  expect_in_a_process([] {
    Dl_info libm{};
    dladdr(dlsym(dlopen("libm.so.6", RTLD_NOW), "expf"), &libm);
    return refusal(libm.dli_fname, std::string(libm.dli_fname) + " is no NVRTC");
  });
}

#if defined(FLASHSPARK_TEST_FAKE_NVRTC)
TEST(NvrtcDeathTest, TooOldNamesTheMend) {
  expect_in_a_process(
      [] { return refusal(FLASHSPARK_TEST_FAKE_NVRTC, FLASHSPARK_TEST_FAKE_NVRTC " is 12.8; CUDA 12.9"); });
}

TEST(NvrtcDeathTest, AnOldOneDoesNotHideANewerOne) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  expect_in_a_process([]() -> std::string {
    const TemporaryFolder folder;
    std::filesystem::copy_file(FLASHSPARK_TEST_FAKE_NVRTC, folder.path / "libnvrtc.so.12");
    set_nvrtc_search_path("/no/such:" + folder.path.string() + "::");
    return nvrtc_description() == description_in_a_child() ? "" : nvrtc_description();
  });
}
#endif

bool is_loaded(const std::string &path) {
  std::pair<const std::string *, bool> search{&path, false};
  dl_iterate_phdr(
      [](dl_phdr_info *info, size_t, void *data) {
        auto &[wanted, found] = *static_cast<std::pair<const std::string *, bool> *>(data);
        found = found || *wanted == info->dlpi_name;
        return 0;
      },
      &search);
  return search.second;
}

TEST(NvrtcDeathTest, LoadsWhatLiesInTheSearchPathAndItsBuiltins) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  expect_in_a_process([]() -> std::string {
    const std::string &found = description_in_a_child();
    unsetenv("FLASHSPARK_NVRTC");  // which comes before every search
    const auto real = std::filesystem::canonical(found.substr(found.find('/'))).parent_path();
    const TemporaryFolder folder;
    for (const std::string &name : names_in(real)) {
      if (name.starts_with("libnvrtc")) std::filesystem::create_symlink(real / name, folder.path / name);
    }
    set_nvrtc_search_path("/no/such:" + folder.path.string());
    if (nvrtc_description().find(folder.path.string() + "/libnvrtc.so.1") == std::string::npos)
      return nvrtc_description();
    if (const Failure f = failure(small("1.0f")); f.status != FLASHSPARK_OK) return f.text;
    return is_loaded(folder.path / ("libnvrtc-builtins.so." + nvrtc_version())) ? "" : "other builtins";
  });
}

TEST(NvrtcDeathTest, WhatIsLoadedAlreadyIsTaken) {
  if (!has_nvrtc()) GTEST_SKIP() << description_in_a_child();
  expect_in_a_process([]() -> std::string {
    const std::string &found = description_in_a_child();
    const TemporaryFolder folder;
    const std::filesystem::path link = folder.path / "as_torch_does.so";
    std::filesystem::create_symlink(std::filesystem::canonical(found.substr(found.find('/'))), link);
    if (dlopen(link.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) return dlerror();
    return nvrtc_description().ends_with(link.string()) ? "" : nvrtc_description();
  });
}

TEST(CompileEnvironment, RightValuesAreTaken) {
  CompileEnvironment e = read_compile_environment({});
  EXPECT_EQ(e.error + e.nvrtc + e.cache_folder + e.cuda_home, "");
  EXPECT_TRUE(e.cache);
  EXPECT_EQ(e.cache_bytes, 256 << 20);
  e = read_compile_environment({.nvrtc = "", .cuda_home = "", .cache = "", .cache_dir = "", .cache_max_mb = ""});
  EXPECT_EQ(e.error + e.nvrtc + e.cache_folder + e.cuda_home, "");
  EXPECT_EQ(read_compile_environment({.home = "/h"}).cache_folder, "/h/.cache/flashspark/kernels");
  EXPECT_EQ(read_compile_environment({.xdg_cache_home = "/x", .home = "/h"}).cache_folder, "/x/flashspark/kernels");
  EXPECT_EQ(read_compile_environment({.xdg_cache_home = "x", .home = "/h"}).cache_folder,
            "/h/.cache/flashspark/kernels");
  e = read_compile_environment({.nvrtc = "/l", .cache = "0", .cache_dir = "/c", .cache_max_mb = "3", .home = "/h"});
  EXPECT_EQ(e.error, "");
  EXPECT_EQ(e.nvrtc, "/l");
  EXPECT_EQ(e.cache_folder, "/c");
  EXPECT_EQ(e.cache_bytes, 3 << 20);
  EXPECT_FALSE(e.cache);
}

TEST(CompileEnvironment, WrongValuesNameTheSwitchItsValueAndTheRule) {
  EXPECT_EQ(read_compile_environment({.nvrtc = "libnvrtc.so"}).error,
            "FLASHSPARK_NVRTC = libnvrtc.so: must be the absolute path of libnvrtc.so.12 or libnvrtc.so.13");
  EXPECT_EQ(read_compile_environment({.cache_dir = "c"}).error, "FLASHSPARK_CACHE_DIR = c: must be an absolute path");
  for (const std::string value : {"2", "no", " 1", "01"})
    EXPECT_EQ(read_compile_environment({.cache = value.c_str()}).error,
              "FLASHSPARK_CACHE = " + value + ": must be 0 or 1");
  for (const std::string value : {"0", "-1", "1048577", "1.5", "1 ", "+1", "x", "99999999999999999999"}) {
    const CompileEnvironment e = read_compile_environment({.cache_max_mb = value.c_str()});
    EXPECT_EQ(e.error, "FLASHSPARK_CACHE_MAX_MB = " + value + ": must be a number from 1 to 1048576");
    EXPECT_EQ(e.cache_bytes, 256 << 20);
  }
}

}  // namespace
}  // namespace flashspark::cuda
