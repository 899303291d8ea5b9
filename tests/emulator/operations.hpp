// What ptx/ptx.cuh calls: the instructions, with the kernel's line that issues each. Not for kernels or tests.
#pragma once

#include <cstdint>

namespace flashspark::emulator {

// A place in the kernel's source.
struct Site {
  int line = 0;
  const char *file = "";
};

// Where the running fiber is.
struct Position {
  uint32_t thread;
  uint32_t block[3];
};
extern Position position;

// Shared memory starts above zero, as on the device, so that address 0 is never right.
inline constexpr uint32_t kSharedBase = 0x400;

// What lanes of a warp meet for.
enum class Operation : uint8_t {
  none,
  cta_barrier,
  warp_barrier,
  ldmatrix,
  ldmatrix_trans,
  mma_bfloat16,
  mma_float16,
  shuffle_xor,
  shuffle,
  shuffle_up,
  ballot,
  any,
  reduce_min,
  reduce_max,
  reduce_add,
  uniform,
};

void barrier(Operation operation, Site site);

void copy_async(uint32_t to, const void *from, bool valid, Site site);
void copy_commit(Site site);
void copy_wait(uint32_t pending, Site site);

void load_matrices(Operation operation, uint32_t (&part)[4], uint32_t row, Site site);
void multiply(Operation operation, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site);
uint32_t exchange(Operation operation, uint32_t value, uint32_t argument, Site site);

// bytes: 4 or 16.
void load_shared(void *to, uint32_t from, uint32_t bytes, Site site);
void store_shared(uint32_t to, const void *from, uint32_t bytes, Site site);

[[noreturn]] void fail(const char *text, Site site);

}  // namespace flashspark::emulator
