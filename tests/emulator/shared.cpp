#include "shared.hpp"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#ifdef FLASHSPARK_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace flashspark::emulator {

namespace {

template <class... Values>
std::string print(const char *format, Values... values) {
  char text[400];
  snprintf(text, sizeof text, format, values...);
  return text;
}

// Offset of the first of 16 bytes that AddressSanitizer has poisoned; -1 if there is none, or without the sanitizer.
int forbidden_byte([[maybe_unused]] const void *from) {
#ifdef FLASHSPARK_EMULATOR_ASAN
  const char *first = static_cast<const char *>(from);
  const void *bad = __asan_region_is_poisoned(const_cast<char *>(first), 16);
  if (bad != nullptr) return static_cast<int>(static_cast<const char *>(bad) - first);
#endif
  return -1;
}

}  // namespace

void SiteTable::find(const char *file) {
  last_file_ = file;
  // The same file name may appear at several addresses. There are only a few dozen.
  last_ = static_cast<uint32_t>(std::find(files_.begin(), files_.end(), file) - files_.begin());
  if (last_ == files_.size()) files_.push_back(file);
}

std::string SiteTable::text(uint32_t number) const {
  const char *file = files_[number >> 20];
  const char *slash = std::strrchr(file, '/');
  return print("%s:%u", slash != nullptr ? slash + 1 : file, number & 0xfffff);
}

void Clocks::reset(uint32_t threads) {
  threads_ = threads;
  clock_.assign(size_t{threads} * threads, 0);
  now_.assign(threads, 1);
  joined_.resize(threads);
  for (uint32_t t = 0; t < threads; t++) clock_[size_t{t} * threads + t] = 1;
}

void Clocks::join(uint32_t first, uint32_t count) {
  learn(first, count, publish(first, count));
}

const Clocks::Row &Clocks::publish(uint32_t first, uint32_t count) {
  std::fill(joined_.begin(), joined_.end(), 0);
  for (uint32_t t = first; t < first + count; t++) {
    uint32_t *row = &clock_[size_t{t} * threads_];
    for (uint32_t u = 0; u < threads_; u++) joined_[u] = std::max(joined_[u], row[u]);
    row[t] = ++now_[t];
  }
  return joined_;
}

void Clocks::learn(uint32_t first, uint32_t count, const Row &published) {
  for (uint32_t t = first; t < first + count; t++) {
    uint32_t *row = &clock_[size_t{t} * threads_];
    for (uint32_t u = 0; u < threads_; u++) {
      if (u != t) row[u] = std::max(row[u], published[u]);
    }
  }
}

void SharedMemory::reset(uint32_t bytes, uint32_t threads) {
  size_ = bytes;
  words_ = (bytes + 3) / 4;
  data_.assign(words_, 0xffffffff);
  word_.assign(words_, Word{});
  reads_.resize(size_t{words_} * (threads / 32));  // valid only where Word::reading_warps is set
  queue_.resize(threads);
  for (Queue &queue : queue_) queue = {};
  clocks_.reset(threads);
}

void SharedMemory::check_range(const char *what, uint32_t address, uint32_t bytes) const {
  if (address < kSharedBase || uint64_t{address} + bytes > uint64_t{kSharedBase} + size_) {
    throw Complaint{print("%s of %u bytes at shared offset %lld, out of bounds: the block has %u bytes", what, bytes,
                          static_cast<long long>(address) - kSharedBase, size_)};
  }
  if (address % bytes != 0) {
    throw Complaint{print("%s of %u bytes at shared offset %u, misaligned", what, bytes, address - kSharedBase)};
  }
}

void SharedMemory::race(const char *doing, const char *done, uint32_t word, uint32_t other, uint32_t site_id) const {
  throw Complaint{print("race: %s shared offset %u that thread %u %s at %s, no barrier between", doing, 4 * word, other,
                        done, sites.text(site_id).c_str())};
}

void SharedMemory::check_read(uint32_t thread, uint32_t word) {
  const Word &w = word_[word];
  if (w.state == State::valid && clocks_.knows(thread, w.writer, w.time)) [[likely]] {
    return;
  }
  switch (w.state) {
    case State::valid:
      race("reads", "wrote", word, w.writer, w.site_id);
    case State::in_flight:
      throw Complaint{print("reads shared offset %u, whose copy in flight was issued by thread %u at %s", 4 * word,
                            uint32_t{w.writer}, sites.text(w.site_id).c_str())};
    case State::unwritten:
      throw Complaint{print("reads shared offset %u, which is uninitialised", 4 * word)};
  }
}

void SharedMemory::stamp_read(uint32_t thread, uint32_t word, uint32_t site_id) {
  const uint32_t warp = thread / 32;
  const uint32_t lane = 1u << thread % 32;
  const uint32_t now = clocks_.now(thread);
  const auto warp_bit = static_cast<uint16_t>(1u << warp);
  Word &w = word_[word];
  Reads &reads = reads_[size_t{warp} * words_ + word];
  if ((w.reading_warps & warp_bit) != 0 && reads.time == now) {
    reads.lanes |= lane;
  } else {
    w.reading_warps |= warp_bit;
    reads = {now, lane, site_id};
  }
}

void SharedMemory::check_write(uint32_t thread, uint32_t word) {
  Word &w = word_[word];
  if (w.state == State::in_flight) {
    throw Complaint{print("writes shared offset %u, whose copy in flight was issued by thread %u at %s", 4 * word,
                          uint32_t{w.writer}, sites.text(w.site_id).c_str())};
  }
  if (w.state == State::valid && !clocks_.knows(thread, w.writer, w.time))
    race("writes", "wrote", word, w.writer, w.site_id);
  for (uint32_t warps = w.reading_warps; warps != 0; warps &= warps - 1) {
    const auto warp = static_cast<uint32_t>(std::countr_zero(warps));
    const Reads &reads = reads_[size_t{warp} * words_ + word];
    for (uint32_t lanes = reads.lanes; lanes != 0; lanes &= lanes - 1) {
      const uint32_t reader = 32 * warp + static_cast<uint32_t>(std::countr_zero(lanes));
      if (!clocks_.knows(thread, reader, reads.time)) race("writes", "read", word, reader, reads.site_id);
    }
  }
  w.reading_warps = 0;
}

void SharedMemory::read(uint32_t thread, uint32_t address, uint32_t bytes, void *to, uint32_t site_id) {
  check_range("load", address, bytes);
  const uint32_t first = (address - kSharedBase) / 4;
  for (uint32_t word = first; word < first + bytes / 4; word++) {
    check_read(thread, word);
    stamp_read(thread, word, site_id);
  }
  std::memcpy(to, bytes_at(address), bytes);
}

void SharedMemory::write(uint32_t thread, uint32_t address, uint32_t bytes, const void *from, uint32_t site_id) {
  check_range("store", address, bytes);
  const uint32_t first = (address - kSharedBase) / 4;
  for (uint32_t word = first; word < first + bytes / 4; word++) {
    check_write(thread, word);
    Word &w = word_[word];
    w.state = State::valid;
    w.writer = static_cast<uint16_t>(thread);
    w.time = clocks_.now(thread);
    w.site_id = site_id;
  }
  std::memcpy(bytes_at(address), from, bytes);
}

const uint16_t *SharedMemory::read_row(uint32_t warp, uint32_t address_lane, uint32_t address, bool transposed,
                                       uint32_t site_id) {
  check_range("ldmatrix", address, 16);
  const uint32_t first = (address - kSharedBase) / 4;
  const uint32_t row = address_lane % 8;
  for (uint32_t i = 0; i < 4; i++) {
    // Without .trans, word i of a row goes to one lane; with it, its two halves go to two lanes.
    const uint32_t thread = 32 * warp + (transposed ? 8 * i + row / 2 : 4 * row + i);
    check_read(thread, first + i);
    if (transposed) check_read(thread + 4, first + i);
    stamp_read(thread, first + i, site_id);
  }
  return reinterpret_cast<const uint16_t *>(bytes_at(address));
}

void SharedMemory::copy(uint32_t thread, uint32_t address, const void *from, bool valid, bool early, uint32_t site_id) {
  check_range("cp.async", address, 16);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    throw Complaint{print("cp.async from %p, a source misaligned", from)};
  }
  if (valid) {
    const int bad = forbidden_byte(from);
    if (bad >= 0) {
      throw Complaint{
          print("cp.async from %p, whose byte %d is poisoned: outside its array, or not to be read", from, bad)};
    }
  }
  const uint32_t first = (address - kSharedBase) / 4;
  for (uint32_t word = first; word < first + 4; word++) {
    check_write(thread, word);
    Word &w = word_[word];
    w.state = State::in_flight;
    w.writer = static_cast<uint16_t>(thread);
    w.site_id = site_id;
  }
  std::memset(bytes_at(address), 0xff, 16);
  Queue &queue = queue_[thread];
  Copy &copy = queue.copies.emplace_back(Copy{address, site_id, from, valid, early, {}});
  if (valid && early) std::memcpy(copy.word, from, 16);
  queue.open++;
}

void SharedMemory::commit(uint32_t thread) {
  Queue &queue = queue_[thread];
  queue.groups.push_back(queue.open);
  queue.open = 0;
}

void SharedMemory::wait(uint32_t thread, uint32_t pending) {
  Queue &queue = queue_[thread];
  if (queue.groups.size() <= pending) return;
  const auto end = queue.groups.end() - pending;
  uint32_t landed = 0;
  for (auto group = queue.groups.begin(); group != end; ++group) landed += *group;
  for (uint32_t i = 0; i < landed; i++) land(thread, queue.copies[i]);
  queue.groups.erase(queue.groups.begin(), end);
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + landed);
}

void SharedMemory::land(uint32_t thread, const Copy &copy) {
  uint8_t *to = bytes_at(copy.address);
  if (!copy.valid) {
    std::memset(to, 0, 16);
  } else {
    std::memcpy(to, copy.early ? copy.word : copy.from, 16);
  }
  // Other threads may read the bytes once they are ordered after this thread's wait.
  const uint32_t first = (copy.address - kSharedBase) / 4;
  for (uint32_t word = first; word < first + 4; word++) {
    word_[word].state = State::valid;
    word_[word].time = clocks_.now(thread);
  }
}

const uint32_t *SharedMemory::unfinished(uint32_t thread) const {
  const Queue &queue = queue_[thread];
  return queue.copies.empty() ? nullptr : &queue.copies.front().site_id;
}

}  // namespace flashspark::emulator
