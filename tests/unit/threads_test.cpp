// Threads: the pool itself, calls from many threads, determinism, and a forked child.
#include <gtest/gtest.h>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>

#include "cpu/thread_pool.hpp"
#include "support/features.hpp"

namespace flashspark::test {
namespace {

Problem mixed_problem(uint64_t seed) {
  std::mt19937_64 rng(seed);
  Problem p;
  p.hq = 4;
  p.hkv = 2;
  p.d = p.dv = 32;
  p.scale = 0.2f;
  for (const auto &[tq, tk] : {std::pair<int, int>{1, 700}, {90, 200}, {1, 33}, {40, 40}}) {
    p.seqs.push_back(random_sequence(rng, p, tq, tk));
    p.seqs.back().causal = true;
  }
  return p;
}

bool identical(const Rows &a, const Rows &b) {
  return a.out == b.out && a.lse == b.lse;
}

TEST(ThreadPool, EveryIndexOnceForAnyThreadCount) {
  for (const int32_t threads : {0, 1, 2, 3, 8, 64}) {
    for (const int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> seen(count);
      cpu::parallel_for(threads, count, [&](int64_t n) { ++seen[n]; });
      for (const auto &times : seen) ASSERT_EQ(times, 1);
    }
  }
}

TEST(ThreadPool, UsesMoreThanOneThread) {
  std::atomic<int> inside{0}, most{0};
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  cpu::parallel_for(2, 2, [&](int64_t) {  // each task waits until it has company
    ++inside;
    while (inside < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    most = std::max<int>(most, inside);
  });
  EXPECT_EQ(most, 2);
}

TEST(ThreadPool, ThrowsTheTasksExceptionAndLivesOn) {
  for (const int32_t threads : {1, 4}) {
    const auto faulty = [](int64_t n) {
      if (n == 5) throw std::runtime_error("five");
    };
    EXPECT_THROW(cpu::parallel_for(threads, 100, faulty), std::runtime_error);
    std::atomic<int64_t> sum{0};
    cpu::parallel_for(threads, 100, [&](int64_t n) { sum += n; });
    EXPECT_EQ(sum, 4950);
  }
}

TEST(ThreadPool, NestedCallsFinish) {
  std::atomic<int> count{0};
  cpu::parallel_for(4, 8, [&](int64_t) { cpu::parallel_for(4, 8, [&](int64_t) { ++count; }); });
  EXPECT_EQ(count, 64);
}

TEST(Threads, CallsFromManyThreadsAreIndependent) {
  constexpr int kCallers = 6;
  std::vector<Problem> problems;
  std::vector<std::string> verdicts(kCallers);
  for (int n = 0; n < kCallers; ++n) problems.push_back(mixed_problem(100 + n));
  std::vector<std::thread> callers;
  for (int n = 0; n < kCallers; ++n) {
    callers.emplace_back([&, n] {
      for (int round = 0; round < 5 && verdicts[n].empty(); ++round) {
        Layout layout{.kv = round % 2 ? Kind::kPaged : Kind::kVarlen, .num_threads = n % 3};
        verdicts[n] = difference(problems[n], run(problems[n], layout), false);
        // Errors are kept per thread.
        layout.implementation = n % 2 ? "odd" : "even";
        const Result refused = run(problems[n], layout);
        if (refused.error.find(layout.implementation) == std::string::npos)
          verdicts[n] = "foreign error: " + refused.error;
      }
    });
  }
  for (std::thread &caller : callers) caller.join();
  for (int n = 0; n < kCallers; ++n) EXPECT_EQ(verdicts[n], "") << "caller " << n;
}

TEST(Determinism, BitIdenticalOverRunsThreadsAndNeighbours) {
  const Problem p = mixed_problem(3);
  const Layout layout{.kv = Kind::kPaged, .num_threads = 1, .deterministic = 1};
  const Result first = run(p, layout);
  ASSERT_EQ(difference(p, first, false), "");
  for (const int32_t threads : {1, 2, 3, 8}) {
    Layout again = layout;
    again.num_threads = threads;
    const Result result = run(p, again);
    for (size_t b = 0; b < p.seqs.size(); ++b)
      EXPECT_TRUE(identical(result.seqs[b], first.seqs[b])) << threads << " " << b;
  }
  for (size_t b = 0; b < p.seqs.size(); ++b) {
    Problem alone = p;
    alone.seqs = {p.seqs[b]};
    Layout again = layout;
    again.num_threads = 2;
    EXPECT_TRUE(identical(run(alone, again).seqs[0], first.seqs[b])) << "sequence " << b << " alone";
  }
}

#if !defined(_WIN32)  // which has no fork
TEST(Fork, AChildComputesAfterTheParentUsedItsThreads) {
  const Problem p = mixed_problem(9);
  const Layout layout{.num_threads = 4};
  const Result before = run(p, layout);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a deadlock ends here and fails the test
    const std::string verdict = difference(p, run(p, layout), false);
    _exit(verdict.empty() ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_EQ(difference(p, before, run(p, layout)), "") << "the parent goes on";
}

// Other threads hold the pool at the moment of the fork.
TEST(Fork, AChildComputesWhileTheParentsPoolIsBusy) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the sanitizer's own allocator lock does not survive such a fork";
#endif
  const Problem p = mixed_problem(10);
  const Problem small = problem_with(features()[0], 1);
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) run(p, {.num_threads = 4});
  });
  for (int n = 0; n < 8; ++n) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(60);
      _exit(difference(small, run(small, {.num_threads = 4}), false).empty() ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "round " << n << " status " << status;
  }
  stop = true;
  busy.join();
}
#endif

}  // namespace
}  // namespace flashspark::test
