// The state of one launch: its fibers, the scheduling of warps and lanes, and the points where lanes and warps meet.
#pragma once

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
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
inline constexpr uint32_t kPairBarriers = 2;  // of each pair of warps

// How the warps of a CTA take turns. The priority policies let a warp run as far ahead as barriers allow.
enum class Policy { random, priority, priority_with_swaps };

// What lanes or warps are waiting for together.
struct Meeting {
  Operation operation = Operation::none;
  uint32_t site_id = 0;
};

struct Warp {
  uint32_t ready = 0;    // one bit per lane
  uint32_t waiting = 0;  // at `meeting`
  uint32_t exited = 0;
  Meeting meeting;
  // The order in which lanes run: cyclic from `rotation`, in either direction, redrawn after each meeting.
  uint32_t rotation = 0;
  bool backwards = false;
  BankCounter banks;
  Registers *lane[kLanes];
};

// One warp has arrived, or the other one waits, or neither.
struct PairBarrier {
  bool arrived = false;
  uint32_t warp = 0;  // that has arrived
  Clocks::Row clock;  // of its threads then
  uint32_t waiting = kNone;

  static constexpr uint32_t kNone = ~0u;
};

// Phases of `count` arrivals of warps each.
struct Mbarrier {
  uint32_t count = 0, left = 0;
  uint32_t ended = 0;           // phases
  Clocks::Row arrived, passed;  // clocks of the phase's arrivals so far, and of all of the last one
  std::vector<uint32_t> waiting;
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
  void pair(Operation operation, uint32_t pair, uint32_t number, Site site);
  void mbarrier_init(uint32_t address, uint32_t count, Site site);
  void mbarrier_invalidate(uint32_t address, Site site);
  void mbarrier(Operation operation, uint32_t address, uint32_t parity, Site site);
  void copy_async(uint32_t to, const void *from, bool valid, Site site);
  void copy_commit() { shared_.commit(position.thread); }
  void copy_wait(uint32_t pending) { shared_.wait(position.thread, pending); }
  void load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site);
  void multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
  uint32_t exchange(Operation operation, uint32_t value, uint32_t argument, Site site);
  void load_shared(void *to, uint32_t from, uint32_t bytes, Site site);
  void store_shared(uint32_t to, const void *from, uint32_t bytes, Site site);
  [[noreturn]] void fail(const std::string &text, uint32_t site_id);
  uint32_t site_id(Site site) { return shared_.sites.number(site); }

 private:
  static void run_fiber();
  void run_thread();
  void run_cta(const LaunchOptions &options, const uint32_t (&cta)[3]);
  void meet(Operation operation, Site site);
  uint32_t arrive(Operation operation, Site site);
  void complete(uint32_t warp_index);
  void perform(uint32_t warp_index);
  void perform_load(uint32_t warp_index);
  void perform_exchange(Warp &warp);
  void meet_cta(uint32_t warp_index);
  void arrive_at_pair(uint32_t warp_index);
  void wait_at_pair(uint32_t warp_index);
  Mbarrier &mbarrier_of(uint32_t warp_index);
  void arrive_at_mbarrier(uint32_t warp_index);
  void wait_at_mbarrier(uint32_t warp_index);
  void release(uint32_t warp_index);
  void leave();
  uint32_t next_thread();
  uint32_t pick_warp();
  uint32_t pick_lane(const Warp &warp) const;
  void switch_to(Fiber &from, uint32_t thread);

  // Reports a Complaint as a Fault of the running thread.
  template <class Call>
  auto guarded(uint32_t site_id, Call call) {
    try {
      return call();
    } catch (const Complaint &complaint) {
      fail(complaint.text, site_id);
    }
  }

  Registers &mine() { return threads_[position.thread]->registers; }

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<uint32_t> priority_;  // warp indices, most urgent first
  SharedMemory shared_;
  Fiber launcher_;
  Random random_{0};
  SumOrder sum_order_{random_};
  Policy policy_ = Policy::random;
  const std::function<void()> *kernel_ = nullptr;
  std::exception_ptr error_;
  Counters counters_;

  uint32_t count_ = 0;        // threads per CTA
  uint32_t alive_ = 0;        // threads that have not exited
  uint32_t ready_warps_ = 0;  // one bit per warp
  uint32_t arrived_warps_ = 0;
  std::vector<PairBarrier> pairs_;          // kPairBarriers of each pair of warps
  std::map<uint32_t, Mbarrier> mbarriers_;  // by address
  Meeting cta_meeting_;
};

// Suspends this lane until all lanes it meets have arrived and the operation is done. Inline for the same reason as
// Fiber::switch_to.
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
