// Fibers, the choice of the next thread to run, and the points where lanes and warps meet.
#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "machine.hpp"

namespace flashspark::emulator {

Position position{};

// Leaked on purpose: fibers may be abandoned inside a kernel and need no destruction.
Machine &machine() {
  static Machine *const instance = new Machine;
  return *instance;
}

void Machine::fail(const std::string &text, uint32_t site_id) {
  throw Fault("block (" + std::to_string(position.cta[0]) + ", " + std::to_string(position.cta[1]) + ", " +
              std::to_string(position.cta[2]) + ") thread " + std::to_string(position.thread) + " " +
              shared_.sites.text(site_id) + ": " + text);
}

// ---- fibers

void Machine::run_fiber() {
  Machine &m = machine();
  for (;;) m.run_thread();
}

void Machine::run_thread() {
  const uint32_t self = position.thread;
  try {
    (*kernel_)();
    leave();
  } catch (...) {
    error_ = std::current_exception();
  }
  Thread &thread = *threads_[self];
  if (error_ != nullptr || alive_ == 0) {
    thread.fiber.switch_to(launcher_);
  } else {
    switch_to(thread.fiber, next_thread());
  }
}

void Machine::leave() {
  const uint32_t self = position.thread;
  Warp &warp = warps_[self / kLanes];
  if (const uint32_t *copy = shared_.unfinished(self)) fail("exits with a copy in flight", *copy);
  if (warp.waiting != 0) {
    fail(std::string("exits while other lanes of its warp wait at ") + name(warp.meeting.operation),
         warp.meeting.site_id);
  }
  const uint32_t first_barrier = self / kLanes / 2 * kPairBarriers;
  for (uint32_t n = first_barrier; n < first_barrier + kPairBarriers; ++n) {
    if (pairs_[n].waiting != PairBarrier::kNone)
      fail("exits while the other warp of its pair waits", warps_[pairs_[n].waiting].meeting.site_id);
    if (pairs_[n].arrived) fail("exits where nobody has waited for an arrival", warps_[pairs_[n].warp].meeting.site_id);
  }
  if (arrived_warps_ != 0) fail("exits while other warps wait at cta_barrier", cta_meeting_.site_id);
  const uint32_t bit = 1u << self % kLanes;
  warp.ready &= ~bit;
  warp.exited |= bit;
  if (warp.ready == 0) ready_warps_ &= ~(1u << self / kLanes);
  if (warp.exited == kAll) counters_.bank_conflicts += warp.banks.take();
  alive_--;
  if (ready_warps_ == 0 && alive_ > 0) fail("deadlock: exits while all other warps wait", shared_.sites.number({}));
}

// ---- choosing who runs next

// A ready warp always exists while a thread is alive: a lane that others wait for is either ready, or waits elsewhere
// or has exited, and the latter two are reported as faults. A deadlock therefore always surfaces as a fault.
uint32_t Machine::pick_warp() {
  if (policy_ == Policy::random) {
    uint32_t left = random_.below(static_cast<uint32_t>(std::popcount(ready_warps_)));
    uint32_t warps = ready_warps_;
    for (; left > 0; left--) warps &= warps - 1;
    return static_cast<uint32_t>(std::countr_zero(warps));
  }
  if (policy_ == Policy::priority_with_swaps && random_.below(32) == 0) {
    const auto warps = static_cast<uint32_t>(priority_.size());
    std::swap(priority_[random_.below(warps)], priority_[random_.below(warps)]);
  }
  return *std::find_if(priority_.begin(), priority_.end(), [&](uint32_t warp) { return ready_warps_ >> warp & 1; });
}

uint32_t Machine::pick_lane(const Warp &warp) const {
  const uint32_t turned = std::rotr(warp.ready, static_cast<int>(warp.rotation));
  const auto at = static_cast<uint32_t>(warp.backwards ? 31 - std::countl_zero(turned) : std::countr_zero(turned));
  return (at + warp.rotation) % kLanes;
}

// Lanes of a warp run one after another until they meet. Another warp may be scheduled at a meeting and, rarely, in
// between.
uint32_t Machine::next_thread() {
  uint32_t warp = position.thread / kLanes;
  const bool stay = warps_[warp].ready != 0 && (policy_ == Policy::priority || random_.next() % 128 != 0);
  if (!stay) warp = pick_warp();
  return warp * kLanes + pick_lane(warps_[warp]);
}

// ---- meetings

// Lets this lane wait for `operation`. Returns the next thread to run: itself if all lanes have arrived and its warp
// continues.
uint32_t Machine::arrive(Operation operation, Site site) {
  const uint32_t self = position.thread;
  const uint32_t warp_index = self / kLanes;
  Warp &warp = warps_[warp_index];
  const uint32_t here = site_id(site);
  if (warp.exited != 0) {
    fail(std::string(name(operation)) + " without lane " + std::to_string(std::countr_zero(warp.exited)) +
             ", which has exited",
         here);
  }
  if (warp.waiting == 0) {
    warp.meeting = {operation, here};
  } else if (warp.meeting.operation != operation || warp.meeting.site_id != here) {
    fail(std::string("divergence: ") + name(operation) + " while lane " +
             std::to_string(std::countr_zero(warp.waiting)) + " waits at " + name(warp.meeting.operation) + ", " +
             shared_.sites.text(warp.meeting.site_id),
         here);
  }
  const uint32_t bit = 1u << self % kLanes;
  warp.waiting |= bit;
  warp.ready &= ~bit;
  if (warp.waiting != kAll) {
    if (warp.ready == 0) ready_warps_ &= ~(1u << warp_index);
    return next_thread();
  }
  complete(warp_index);
  if (ready_warps_ == 0) fail("deadlock: all warps wait, at cta_barrier, pair_wait or mbarrier_wait", here);
  const uint32_t chosen = pick_warp();
  return chosen == warp_index ? self : chosen * kLanes + pick_lane(warps_[chosen]);
}

// All lanes of the warp have arrived.
void Machine::complete(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  counters_.bank_conflicts += warp.banks.take();
  if (warp.meeting.operation == Operation::cta_barrier) {
    meet_cta(warp_index);
  } else if (warp.meeting.operation == Operation::pair_arrive) {
    arrive_at_pair(warp_index);
  } else if (warp.meeting.operation == Operation::pair_wait) {
    wait_at_pair(warp_index);
  } else if (warp.meeting.operation == Operation::mbarrier_arrive) {
    arrive_at_mbarrier(warp_index);
  } else if (warp.meeting.operation == Operation::mbarrier_wait) {
    wait_at_mbarrier(warp_index);
  } else {
    perform(warp_index);
    release(warp_index);
  }
}

void Machine::release(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  warp.waiting = 0;
  warp.ready = kAll;
  ready_warps_ |= 1u << warp_index;
  const uint32_t choice = random_.next();
  warp.rotation = choice % kLanes;
  warp.backwards = (choice >> 8 & 1) != 0;
}

void Machine::meet_cta(uint32_t warp_index) {
  const Meeting &meeting = warps_[warp_index].meeting;
  const auto warps = static_cast<uint32_t>(warps_.size());
  if (alive_ != count_) fail("cta_barrier after threads have exited", meeting.site_id);
  if (arrived_warps_ == 0) {
    cta_meeting_ = meeting;
  } else if (cta_meeting_.site_id != meeting.site_id) {
    fail("divergence: cta_barrier while other warps wait at that of " + shared_.sites.text(cta_meeting_.site_id),
         meeting.site_id);
  }
  arrived_warps_++;
  ready_warps_ &= ~(1u << warp_index);
  if (arrived_warps_ < warps) return;
  arrived_warps_ = 0;
  counters_.barriers++;
  shared_.join(0, count_);
  for (uint32_t w = 0; w < warps; w++) release(w);
}

void Machine::arrive_at_pair(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  PairBarrier &barrier = pairs_[warp_index / 2 * kPairBarriers + warp.lane[0]->in[0]];
  if (barrier.arrived) fail("pair_arrive before the other warp has waited for the last one", warp.meeting.site_id);
  const Clocks::Row &clock = shared_.clocks().publish(warp_index * kLanes, kLanes);
  if (barrier.waiting == PairBarrier::kNone) {
    barrier.arrived = true;
    barrier.warp = warp_index;
    barrier.clock = clock;
  } else {
    shared_.clocks().learn(barrier.waiting * kLanes, kLanes, clock);
    release(barrier.waiting);
    barrier.waiting = PairBarrier::kNone;
  }
  release(warp_index);
}

void Machine::wait_at_pair(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  PairBarrier &barrier = pairs_[warp_index / 2 * kPairBarriers + warp.lane[0]->in[0]];
  counters_.barriers++;
  if (barrier.waiting != PairBarrier::kNone || (barrier.arrived && barrier.warp == warp_index))
    fail("pair_wait of both warps of a pair, or for oneself", warp.meeting.site_id);
  if (!barrier.arrived) {
    ready_warps_ &= ~(1u << warp_index);
    barrier.waiting = warp_index;
    return;
  }
  barrier.arrived = false;
  shared_.clocks().learn(warp_index * kLanes, kLanes, barrier.clock);
  release(warp_index);
}

// What is at the address, once the warp may know it.
Mbarrier &Machine::mbarrier_of(uint32_t warp_index) {
  const Warp &warp = warps_[warp_index];
  const uint32_t address = warp.lane[0]->in[0], here = warp.meeting.site_id;
  uint32_t words[2];
  guarded(here, [&] { shared_.read(warp_index * kLanes, address, sizeof words, words, here); });
  const auto found = mbarriers_.find(address);
  if (found == mbarriers_.end()) fail("there is no mbarrier", here);
  return found->second;
}

void Machine::arrive_at_mbarrier(uint32_t warp_index) {
  Mbarrier &barrier = mbarrier_of(warp_index);
  const Clocks::Row &clock = shared_.clocks().publish(warp_index * kLanes, kLanes);
  barrier.arrived.resize(clock.size());
  for (size_t n = 0; n < clock.size(); ++n) barrier.arrived[n] = std::max(barrier.arrived[n], clock[n]);
  release(warp_index);
  if (--barrier.left > 0) return;
  barrier.left = barrier.count;
  barrier.ended++;
  barrier.passed = std::exchange(barrier.arrived, {});
  for (const uint32_t waiting : std::exchange(barrier.waiting, {})) {
    shared_.clocks().learn(waiting * kLanes, kLanes, barrier.passed);
    release(waiting);
  }
}

void Machine::wait_at_mbarrier(uint32_t warp_index) {
  Mbarrier &barrier = mbarrier_of(warp_index);
  counters_.barriers++;
  if (barrier.ended % 2 == warps_[warp_index].lane[0]->in[1]) {
    ready_warps_ &= ~(1u << warp_index);
    barrier.waiting.push_back(warp_index);
    return;
  }
  if (barrier.ended > 0) shared_.clocks().learn(warp_index * kLanes, kLanes, barrier.passed);
  release(warp_index);
}

// ---- launch

void Machine::run_cta(const LaunchOptions &options, const uint32_t (&cta)[3]) {
  std::memcpy(position.cta, cta, sizeof cta);
  policy_ = static_cast<Policy>(random_.below(3));
  random_.shuffle(priority_);
  shared_.reset(options.shared_bytes, options.threads);
  ready_warps_ = 0;
  arrived_warps_ = 0;
  mbarriers_.clear();
  pairs_.assign((warps_.size() + 1) / 2 * kPairBarriers, {});
  alive_ = options.threads;
  for (uint32_t w = 0; w < warps_.size(); w++) {
    warps_[w].exited = 0;
    warps_[w].banks.take();
    release(w);
  }
  const uint32_t first = pick_warp();
  switch_to(launcher_, first * kLanes + pick_lane(warps_[first]));
}

Counters Machine::launch(const LaunchOptions &options, const std::function<void()> &kernel) {
  const uint64_t ctas = uint64_t{options.grid[0]} * options.grid[1] * options.grid[2];
  if (options.threads == 0 || options.threads % kLanes != 0 || options.threads > kMaxThreads) {
    throw std::invalid_argument("launch: threads");
  }
  if (ctas == 0 || ctas > 0xffffffff) throw std::invalid_argument("launch: grid");
  random_ = Random(options.seed);
  sum_order_ = SumOrder(random_);
  kernel_ = &kernel;
  counters_ = {};
  count_ = options.threads;
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>(run_fiber));
  const uint32_t warps = count_ / kLanes;
  warps_.resize(warps);
  priority_.resize(warps);
  for (uint32_t w = 0; w < warps; w++) {
    priority_[w] = w;
    for (uint32_t l = 0; l < kLanes; l++) warps_[w].lane[l] = &threads_[w * kLanes + l]->registers;
  }
  std::vector<uint32_t> order(ctas);
  for (uint32_t i = 0; i < ctas; i++) order[i] = i;
  if (!options.in_order) random_.shuffle(order);
  for (const uint32_t index : order) {
    run_cta(options, {index % options.grid[0], index / options.grid[0] % options.grid[1],
                      index / options.grid[0] / options.grid[1]});
    if (error_ != nullptr) {
      // The other fibers are suspended inside the kernel and are discarded.
      threads_.clear();
      warps_.clear();
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }
  return counters_;
}

Counters launch(const LaunchOptions &options, const std::function<void()> &kernel) {
  return machine().launch(options, kernel);
}

}  // namespace flashspark::emulator
