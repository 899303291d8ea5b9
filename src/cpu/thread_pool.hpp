// A kept pool of threads. Not OpenMP: libgomp and libiomp settings of a host process (torch) must not reach us, nor
// ours them.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace flashspark::cpu {

// Threads that num_threads == 0 means: the CPUs this process may run on, or FLASHSPARK_NUM_THREADS.
int32_t default_threads();

// Calls task(context, n) for every n in [0, count), in any order, from up to num_threads threads (0: default_threads(),
// the caller is one of them), and returns when all are done. The first exception thrown is thrown again here.
// Calls from several threads take turns; a call from inside a task, or while another call runs, runs on its own thread.
void parallel_for(int32_t num_threads, int64_t count, void (*task)(void *context, int64_t n), void *context);

template <class F>
void parallel_for(int32_t num_threads, int64_t count, F &&f) {
  using Function = std::remove_reference_t<F>;
  parallel_for(
      num_threads, count, [](void *context, int64_t n) { (*static_cast<Function *>(context))(n); },
      const_cast<void *>(static_cast<const void *>(std::addressof(f))));
}

}  // namespace flashspark::cpu
