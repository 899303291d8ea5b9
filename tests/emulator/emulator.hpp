// Runs a GPU kernel's own source on the CPU: every thread of a block is a fiber, shared memory knows who wrote what and
// when, and whatever the hardware leaves open (order of warps, arrival of copies, garbage) is chosen by a seed.
// One launch at a time; not for several OS threads.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace flashspark::emulator {

struct LaunchOptions {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 32;      // a multiple of 32, at most kMaxThreads
  uint32_t shared_bytes = 0;  // exact: the byte behind them is a fault
  uint64_t seed = 1;
};

inline constexpr uint32_t kMaxThreads = 512;

// What happened in a launch; one for a warp, whatever its lanes (but cp_async: one for a lane).
struct Counters {
  uint64_t mma = 0;
  uint64_t ldmatrix = 0;
  uint64_t bank_conflicts = 0;  // rows or words beyond the first of their bank in one phase of a shared access
  uint64_t shuffles = 0;        // shuffles, votes and reductions
  uint64_t barriers = 0;        // of blocks and warps
  uint64_t cp_async = 0;
  uint64_t cp_async_zero = 0;  // those of cp_async that read nothing
};

// The kernel did what the programming model forbids. The text names block, thread and the kernel's line.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls kernel() once for each thread of each block, blocks one after another in an order of the seed's. Throws Fault,
// or what the kernel throws. kernel's parameters are to be captured by reference, to one copy on the heap: a GPU has
// one constant bank, and a copy on a thread's stack would die with the thread.
Counters launch(const LaunchOptions &options, const std::function<void()> &kernel);

}  // namespace flashspark::emulator
