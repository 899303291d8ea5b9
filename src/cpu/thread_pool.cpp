#include "cpu/thread_pool.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <thread>

#include "environment.hpp"
#include "platform/process.hpp"

namespace flashspark::cpu {
namespace {

constexpr int kMaxThreads = 1024;

// Rounds of polling before a worker sleeps, about the time between two calls of one model step: to sleep and wake costs
// more than a small problem takes.
constexpr int kSpinRounds = 2000;

thread_local bool inside_task = false;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  void (*task)(void *, int64_t);
  void *context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex{};
  std::exception_ptr error{};

  void run() noexcept {
    inside_task = true;
    for (int64_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      try {
        task(context, n);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
      }
    }
    inside_task = false;
  }
};

class Pool {
 public:
  // False when another thread holds the pool.
  bool run(Job &job, int helpers) {
    const std::unique_lock turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    helpers = std::min(helpers, grow(helpers));
    {
      const std::lock_guard lock(mutex_);
      job_ = &job;
      tickets_.store(helpers, std::memory_order_release);
    }
    for (int n = 0; n < helpers; ++n) wake_.notify_one();
    job.run();
    // All work has been taken. A worker that has no ticket by now is not waited for.
    std::unique_lock lock(mutex_);
    tickets_.store(0, std::memory_order_relaxed);
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  int grow(int wanted) {
    while (size_ < wanted) {
      try {
        // Detached: the pool is never destroyed, so a process may exit at any time without joining.
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error &) {
        break;  // the system has no more threads: fewer do the work
      }
      ++size_;
    }
    return size_;
  }

  void work() {
    for (;;) {
      for (int spin = 0; spin < kSpinRounds && tickets_.load(std::memory_order_relaxed) == 0; ++spin) pause_cpu();
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return tickets_.load(std::memory_order_relaxed) > 0; });
      tickets_.fetch_sub(1, std::memory_order_relaxed);
      ++running_;
      Job *job = job_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // held by the caller whose job runs
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  std::atomic<int> tickets_{0};  // workers that may still join the job; polled without the lock
  int running_ = 0;
  int size_ = 0;
  Job *job_ = nullptr;
};

alignas(Pool) unsigned char pool_storage[sizeof(Pool)];
std::atomic<Pool *> pool{nullptr};
std::once_flag pool_once;

Pool &the_pool() {
  std::call_once(pool_once, [] {
    pool = new (pool_storage) Pool;
    // A forked child has none of the threads and maybe a locked mutex: it starts with a fresh pool.
    at_fork_in_child([] {
      inside_task = false;
      pool = new Pool;
    });
  });
  return *pool.load();
}

}  // namespace

int32_t default_threads() {
  static const int threads = environment().num_threads > 0 ? environment().num_threads : cpus_of_process();
  return threads;
}

void parallel_for(int32_t num_threads, int64_t count, void (*task)(void *, int64_t), void *context) {
  if (count <= 0) return;
  const int64_t wanted = std::min<int64_t>({num_threads > 0 ? num_threads : default_threads(), count, kMaxThreads});
  if (wanted > 1 && !inside_task) {
    Job job{.task = task, .context = context, .count = count};
    if (the_pool().run(job, static_cast<int>(wanted) - 1)) {
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t n = 0; n < count; ++n) task(context, n);
}

}  // namespace flashspark::cpu
