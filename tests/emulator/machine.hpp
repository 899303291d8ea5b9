// One launch at work: fibers, who runs next, and the meetings of a warp's lanes and a block's warps.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "banks.hpp"
#include "emulator.hpp"
#include "fiber.hpp"
#include "matrix.hpp"
#include "operations.hpp"
#include "random.hpp"
#include "shared.hpp"

namespace flashspark::emulator {

inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kAll = 0xffffffff;

// How a block's warps take turns. The greedy ways let a warp get as far ahead as barriers allow.
enum class Policy { random, priority, priority_with_swaps };

// What lanes, or warps, wait for together.
struct Meeting {
  Operation operation = Operation::none;
  uint32_t place = 0;
};

struct Warp {
  uint32_t ready = 0;    // a bit each lane
  uint32_t waiting = 0;  // at `meeting`
  uint32_t exited = 0;
  bool at_block_barrier = false;
  Meeting meeting;
  // The order of lanes: a ring that starts anywhere and runs either way, chosen anew after each meeting.
  uint32_t rotation = 0;
  bool backwards = false;
  BankCounter banks;
  Registers *lane[kLanes];
};

struct Thread {
  explicit Thread(void (*run)()) : fiber(run) {}
  Registers registers{};
  Fiber fiber;
};

class Machine {
 public:
  Counters launch(const LaunchOptions &options, const std::function<void()> &kernel);

  void barrier(Operation operation, Site site);
  void copy_async(uint32_t to, const void *from, bool valid, Site site);
  void copy_commit() { shared_.commit(position.thread); }
  void copy_wait(uint32_t pending) { shared_.wait(position.thread, pending); }
  void load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site);
  void multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
  uint32_t exchange(Operation operation, uint32_t value, uint32_t argument, Site site);
  void load_shared(void *to, uint32_t from, uint32_t bytes, Site site);
  void store_shared(uint32_t to, const void *from, uint32_t bytes, Site site);
  [[noreturn]] void fail(const std::string &text, uint32_t place);
  uint32_t place(Site site) { return shared_.places.number(site); }

 private:
  static void run_fiber();
  void run_thread();
  void run_block(const LaunchOptions &options, const uint32_t (&block)[3]);
  void meet(Operation operation, Site site);
  uint32_t arrive(Operation operation, Site site);
  void complete(uint32_t warp_index);
  void perform(uint32_t warp_index);
  void perform_load(uint32_t warp_index);
  void perform_exchange(Warp &warp);
  void meet_block(uint32_t warp_index);
  void release(uint32_t warp_index);
  void leave();
  uint32_t next_thread();
  uint32_t pick_warp();
  uint32_t pick_lane(const Warp &warp) const;
  void switch_to(Fiber &from, uint32_t thread);

  // Kernel-side calls: a Complaint becomes a Fault of the running thread.
  template <class Call>
  auto guarded(uint32_t place, Call call) {
    try {
      return call();
    } catch (const Complaint &complaint) {
      fail(complaint.text, place);
    }
  }

  Registers &mine() { return threads_[position.thread]->registers; }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<uint32_t> priority_;  // warps, most urgent first
  SharedMemory shared_;
  Fiber launcher_;
  Random random_{0};
  SumOrder sum_order_{random_};
  Policy policy_ = Policy::random;
  const std::function<void()> *kernel_ = nullptr;
  std::exception_ptr error_;
  Counters counters_;

  uint32_t count_ = 0;        // threads of a block
  uint32_t alive_ = 0;        // that have not returned
  uint32_t ready_warps_ = 0;  // a bit each
  uint32_t arrived_warps_ = 0;
  Meeting block_meeting_;
};

// Stops this lane until those it meets are there and what they meet for is done. Inline for Fiber::switch_to's reason.
inline void Machine::meet(Operation operation, Site site) {
  const uint32_t self = position.thread;
  const uint32_t next = arrive(operation, site);
  if (next != self) switch_to(threads_[self]->fiber, next);
}

inline void Machine::switch_to(Fiber &from, uint32_t thread) {
  position.thread = thread;
  from.switch_to(threads_[thread]->fiber);
}

const char *name(Operation operation);

Machine &machine();

}  // namespace flashspark::emulator
