// A CTA's shared memory: its bytes, the async copies in flight, and for every 4-byte word its last writer and readers.
// Two accesses by different threads, at least one of them a write, race unless a barrier orders them. Vector clocks
// decide this, not the order in which the fibers happened to run, so one execution of both accesses is enough.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "operations.hpp"

namespace flashspark::emulator {

// Packs a Site into 32 bits, to keep the shadow of a word small.
class SiteTable {
 public:
  uint32_t number(Site site) {
    if (site.file != last_file_) find(site.file);
    return last_ << 20 | static_cast<uint32_t>(site.line);
  }
  std::string text(uint32_t number) const;

 private:
  void find(const char *file);

  std::vector<const char *> files_;
  const char *last_file_ = nullptr;
  uint32_t last_ = 0;
};

// Thrown by SharedMemory. The scheduler adds the thread and the site and turns it into a Fault.
struct Complaint {
  std::string text;
};

// Vector clocks: clock(t, u) is the latest time of thread u that happened before thread t's present. A thread's own
// time advances at each barrier it passes.
class Clocks {
 public:
  void reset(uint32_t threads);
  uint32_t now(uint32_t thread) const { return now_[thread]; }
  bool knows(uint32_t thread, uint32_t other, uint32_t time) const {
    return thread == other || clock_[size_t{thread} * threads_ + other] >= time;
  }
  // Orders threads [first, first + count), which have met at a barrier.
  void join(uint32_t first, uint32_t count);
  // The two halves of it, for threads that arrive, and others that wait for them.
  using Row = std::vector<uint32_t>;
  const Row &publish(uint32_t first, uint32_t count);
  void learn(uint32_t first, uint32_t count, const Row &published);

 private:
  uint32_t threads_ = 0;
  std::vector<uint32_t> clock_;  // [t][u]
  std::vector<uint32_t> now_;    // the diagonal of clock_
  std::vector<uint32_t> joined_;
};

class SharedMemory {
 public:
  // Starts a CTA: every byte is 0xff, which is NaN in every format, and counts as never written.
  void reset(uint32_t bytes, uint32_t threads);
  void join(uint32_t first, uint32_t count) { clocks_.join(first, count); }
  Clocks &clocks() { return clocks_; }

  // `thread` accesses memory at `site_id`. Each throws a Complaint if the access is not allowed.
  void read(uint32_t thread, uint32_t address, uint32_t bytes, void *to, uint32_t site_id);
  void write(uint32_t thread, uint32_t address, uint32_t bytes, const void *from, uint32_t site_id);
  // Reads one row of an 8x8 matrix of 16-bit values, on behalf of the lanes that ldmatrix delivers it to.
  const uint16_t *read_row(uint32_t warp, uint32_t address_lane, uint32_t address, bool transposed, uint32_t site_id);

  void copy(uint32_t thread, uint32_t address, const void *from, bool valid, bool early, uint32_t site_id);
  void commit(uint32_t thread);
  void wait(uint32_t thread, uint32_t pending);
  // The site of a copy that this thread has not waited for; NULL if there is none.
  const uint32_t *unfinished(uint32_t thread) const;

  SiteTable sites;

 private:
  enum class State : uint8_t { unwritten, in_flight, valid };
  struct Word {
    uint32_t time;
    uint32_t site_id;
    uint16_t writer;
    uint16_t reading_warps;  // one bit per warp
    State state;
  };
  // The last reads of a word by one warp. The lanes of a warp pass every barrier together, so their times are equal and
  // newer reads supersede older ones.
  struct Reads {
    uint32_t time;
    uint32_t lanes;
    uint32_t site_id;
  };
  struct Copy {
    uint32_t address;
    uint32_t site_id;
    const void *from;
    bool valid, early;
    uint32_t word[4];
  };
  // A thread's copies in order of issue; committed groups, each as its number of copies; and the number not yet
  // committed.
  struct Queue {
    std::vector<Copy> copies;
    std::vector<uint32_t> groups;
    uint32_t open = 0;
  };

  void check_range(const char *what, uint32_t address, uint32_t bytes) const;
  void check_read(uint32_t thread, uint32_t word);
  void stamp_read(uint32_t thread, uint32_t word, uint32_t site_id);
  void check_write(uint32_t thread, uint32_t word);
  void land(uint32_t thread, const Copy &copy);
  [[noreturn]] void race(const char *doing, const char *done, uint32_t word, uint32_t other, uint32_t site_id) const;

  uint8_t *bytes_at(uint32_t address) { return reinterpret_cast<uint8_t *>(data_.data()) + (address - kSharedBase); }

  uint32_t size_ = 0;
  uint32_t words_ = 0;
  std::vector<uint32_t> data_;
  std::vector<Word> word_;
  std::vector<Reads> reads_;  // [warp][word]
  std::vector<Queue> queue_;
  Clocks clocks_;
};

}  // namespace flashspark::emulator
