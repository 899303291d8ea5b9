// The emulator reports every violation of the programming model, and nothing else.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "emulator.hpp"
#include "guarded.hpp"
#include "ptx/ptx.cuh"

namespace flashspark::emulator {
namespace {

using ptx::shared_memory;
using ptx::thread_index;

// The text of the fault that the kernel raises.
std::string fault(uint32_t threads, uint32_t shared_bytes, const std::function<void()> &kernel, uint64_t seed = 1) {
  try {
    launch({{1, 1, 1}, threads, shared_bytes, seed}, kernel);
  } catch (const Fault &f) {
    return f.what();
  }
  return "no fault";
}

// A function, not a macro: a macro would put the whole kernel on one source line, which hides divergence.
void expect_fault(const std::string &text, uint32_t threads, uint32_t shared_bytes, const std::function<void()> &kernel,
                  uint64_t seed = 1, int line = __builtin_LINE()) {
  const std::string what = fault(threads, shared_bytes, kernel, seed);
  EXPECT_NE(what.find(text), std::string::npos) << "line " << line << ": " << what << "\nwithout: " << text;
}

TEST(Fault, NamesBlockThreadAndLine) {
  int line = 0;
  try {
    launch({{2, 3, 4}, 64, 64, 1}, [&] {
      const bool chosen = ptx::cta_x() == 1 && ptx::cta_y() == 2 && ptx::cta_z() == 3 && thread_index() == 37;
      line = __LINE__ + 1;
      if (chosen) ptx::load_shared_4(64);
    });
    FAIL();
  } catch (const Fault &f) {
    const std::string start = "block (1, 2, 3) thread 37 faults_test.cpp:" + std::to_string(line) + ": ";
    EXPECT_EQ(std::string(f.what()).find(start), 0u) << f.what();
  }
}

TEST(Fault, LeavesTheEmulatorUsable) {
  for (uint64_t seed = 0; seed < 100; seed++) {
    expect_fault(
        "uninitialised", 256, 64,
        [] {
          ptx::cta_barrier();
          if (thread_index() == 200) ptx::load_shared_4(shared_memory());
          ptx::cta_barrier();
        },
        seed);
    int runs = 0;
    launch({{1, 1, 1}, 64, 0, seed}, [&] {
      ptx::cta_barrier();
      runs++;
    });
    EXPECT_EQ(runs, 64);
  }
}

TEST(Fault, KernelsOwnExceptionsPass) {
  EXPECT_THROW(launch({}, [] { throw std::out_of_range("mine"); }), std::out_of_range);
}

TEST(Fault, SharedMemoryBoundsAndAlignment) {
  expect_fault("out of bounds: the block has 60 bytes", 32, 60, [] { ptx::store_shared_4(shared_memory() + 60, 1); });
  expect_fault("out of bounds", 32, 60, [] { ptx::store_shared_16(shared_memory() + 48, {}); });
  expect_fault("out of bounds", 32, 64, [] { ptx::store_shared_4(shared_memory() - 4, 1); });
  expect_fault("out of bounds", 32, 64, [] { ptx::load_shared_4(0); });
  expect_fault("out of bounds", 32, 64, [] { ptx::load_shared_4(0xfffffffc); });
  expect_fault("misaligned", 32, 64, [] { ptx::store_shared_4(shared_memory() + 2, 1); });
  expect_fault("misaligned", 32, 64, [] { ptx::store_shared_16(shared_memory() + 8, {}); });
  expect_fault("misaligned", 32, 512, [] {
    uint32_t part[4];
    ptx::ldmatrix_x4(part, shared_memory() + 4);
  });
}

TEST(Fault, Uninitialised) {
  expect_fault("uninitialised", 32, 64, [] { ptx::load_shared_16(shared_memory()); });
  // One word of 128 is never written.
  expect_fault("shared offset 508, which is uninitialised", 32, 512, [] {
    for (uint32_t word = thread_index(); word < 127; word += 32) ptx::store_shared_4(shared_memory() + 4 * word, 0);
    ptx::warp_barrier();
    uint32_t part[4];
    ptx::ldmatrix_x4(part, shared_memory() + 16 * thread_index());
  });
  // Shared memory does not carry over from one CTA to the next.
  EXPECT_THROW(launch({{2, 1, 1}, 32, 128, 1},
                      [first = true]() mutable {
                        const ptx::SharedAddress at = shared_memory() + 4 * thread_index();
                        if (first) ptx::store_shared_4(at, 1);
                        ptx::warp_barrier();
                        first = false;
                        ptx::load_shared_4(at);
                      }),
               Fault);
}

TEST(Fault, RacesOfLoadsAndStores) {
  for (uint64_t seed = 0; seed < 20; seed++) {
    // Written by one thread, read by one of another warp.
    expect_fault(
        "race", 64, 256,
        [] {
          ptx::store_shared_4(shared_memory() + 4 * thread_index(), 1);
          ptx::warp_barrier();  // does not order different warps
          const uint32_t other = (thread_index() + 32) % 64;
          // Without this phase, whichever thread ran first would read an unwritten word, which is a different fault.
          ptx::cta_barrier();
          ptx::store_shared_4(shared_memory() + 4 * thread_index(), 2);
          ptx::warp_barrier();
          ptx::load_shared_4(shared_memory() + 4 * other);
        },
        seed);
    // Read by one thread, written by another of the same warp.
    expect_fault(
        "race", 32, 128,
        [] {
          ptx::store_shared_4(shared_memory() + 4 * thread_index(), 1);
          ptx::warp_barrier();
          ptx::load_shared_4(shared_memory() + 4 * (thread_index() ^ 1));
          ptx::shuffle_xor(0, 1);  // the lanes meet, but memory is not ordered
          ptx::store_shared_4(shared_memory() + 4 * thread_index(), 2);
        },
        seed);
    // Two writers.
    expect_fault(
        "race: writes", 64, 4,
        [] {
          if (thread_index() % 32 == 0) ptx::store_shared_4(shared_memory(), 1);
        },
        seed);
    // ldmatrix delivers a row to lanes other than the one that wrote it and supplies its address.
    expect_fault(
        "race: reads", 32, 512,
        [] {
          uint32_t part[4];
          ptx::store_shared_16(shared_memory() + 16 * thread_index(), {});
          ptx::ldmatrix_x4(part, shared_memory() + 16 * thread_index());
        },
        seed);
    expect_fault(
        "race: reads", 32, 512,
        [] {
          uint32_t part[4];
          ptx::store_shared_16(shared_memory() + 16 * thread_index(), {});
          ptx::ldmatrix_x4_trans(part, shared_memory() + 16 * thread_index());
        },
        seed);
  }
}

TEST(Fault, WritesWhatOthersHaveRead) {
  // All lanes read a word, then one writes it: the write is ordered after that lane's own read only. Trying every lane
  // as the writer includes the one that reads first.
  for (uint32_t writer = 0; writer < 32; writer++) {
    expect_fault("race: writes", 32, 4, [writer] {
      if (thread_index() == 0) ptx::store_shared_4(shared_memory(), 1);
      ptx::warp_barrier();
      ptx::load_shared_4(shared_memory());
      ptx::any(true);
      if (thread_index() == writer) ptx::store_shared_4(shared_memory(), 2);
    });
  }
  expect_fault("race: writes", 32, 512, [] {
    uint32_t part[4];
    ptx::store_shared_16(shared_memory() + 16 * thread_index(), {});
    ptx::warp_barrier();
    ptx::ldmatrix_x4(part, shared_memory() + 16 * thread_index());
    ptx::store_shared_16(shared_memory() + 16 * thread_index(), {});
  });
}

TEST(Fault, LdmatrixReadsForTheLanesThatReceive) {
  // Word i of row r goes to lane 4 * r + i, which may have written it itself. Transposed, its halves go to lanes 8 * i
  // + r / 2 and 8 * i + r / 2 + 4, and one of them has not.
  const auto kernel = [](bool transposed, uint32_t second) {
    return [transposed, second] {
      const uint32_t lane = thread_index();
      for (uint32_t word = 0; word < 128; word++) {
        const uint32_t row = word / 4 % 8;
        const uint32_t i = word % 4;
        const uint32_t receiver = transposed ? 8 * i + row / 2 + second : 4 * row + i;
        if (lane == receiver) ptx::store_shared_4(shared_memory() + 4 * word, word);
      }
      ptx::any(true);
      uint32_t part[4];
      if (transposed) {
        ptx::ldmatrix_x4_trans(part, shared_memory() + 16 * lane);
      } else {
        ptx::ldmatrix_x4(part, shared_memory() + 16 * lane);
      }
    };
  };
  EXPECT_EQ(fault(32, 512, kernel(false, 0)), "no fault");
  expect_fault("race: reads", 32, 512, kernel(true, 0));
  expect_fault("race: reads", 32, 512, kernel(true, 4));
}

TEST(Fault, Copies) {
  Guarded<uint32_t> source(1024);
  for (uint32_t &x : source) x = 1;
  const auto copy = [&](uint32_t chunk) { ptx::cp_async_16(shared_memory() + 16 * chunk, &source[4 * chunk]); };
  expect_fault("exits with a copy in flight", 32, 512, [&] { copy(thread_index()); });
  expect_fault("exits with a copy in flight", 32, 512, [&] {
    copy(thread_index());
    ptx::cp_async_wait<0>();  // waits for committed groups only, and nothing was committed
  });
  expect_fault("copy in flight", 32, 512, [&] {
    copy(thread_index());
    ptx::cp_async_commit();
    ptx::load_shared_4(shared_memory() + 16 * thread_index());
  });
  expect_fault("writes shared offset", 32, 512, [&] {
    copy(thread_index());
    ptx::store_shared_4(shared_memory() + 16 * thread_index(), 0);
  });
  expect_fault("writes shared offset", 32, 512, [&] {
    copy(0);
    ptx::warp_barrier();
  });
  expect_fault("out of bounds", 32, 500, [&] {
    copy(thread_index());
    ptx::warp_barrier();
  });
  expect_fault("misaligned", 32, 512, [&] { ptx::cp_async_16(shared_memory(), &source[1]); });
  expect_fault("misaligned", 32, 512, [&] { ptx::cp_async_16(shared_memory() + 8, &source[0]); });
  // cp_async_wait covers a thread's own copies; reading another thread's also needs a barrier.
  expect_fault("race: reads", 32, 512, [&] {
    copy(thread_index());
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::shuffle_xor(0, 1);
    ptx::load_shared_4(shared_memory() + 16 * (thread_index() ^ 1));
  });
}

TEST(Fault, PoisonedSource) {
#ifndef FLASHSPARK_EMULATOR_POISON
  GTEST_SKIP() << "needs AddressSanitizer";
#endif
  Guarded<uint16_t> source(32 * 8 + 4);
  for (uint16_t &x : source) x = 1;
  // Lane 31's copy would end 8 bytes beyond the array.
  expect_fault("byte 8 is poisoned", 32, 512, [&] {
    ptx::cp_async_16(shared_memory() + 16 * thread_index(), source.data() + 8 * (thread_index() + 1));
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  });
  source.poison(40, 8);
  const auto kernel = [&](bool all) {
    return [&source, all] {
      ptx::cp_async_16_or_zero(shared_memory() + 16 * thread_index(), source.data() + 8 * thread_index(),
                               all || thread_index() != 5);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    };
  };
  expect_fault("thread 5 ", 32, 512, kernel(true));
  EXPECT_EQ(fault(32, 512, kernel(false)), "no fault");
  source.unpoison(40, 8);
  EXPECT_EQ(fault(32, 512, kernel(true)), "no fault");
}

TEST(Fault, Divergence) {
  for (uint64_t seed = 0; seed < 20; seed++) {
    expect_fault(
        "divergence", 32, 0,
        [] {
          if (thread_index() < 16) {
            ptx::ballot(true);
          } else {
            ptx::ballot(false);
          }
        },
        seed);
    expect_fault("divergence", 32, 0, [] { thread_index() == 9 ? ptx::warp_barrier() : ptx::cta_barrier(); }, seed);
    // One lane exits before the others arrive.
    bool first = true;
    expect_fault(
        "any without lane", 32, 0,
        [&] {
          if (!std::exchange(first, false)) ptx::any(true);
        },
        seed);
    // Some lanes never arrive, at a warp-wide and at a CTA-wide operation.
    expect_fault(
        "exit", 32, 0,
        [] {
          if (thread_index() % 2 == 0) ptx::any(true);
        },
        seed);
    expect_fault(
        "exit", 128, 0,
        [] {
          if (thread_index() / 32 != 2) ptx::cta_barrier();
        },
        seed);
    // The two halves wait at different barriers forever.
    expect_fault(
        "divergence", 64, 0,
        [] {
          if (thread_index() < 32) {
            ptx::cta_barrier();
          } else {
            ptx::cta_barrier();
          }
        },
        seed);
  }
}

TEST(Fault, ArgumentsThatMeanNothing) {
  expect_fault("shuffle_xor by 32", 32, 0, [] { ptx::shuffle_xor(0, 32); });
  expect_fault("shuffle by 33", 32, 0, [] { ptx::shuffle(0, 33); });
  expect_fault("shuffle_up by 32", 32, 0, [] { ptx::shuffle_up(0, 32); });
  expect_fault("uniform of values from 0 to 1", 32, 0, [] { ptx::uniform(thread_index() == 11); });
  expect_fault("lowest_bit of 0", 32, 0, [] { ptx::lowest_bit(0); });
}

}  // namespace
}  // namespace flashspark::emulator
