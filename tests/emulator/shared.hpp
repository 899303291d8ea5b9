// A block's shared memory: the bytes, copies under way, and for every word of 4 bytes who wrote and who read it last.
// Two accesses by different threads, one of them a write, are a race unless a barrier lies between them. That is
// decided by vector clocks, not by the order in which the fibers happened to run: one execution of both accesses is
// enough.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "operations.hpp"

namespace flashspark::emulator {

// A Site in 32 bits, to fit the shadow of a word.
class Places {
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

// Thrown by SharedMemory; the scheduler adds who and where, and makes it a Fault.
struct Complaint {
  std::string text;
};

// What each thread knows of the others: clock(t, u) is the last time of u's that happened before t's present. A
// thread's own time advances at each barrier it passes.
class Clocks {
 public:
  void reset(uint32_t threads);
  uint32_t now(uint32_t thread) const { return now_[thread]; }
  bool knows(uint32_t thread, uint32_t other, uint32_t time) const {
    return thread == other || clock_[size_t{thread} * threads_ + other] >= time;
  }
  // Threads [first, first + count) have met at a barrier.
  void join(uint32_t first, uint32_t count);

 private:
  uint32_t threads_ = 0;
  std::vector<uint32_t> clock_;  // [t][u]
  std::vector<uint32_t> now_;    // what is on its diagonal
  std::vector<uint32_t> joined_;
};

class SharedMemory {
 public:
  // A block begins: all bytes are 0xff, which is NaN in every format, and count as never written.
  void reset(uint32_t bytes, uint32_t threads);
  void join(uint32_t first, uint32_t count) { clocks_.join(first, count); }

  // `thread` is who does it, `place` where; each throws a Complaint if it must not.
  void read(uint32_t thread, uint32_t address, uint32_t bytes, void *to, uint32_t place);
  void write(uint32_t thread, uint32_t address, uint32_t bytes, const void *from, uint32_t place);
  // One row of an 8x8 matrix of 16-bit numbers; words go to the lanes that ldmatrix gives them to.
  const uint16_t *read_row(uint32_t warp, uint32_t address_lane, uint32_t address, bool transposed, uint32_t place);

  void copy(uint32_t thread, uint32_t address, const void *from, bool valid, bool early, uint32_t place);
  void commit(uint32_t thread);
  void wait(uint32_t thread, uint32_t pending);
  // The place of a copy that this thread has not waited for; NULL if there is none.
  const uint32_t *unfinished(uint32_t thread) const;

  Places places;

 private:
  enum class State : uint8_t { unwritten, in_flight, valid };
  struct Word {
    uint32_t time;
    uint32_t place;
    uint16_t writer;
    uint16_t reading_warps;  // a bit each
    State state;
  };
  // The last reads of a word by a warp. Lanes of a warp pass every barrier together, so their times are equal and older
  // reads are covered by newer ones.
  struct Reads {
    uint32_t time;
    uint32_t lanes;
    uint32_t place;
  };
  struct Copy {
    uint32_t address;
    uint32_t place;
    const void *from;
    bool valid, early;
    uint32_t word[4];
  };
  // Copies in the order of issue; the groups that were ended, each as its number of copies, and the rest.
  struct Queue {
    std::vector<Copy> copies;
    std::vector<uint32_t> groups;
    uint32_t open = 0;
  };

  void check_range(const char *what, uint32_t address, uint32_t bytes) const;
  void check_read(uint32_t thread, uint32_t word);
  void stamp_read(uint32_t thread, uint32_t word, uint32_t place);
  void check_write(uint32_t thread, uint32_t word);
  void land(uint32_t thread, const Copy &copy);
  [[noreturn]] void race(const char *doing, const char *done, uint32_t word, uint32_t other, uint32_t place) const;

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
