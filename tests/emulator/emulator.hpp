// Runs a GPU kernel's own source on the CPU. Every thread of a CTA is a fiber; shared memory records who accessed what
// and when; and everything the hardware leaves open (warp order, arrival of async copies, initial contents) is chosen
// by a seed. One launch at a time, from one OS thread.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace flashspark::emulator {

struct LaunchOptions {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 32;      // a multiple of 32, at most kMaxThreads
  uint32_t shared_bytes = 0;  // exact: any access beyond is a fault
  uint64_t seed = 1;
  bool in_order = false;  // CTAs by number instead of at random: each ends before the next one begins
};

inline constexpr uint32_t kMaxThreads = 512;

// What happened in a launch, counted once per warp instruction; cp_async is counted per lane.
struct Counters {
  uint64_t mma = 0;
  uint64_t ldmatrix = 0;
  uint64_t bank_conflicts = 0;  // rows or words beyond the first in their bank, per phase of a shared-memory access
  uint64_t shuffles = 0;        // shuffles, votes and reductions
  uint64_t barriers = 0;        // of CTAs and warps
  uint64_t cp_async = 0;
  uint64_t cp_async_zero = 0;  // the cp_async that zero-fill and read nothing
};

// The kernel violated the programming model. The text names the CTA, the thread and the source line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls kernel() once for each thread of each CTA; CTAs run one after another in an order chosen by the seed. Throws
// Fault, or whatever the kernel throws. Capture the kernel's parameters by reference to one copy on the heap, which
// stands for the GPU's constant bank: a copy on a fiber's stack would die with that thread.
Counters launch(const LaunchOptions &options, const std::function<void()> &kernel);

}  // namespace flashspark::emulator
