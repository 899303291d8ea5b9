// mbarriers: what a warp writes before its arrival is there behind the others' waits, and what is wrong is reported.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>

#include "emulator.hpp"
#include "ptx/backward.cuh"

namespace flashspark::emulator {
namespace {

constexpr uint32_t kWarps = 4;

std::string fault(const std::function<void()> &kernel, uint64_t seed) {
  try {
    launch({{1, 1, 1}, kWarps * 32, 8 + kWarps * 4, seed}, kernel);
  } catch (const Fault &f) {
    return f.what();
  }
  return "";
}

ptx::SharedAddress word(int32_t warp) {
  return ptx::shared_memory() + 8 + 4 * static_cast<uint32_t>(warp);
}

// Each warp adds to what its neighbour has written in the phase before; `arrives` and `waits` may leave it out.
void ring(uint32_t phases, const std::function<void(uint32_t)> &arrives, const std::function<void(uint32_t)> &waits) {
  const int32_t warp = ptx::warp(), neighbour = (warp + 1) % static_cast<int32_t>(kWarps);
  if (ptx::thread_index() == 0) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
  if (ptx::lane() == 0) ptx::store_shared_4(word(warp), 0);
  ptx::cta_barrier();
  for (uint32_t phase = 0; phase < 2 * phases; phase += 2) {
    const uint32_t seen = ptx::load_shared_4(word(neighbour));
    if (seen != phase / 2) throw seen;
    arrives(phase);
    waits(phase);
    if (ptx::lane() == 0) ptx::store_shared_4(word(warp), seen + 1);
    arrives(phase + 1);
    waits(phase + 1);
  }
}
void arrive(uint32_t) {
  ptx::mbarrier_arrive(ptx::shared_memory());
}
void wait(uint32_t phase) {
  ptx::mbarrier_wait(ptx::shared_memory(), phase % 2);
}

TEST(Mbarrier, OrdersWhatIsBeforeArrivalsAndBehindWaits) {
  for (uint64_t seed = 0; seed < 50; ++seed) EXPECT_EQ(fault([] { ring(5, arrive, wait); }, seed), "");
}

TEST(Mbarrier, WaitOfThePhaseBeforeTheFirstIsOver) {
  EXPECT_EQ(fault(
                [] {
                  if (ptx::thread_index() == 0) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
                  ptx::cta_barrier();
                  ptx::mbarrier_wait(ptx::shared_memory(), 1);
                },
                1),
            "");
}

TEST(Mbarrier, Faults) {
  const auto expect = [](const std::string &text, const std::function<void()> &kernel) {
    for (uint64_t seed = 0; seed < 10; ++seed) {
      const std::string what = fault(kernel, seed);
      EXPECT_NE(what.find(text), std::string::npos) << what << "\nwithout: " << text;
    }
  };
  expect("race", [] {
    ring(1, arrive, [](uint32_t phase) {
      if (phase != 0) wait(phase);
    });
  });
  const auto begin = [] {
    if (ptx::thread_index() == 0) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
    ptx::cta_barrier();
  };
  expect("deadlock", [&] {
    begin();
    if (ptx::warp() == 1) return;
    arrive(0);
    wait(0);
  });
  expect("deadlock", [&] {
    begin();
    if (ptx::warp() != 1) arrive(0);
    wait(0);
  });
  expect("deadlock", [&] {  // for a phase too far
    begin();
    arrive(0);
    wait(0);
    wait(1);
  });
  expect("uninitialised", [] { arrive(0); });
  expect("no mbarrier", [] {
    if (ptx::thread_index() == 0) ptx::store_shared_8(ptx::shared_memory(), 4, 0);
    ptx::cta_barrier();
    arrive(0);
  });
  expect("there is an mbarrier already", [] {
    for (int n = 0; ptx::thread_index() == 0 && n < 2; ++n) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
  });
  expect("there is no mbarrier", [] {
    for (int n = 0; ptx::thread_index() == 0 && n < 2; ++n) {
      if (n == 0) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
      ptx::mbarrier_invalidate(ptx::shared_memory());
    }
  });
  expect("shared offset 0", [] {  // before others know of it
    if (ptx::thread_index() == 0) ptx::mbarrier_init(ptx::shared_memory(), kWarps);
    arrive(0);
  });
}

}  // namespace
}  // namespace flashspark::emulator
