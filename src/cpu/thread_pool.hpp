// A pool of threads that lives as long as the process. Not OpenMP: settings of libgomp and libiomp in a host process
// (torch) must not reach this library, nor the other way round.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace flashspark::cpu {

// The threads of num_threads == 0: FLASHSPARK_NUM_THREADS, or one for each CPU that this process may run on.
int32_t default_threads();

// Calls task(context, n) for every n in [0, count), in any order, from up to num_threads threads (0:
// default_threads()), of which the caller is one, and returns when all calls are done. The first exception is thrown
// again here. A call from inside a task, or while another thread's call runs, does all its work on its own thread.
void parallel_for(int32_t num_threads, int64_t count, void (*task)(void *context, int64_t n), void *context);

template <class F>
void parallel_for(int32_t num_threads, int64_t count, F &&f) {
  using Function = std::remove_reference_t<F>;
  parallel_for(
      num_threads, count, [](void *context, int64_t n) { (*static_cast<Function *>(context))(n); },
      const_cast<void *>(static_cast<const void *>(std::addressof(f))));
}

}  // namespace flashspark::cpu
