// The switches FLASHSPARK_CPU_TARGET, FLASHSPARK_NUM_THREADS and FLASHSPARK_CHECK, read once a process.
// (FLASHSPARK_FORCE_IMPLEMENTATION is read at every call: dispatch.cpp.)
#pragma once

#include <cstdint>
#include <string>

namespace flashspark {

struct Environment {
  std::string cpu_target;   // "": the best
  int32_t num_threads = 0;  // 0: all
  bool check = false;       // asks check_device of every call
  std::string error;        // of the first switch with a wrong value, which is as if not set; "": all are right
};

const Environment &environment();

// Throws what is wrong with a switch.
void check_environment();

// As environment() reads them, of any values; NULL: not set.
Environment read_environment(const char *cpu_target, const char *num_threads, const char *check);

}  // namespace flashspark
