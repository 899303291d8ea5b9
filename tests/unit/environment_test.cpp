// The switches of the environment: what each of them takes, and that a wrong value is an error of every call.
#include "environment.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "cpu/tile.hpp"
#include "dispatch.hpp"
#include "error.hpp"
#include "flashspark/flashspark.h"

namespace flashspark {
namespace {

TEST(Environment, RightValuesAreTaken) {
  for (const char *unset : {static_cast<const char *>(nullptr), ""}) {
    const Environment e = read_environment({unset, unset, unset, unset});
    EXPECT_EQ(e.error, "");
    EXPECT_EQ(e.force_implementation, "");
    EXPECT_EQ(e.cpu_target, "");
    EXPECT_EQ(e.num_threads, 0);
    EXPECT_FALSE(e.check);
  }
  for (const Implementation &each : implementations()) {
    const Environment e = read_environment({.force_implementation = each.name});
    EXPECT_EQ(e.error, "");
    EXPECT_EQ(e.force_implementation, each.name);
  }
  for (const cpu::Kernels *kernels : cpu::all_kernels()) {
    const Environment e = read_environment({.cpu_target = kernels->target, .num_threads = "3", .check = "1"});
    EXPECT_EQ(e.error, "");
    EXPECT_EQ(e.cpu_target, kernels->target);
    EXPECT_EQ(e.num_threads, 3);
    EXPECT_TRUE(e.check);
  }
  EXPECT_EQ(read_environment({.num_threads = "1024", .check = "0"}).num_threads, 1024);
  EXPECT_EQ(read_environment({.num_threads = "0", .check = "0"}).error, "");
}

TEST(Environment, WrongValuesNameTheSwitchItsValueAndTheRule) {
  for (const std::string value : {"no-such", "cpu", "CPU-ENGINE", "cpu-engine ", " "}) {
    const Environment e = read_environment({.force_implementation = value.c_str()});
    EXPECT_EQ(e.error, "FLASHSPARK_FORCE_IMPLEMENTATION = " + value + ": must be one of " + implementation_names());
    EXPECT_EQ(e.force_implementation, "");
  }
  const std::string best = cpu::all_kernels().front()->target;
  for (const std::string value : {"avx2", "AVX9", " ", "0", "sse4", "AVX2 ", "AVX2,SSE4"}) {
    const Environment e = read_environment({.cpu_target = value.c_str()});
    EXPECT_EQ(e.error.rfind("FLASHSPARK_CPU_TARGET = " + value + ": must be", 0), 0u) << e.error;
    EXPECT_NE(e.error.find(best), std::string::npos) << e.error;
    EXPECT_EQ(e.cpu_target, "");
  }
  for (const std::string value :
       {"-1", "1025", "four", "2x", "1.5", " 2", "2 ", "+2", "0x2", "99999999999999999999", "nan"}) {
    const Environment e = read_environment({.num_threads = value.c_str()});
    EXPECT_EQ(e.error, "FLASHSPARK_NUM_THREADS = " + value + ": must be a number from 0 (all CPUs) to 1024");
    EXPECT_EQ(e.num_threads, 0);
  }
  for (const std::string value : {"2", "yes", "true", "01", " 1", "-1", "on"}) {
    EXPECT_EQ(read_environment({.check = value.c_str()}).error, "FLASHSPARK_CHECK = " + value + ": must be 0 or 1");
  }
  EXPECT_EQ(read_environment({.cpu_target = "x", .num_threads = "y", .check = "z"})
                .error.rfind("FLASHSPARK_CPU_TARGET = x", 0),
            0u);
}

void set_variable(const char *name, const char *value) {
#if defined(_WIN32)
  _putenv_s(name, value);
#else
  setenv(name, value, 1);
#endif
}

// The switches are read once, so each wrong one is tried in a process of its own.
void call_everything(const char *name, const char *value) {
  set_variable(name, value);
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
  EXPECT_EXIT(call_everything("FLASHSPARK_FORCE_IMPLEMENTATION", "nonsense"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(call_everything("FLASHSPARK_CPU_TARGET", "AVX1024"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(call_everything("FLASHSPARK_NUM_THREADS", "many"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(call_everything("FLASHSPARK_CHECK", "maybe"), testing::ExitedWithCode(0), "");
}

// Explains a problem in a process of its own, in which an implementation is asked for by the environment.
void explain_forced(const char *implementation, const char *expected) {
  set_variable("FLASHSPARK_FORCE_IMPLEMENTATION", "cpu-reference");
  flashspark_attention_params p;
  flashspark_attention_params_init(&p);
  p.num_heads_q = p.num_heads_kv = 1;
  p.head_dim = p.head_dim_v = 8;
  for (flashspark_tensor *t : {&p.q, &p.k, &p.v, &p.out}) t->dtype = FLASHSPARK_FLOAT32;
  p.implementation = implementation;
  std::string text(8192, '\0');
  const flashspark_status status = flashspark_attention_explain(&p, text.data(), text.size());
  set_variable("FLASHSPARK_FORCE_IMPLEMENTATION", "nonsense");  // too late: the switch has been read
  const bool again = flashspark_attention_validate(&p) == FLASHSPARK_OK;
  const size_t line = text.find(std::string("\n") + expected + " (");
  const bool chosen = line != text.npos && text.find(": chosen, as asked for", line) < text.find('\n', line + 1);
  std::_Exit(status == FLASHSPARK_OK && chosen && again ? 0 : 1);
}

TEST(EnvironmentDeathTest, AnImplementationIsForcedUnlessTheCallNamesOne) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(explain_forced(nullptr, "cpu-reference"), testing::ExitedWithCode(0), "");
  EXPECT_EXIT(explain_forced("cpu-engine", "cpu-engine"), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace flashspark
