// The library's switches in the environment. All are read once a process, at the first call that needs one: a test of
// another value needs a process of its own, or read_environment().
#pragma once

#include <cstdint>
#include <string>

namespace flashspark {

struct Environment {
  std::string force_implementation;  // FLASHSPARK_FORCE_IMPLEMENTATION, a name of the table; "": none
  std::string cpu_target;            // FLASHSPARK_CPU_TARGET; "": the best
  int32_t num_threads = 0;           // FLASHSPARK_NUM_THREADS; 0: all
  bool check = false;                // FLASHSPARK_CHECK: every call is as with check_device
  std::string error;  // of the first switch with a wrong value, which is as if not set; "": all are right
};

const Environment &environment();

// Throws what is wrong with a switch.
void check_environment();

// The values of the switches; NULL or "": not set.
struct Switches {
  const char *force_implementation = nullptr, *cpu_target = nullptr, *num_threads = nullptr, *check = nullptr;
};
Environment read_environment(const Switches &switches);

}  // namespace flashspark
