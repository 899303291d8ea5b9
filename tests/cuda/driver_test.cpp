// What is said about a driver that is old, broken or without a GPU, and that a slice of a GPU is used as it is. The
// driver is asked once a process, so each case has one of its own.
#include "cuda/driver.hpp"

#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/fake_cuda.hpp"
#include "flashspark/flashspark.h"

namespace flashspark::cuda {
namespace {

// One sequence that decodes, in device memory that is never looked at.
flashspark_status call() {
  const auto tensor = [](uintptr_t n) {
    return flashspark_tensor{reinterpret_cast<void *>(n << 32), 1 << 20, 128, 128, FLASHSPARK_BFLOAT16, 0};
  };
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.device = FLASHSPARK_CUDA;
  p.num_seqs = p.num_heads_q = p.num_heads_kv = p.max_seqlen_q = 1;
  p.max_seqlen_k = 64;
  p.head_dim = p.head_dim_v = 128;
  p.q = tensor(1), p.k = tensor(2), p.v = tensor(3), p.out = tensor(4);
  return flashspark_attention_forward(&p);
}

// Ends the process: with 0 if the first call fails in this way and says this.
[[noreturn]] void expect_first_call(flashspark_status status, const std::string &part) {
  fake_cuda::set_current_device(0);
  const flashspark_status got = call();
  const std::string said = std::string(flashspark_last_error()) + "\n";
  std::fputs(said.c_str(), stderr);
  std::_Exit(got == status && said.find(part) != std::string::npos ? 0 : 1);
}

[[noreturn]] void cannot_start(Result init_result, const std::string &part) {
  fake_cuda::state().init_result = init_result;
  expect_first_call(FLASHSPARK_UNSUPPORTED, part);
}

[[noreturn]] void sees_none(const char *visible, const std::string &part) {
  setenv("CUDA_VISIBLE_DEVICES", visible, 1);
  cannot_start(kNoDevice, part);
}

[[noreturn]] void is_of_version(int version, Result load_result, flashspark_status status, const std::string &part) {
  fake_cuda::state().version = version;
  fake_cuda::state().load_result = load_result;
  expect_first_call(status, part);
}

class DriverDeath : public testing::Test {
 protected:
  void SetUp() override {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    unsetenv("CUDA_VISIBLE_DEVICES");
  }
};

#define EXPECT_SAID(statement) EXPECT_EXIT(statement, testing::ExitedWithCode(0), "")

TEST_F(DriverDeath, ThatDoesNotStartIsNamedWithItsRemedy) {
  EXPECT_SAID(cannot_start(999, "cuInit: CUDA_ERROR_UNKNOWN (999)"));
  EXPECT_SAID(cannot_start(3, "CUDA_ERROR_NOT_INITIALIZED (3): was CUDA initialised before fork()?"));
  EXPECT_SAID(cannot_start(34, "CUDA_ERROR_STUB_LIBRARY (34): libcuda.so.1 is the toolkit's stub"));
  EXPECT_SAID(cannot_start(46, "CUDA_ERROR_DEVICE_UNAVAILABLE (46): another process has the GPU to itself"));
  EXPECT_SAID(cannot_start(802, "CUDA_ERROR_SYSTEM_NOT_READY (802): the GPUs are not ready yet"));
  EXPECT_SAID(cannot_start(803, "MISMATCH (803): libcuda.so.1 and the kernel module are of different versions"));
  EXPECT_SAID(cannot_start(804, "ON_DEVICE (804): the container's CUDA is newer than the driver"));
}

TEST_F(DriverDeath, WithoutAGpuTheVariableThatHidesThemIsNamed) {
  EXPECT_SAID(cannot_start(kNoDevice, "no GPU: the NVIDIA driver finds none\n"));
  EXPECT_SAID(sees_none("", "finds none with CUDA_VISIBLE_DEVICES=\"\"\n"));
  EXPECT_SAID(sees_none("7", "finds none with CUDA_VISIBLE_DEVICES=7\n"));
}

// 525, 535: certainly too old. 550, 570: as old as the compiler's output is new, so the driver decides.
TEST_F(DriverDeath, ThatIsOldIsToBeUpdated) {
  const std::string update = "; update it to version 580 or newer";
  const auto refused = [&](int version, const std::string &name) {
    is_of_version(version, 0, FLASHSPARK_UNSUPPORTED,
                  "the NVIDIA driver offers " + name + ", too old to load the kernels" + update);
  };
  const auto failed = [&](int version, const std::string &name) {
    is_of_version(version, 200, FLASHSPARK_DEVICE_ERROR,
                  "the NVIDIA driver offers " + name +
                      " and does not load the kernels (cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE (200))" + update);
  };
  EXPECT_SAID(refused(12000, "CUDA 12.0"));
  EXPECT_SAID(refused(12020, "CUDA 12.2"));
  EXPECT_SAID(failed(12040, "CUDA 12.4"));
  EXPECT_SAID(failed(12080, "CUDA 12.8"));
  EXPECT_SAID(is_of_version(12080, 0, FLASHSPARK_OK, ""));
  EXPECT_SAID(
      is_of_version(13000, 200, FLASHSPARK_DEVICE_ERROR, "cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE (200)\n"));
  EXPECT_SAID(is_of_version(12080, kOutOfMemory, FLASHSPARK_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY (2)\n"));
}

[[noreturn]] void runs_on_a_slice() {
  fake_cuda::state().devices = {{"NVIDIA RTX PRO 6000 Blackwell MIG 1g.24gb", 12, 0, 14}};
  fake_cuda::set_current_device(0);
  const flashspark_status status = call();
  const bool launched = fake_cuda::state().launches.size() >= 1;
  std::fprintf(stderr, "%s\n", flashspark_last_error());
  std::_Exit(status == FLASHSPARK_OK && launched ? 0 : 1);
}

TEST_F(DriverDeath, ASliceOfAGpuIsADeviceWithFewerProcessors) {
  EXPECT_SAID(runs_on_a_slice());
}

}  // namespace
}  // namespace flashspark::cuda
