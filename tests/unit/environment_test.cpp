// The switches of the environment: what each of them takes, and that a wrong value is an error of every call.
#include "environment.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "cpu/tile.hpp"
#include "error.hpp"
#include "flashspark/flashspark.h"

namespace flashspark {
namespace {

TEST(Environment, RightValuesAreTaken) {
  for (const char *unset : {static_cast<const char *>(nullptr), ""}) {
    const Environment e = read_environment(unset, unset, unset);
    EXPECT_EQ(e.error, "");
    EXPECT_EQ(e.cpu_target, "");
    EXPECT_EQ(e.num_threads, 0);
    EXPECT_FALSE(e.check);
  }
  for (const cpu::Kernels *kernels : cpu::all_kernels()) {
    const Environment e = read_environment(kernels->target, "3", "1");
    EXPECT_EQ(e.error, "");
    EXPECT_EQ(e.cpu_target, kernels->target);
    EXPECT_EQ(e.num_threads, 3);
    EXPECT_TRUE(e.check);
  }
  EXPECT_EQ(read_environment(nullptr, "1024", "0").num_threads, 1024);
  EXPECT_EQ(read_environment(nullptr, "0", "0").error, "");
}

TEST(Environment, WrongValuesNameTheSwitchItsValueAndTheRule) {
  const std::string best = cpu::all_kernels().front()->target;
  for (const std::string value : {"avx2", "AVX9", " ", "0", "sse4", "AVX2 ", "AVX2,SSE4"}) {
    const Environment e = read_environment(value.c_str(), nullptr, nullptr);
    EXPECT_EQ(e.error.rfind("FLASHSPARK_CPU_TARGET = " + value + ": must be", 0), 0u) << e.error;
    EXPECT_NE(e.error.find(best), std::string::npos) << e.error;
    EXPECT_EQ(e.cpu_target, "");
  }
  for (const std::string value :
       {"-1", "1025", "four", "2x", "1.5", " 2", "2 ", "+2", "0x2", "99999999999999999999", "nan"}) {
    const Environment e = read_environment(nullptr, value.c_str(), nullptr);
    EXPECT_EQ(e.error, "FLASHSPARK_NUM_THREADS = " + value + ": must be a number from 0 (all CPUs) to 1024");
    EXPECT_EQ(e.num_threads, 0);
  }
  for (const std::string value : {"2", "yes", "true", "01", " 1", "-1", "on"}) {
    EXPECT_EQ(read_environment(nullptr, nullptr, value.c_str()).error,
              "FLASHSPARK_CHECK = " + value + ": must be 0 or 1");
  }
  EXPECT_EQ(read_environment("x", "y", "z").error.rfind("FLASHSPARK_CPU_TARGET = x", 0), 0u);
}

// The switches are read once, so each wrong one is tried in a process of its own.
void call_everything(const char *name, const char *value) {
  setenv(name, value, 1);
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.num_heads_q = p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = 8;
  for (flashspark_tensor *t : {&p.q, &p.k, &p.v, &p.out}) t->dtype = FLASHSPARK_FLOAT32;
  flashspark_append_params a;
  flashspark_append_params_init(&a);
  a.num_heads_kv = 1;
  a.head_dim = a.head_dim_v = 8;
  for (flashspark_tensor *t : {&a.k_new, &a.v_new, &a.k_cache, &a.v_cache}) t->dtype = FLASHSPARK_FLOAT32;
  size_t size = 0;
  int64_t elements = 0;
  const std::string begin = std::string(name) + " = " + value + ": must be";
  const auto refused = [&](flashspark_status status) {
    return status == FLASHSPARK_INVALID_ARGUMENT && std::string(flashspark_last_error()).rfind(begin, 0) == 0;
  };
  const bool all = refused(flashspark_attention_forward(&p)) && refused(flashspark_attention_validate(&p)) &&
                   refused(flashspark_attention_workspace_size(&p, &size)) &&
                   refused(flashspark_attention_explain(&p, nullptr, 0)) &&
                   refused(flashspark_attention_schedule(&p)) &&
                   refused(flashspark_attention_schedule_size(&p, &elements)) && refused(flashspark_append_kv(&a));
  // These have no way to say so, and give what holds without the switch.
  const bool others = *flashspark_cpu_target() != '\0' && flashspark_cpu_threads() > 0;
  std::_Exit(all && others ? 0 : 1);
}

TEST(EnvironmentDeathTest, EveryCallRefusesAWrongSwitch) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(call_everything("FLASHSPARK_CPU_TARGET", "AVX1024"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(call_everything("FLASHSPARK_NUM_THREADS", "many"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(call_everything("FLASHSPARK_CHECK", "maybe"), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace flashspark
