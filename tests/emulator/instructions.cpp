// The instructions: the operands a lane supplies when it issues one, and what the warp does once all lanes have
// arrived.
#include <algorithm>
#include <cstring>
#include <string>

#include "machine.hpp"

namespace flashspark::emulator {

const char *name(Operation operation) {
  constexpr const char *names[] = {"nothing",           "cta_barrier",   "pair_arrive",  "pair_wait",
                                   "mbarrier_arrive",   "mbarrier_wait", "warp_barrier", "ldmatrix_x4",
                                   "ldmatrix_x4_trans", "mma (bf16)",    "mma (fp16)",   "shuffle_xor",
                                   "shuffle",           "shuffle_up",    "ballot",       "any",
                                   "reduce_min",        "reduce_max",    "reduce_add",   "uniform"};
  return names[static_cast<int>(operation)];
}

void Machine::perform(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  switch (warp.meeting.operation) {
    case Operation::warp_barrier:
      counters_.barriers++;
      shared_.join(warp_index * kLanes, kLanes);
      break;
    case Operation::ldmatrix:
    case Operation::ldmatrix_trans:
      counters_.ldmatrix++;
      perform_load(warp_index);
      break;
    case Operation::mma_bfloat16:
    case Operation::mma_float16:
      counters_.mma++;
      multiply_fragments(warp.lane, warp.meeting.operation == Operation::mma_bfloat16, sum_order_);
      break;
    default:
      counters_.shuffles++;
      perform_exchange(warp);
      break;
  }
}

void Machine::perform_load(uint32_t warp_index) {
  Warp &warp = warps_[warp_index];
  const bool transposed = warp.meeting.operation == Operation::ldmatrix_trans;
  uint32_t address[kLanes];
  const uint16_t *row[kLanes];
  for (uint32_t l = 0; l < kLanes; l++) {
    address[l] = warp.lane[l]->in[0];
    try {
      row[l] = shared_.read_row(warp_index, l, address[l], transposed, warp.meeting.site_id);
    } catch (const Complaint &complaint) {
      fail("the row of lane " + std::to_string(l) + ": " + complaint.text, warp.meeting.site_id);
    }
  }
  for (uint32_t m = 0; m < 4; m++) counters_.bank_conflicts += row_conflicts(address + 8 * m, 8);
  load_fragments(warp.lane, row, transposed);
}

// in[0] is the value; in[1] is the lane, mask or distance.
void Machine::perform_exchange(Warp &warp) {
  const Operation operation = warp.meeting.operation;
  uint32_t votes = 0, sum = 0;
  auto smallest = static_cast<int32_t>(warp.lane[0]->in[0]);
  int32_t largest = smallest;
  for (uint32_t l = 0; l < kLanes; l++) {
    const uint32_t value = warp.lane[l]->in[0];
    votes |= static_cast<uint32_t>(value != 0) << l;
    sum += value;
    smallest = std::min(smallest, static_cast<int32_t>(value));
    largest = std::max(largest, static_cast<int32_t>(value));
  }
  if (operation == Operation::uniform && smallest != largest) {
    fail("uniform of values from " + std::to_string(smallest) + " to " + std::to_string(largest), warp.meeting.site_id);
  }
  for (uint32_t l = 0; l < kLanes; l++) {
    const uint32_t argument = warp.lane[l]->in[1];
    uint32_t &out = warp.lane[l]->out[0];
    switch (operation) {
      case Operation::shuffle_xor:
        out = warp.lane[l ^ argument]->in[0];
        break;
      case Operation::shuffle:
        out = warp.lane[argument]->in[0];
        break;
      case Operation::shuffle_up:
        out = warp.lane[argument <= l ? l - argument : l]->in[0];
        break;
      case Operation::ballot:
        out = votes;
        break;
      case Operation::any:
        out = votes != 0;
        break;
      case Operation::reduce_add:
        out = sum;
        break;
      default:
        out = static_cast<uint32_t>(operation == Operation::reduce_min ? smallest : largest);
        break;
    }
  }
}

// ---- instructions as a lane issues them

void Machine::barrier(Operation operation, Site site) {
  meet(operation, site);
}

void Machine::pair(Operation operation, uint32_t pair, uint32_t number, Site site) {
  if (pair != position.thread / (2 * kLanes) || number >= kPairBarriers)
    fail(std::string(name(operation)) + " of pair " + std::to_string(pair) + ", number " + std::to_string(number),
         site_id(site));
  mine().in[0] = number;
  meet(operation, site);
}

void Machine::mbarrier_init(uint32_t address, uint32_t count, Site site) {
  const uint32_t words[2] = {count, 0}, here = site_id(site);
  guarded(here, [&] { shared_.write(position.thread, address, sizeof words, words, here); });
  if (mbarriers_.contains(address)) fail("there is an mbarrier already", here);
  mbarriers_[address] = {count, count, 0, {}, {}, {}};
}

void Machine::mbarrier_invalidate(uint32_t address, Site site) {
  const uint32_t words[2] = {}, here = site_id(site);
  guarded(here, [&] { shared_.write(position.thread, address, sizeof words, words, here); });
  if (mbarriers_.erase(address) == 0) fail("there is no mbarrier", here);
}

void Machine::mbarrier(Operation operation, uint32_t address, uint32_t parity, Site site) {
  mine().in[0] = address;
  mine().in[1] = parity;
  meet(operation, site);
}

void Machine::copy_async(uint32_t to, const void *from, bool valid, Site site) {
  const uint32_t here = site_id(site);
  counters_.cp_async++;
  if (!valid) counters_.cp_async_zero++;
  const bool early = random_.next() % 2 == 0;
  guarded(here, [&] { shared_.copy(position.thread, to, from, valid, early, here); });
}

void Machine::load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site) {
  mine().in[0] = row;
  meet(operation, site);
  std::memcpy(part, mine().out, sizeof part);
}

void Machine::multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       Site site) {
  uint32_t *in = mine().in;
  std::memcpy(in, a, sizeof a);
  in[4] = b0;
  in[5] = b1;
  std::memcpy(in + 6, d, sizeof d);
  meet(operation, site);
  std::memcpy(d, mine().out, sizeof d);
}

uint32_t Machine::exchange(Operation operation, uint32_t value, uint32_t argument, Site site) {
  // The device takes the argument modulo 32, which is never what a caller means.
  if (argument >= kLanes) fail(std::string(name(operation)) + " by " + std::to_string(argument), site_id(site));
  mine().in[0] = value;
  mine().in[1] = argument;
  meet(operation, site);
  return mine().out[0];
}

void Machine::load_shared(void *to, uint32_t from, uint32_t bytes, Site site) {
  const uint32_t here = site_id(site);
  const uint32_t self = position.thread;
  guarded(here, [&] { shared_.read(self, from, bytes, to, here); });
  warps_[self / kLanes].banks.record(uint64_t{here} << 8 | bytes, self % kLanes, from, bytes);
}

void Machine::store_shared(uint32_t to, const void *from, uint32_t bytes, Site site) {
  const uint32_t here = site_id(site);
  const uint32_t self = position.thread;
  guarded(here, [&] { shared_.write(self, to, bytes, from, here); });
  warps_[self / kLanes].banks.record(uint64_t{here} << 8 | bytes, self % kLanes, to, bytes);
}

// ---- the interface that ptx/ptx.cuh calls

void barrier(Operation operation, Site site) {
  machine().barrier(operation, site);
}
void pair(Operation operation, int32_t pair, int32_t number, Site site) {
  machine().pair(operation, static_cast<uint32_t>(pair), static_cast<uint32_t>(number), site);
}
void mbarrier_init(uint32_t address, uint32_t count, Site site) {
  machine().mbarrier_init(address, count, site);
}
void mbarrier_invalidate(uint32_t address, Site site) {
  machine().mbarrier_invalidate(address, site);
}
void mbarrier(Operation operation, uint32_t address, uint32_t parity, Site site) {
  machine().mbarrier(operation, address, parity, site);
}
void copy_async(uint32_t to, const void *from, bool valid, Site site) {
  machine().copy_async(to, from, valid, site);
}
void copy_commit(Site) {
  machine().copy_commit();
}
void copy_wait(uint32_t pending, Site) {
  machine().copy_wait(pending);
}
void load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site) {
  machine().load_matrices(operation, part, row, site);
}
void multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  machine().multiply(operation, d, a, b0, b1, site);
}
uint32_t exchange(Operation operation, uint32_t value, uint32_t argument, Site site) {
  return machine().exchange(operation, value, argument, site);
}
void load_shared(void *to, uint32_t from, uint32_t bytes, Site site) {
  machine().load_shared(to, from, bytes, site);
}
void store_shared(uint32_t to, const void *from, uint32_t bytes, Site site) {
  machine().store_shared(to, from, bytes, site);
}
void fail(const char *text, Site site) {
  machine().fail(text, machine().site_id(site));
}

}  // namespace flashspark::emulator
