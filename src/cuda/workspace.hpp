// Scratch memory of a call on a GPU.
#pragma once

#include <bit>
#include <string>

#include "cuda/driver.hpp"
#include "error.hpp"
#include "scratch.hpp"

namespace flashspark::cuda {

// Scratch memory of one call: the caller's, or taken and given back in the order of the stream.
class Workspace {
 public:
  struct Given {
    void *data;  // NULL: nothing
    size_t size;
  };
  Workspace(const Given &given, Stream stream, const ScratchSource &source, size_t bytes) : stream_(stream) {
    if (bytes == 0) return;
    if (given.data != nullptr) {
      if (given.size < bytes)
        fail("workspace_size", std::to_string(given.size),
             "must be at least " + std::to_string(bytes) + " bytes for this problem, or workspace NULL");
      data_ = given.data;
    } else if (source.allocate != nullptr) {
      data_ = source.allocate(source.context, bytes);
      if (data_ == nullptr)
        throw Error(FLASHSPARK_OUT_OF_MEMORY, "the allocator has no " + std::to_string(bytes) + " bytes");
    } else {
      FLASHSPARK_CUDA_CALL(driver(), cuMemAllocAsync, &own_, bytes, stream_);
      data_ = std::bit_cast<void *>(own_);
    }
    if (reinterpret_cast<uintptr_t>(data_) % 16 != 0) fail("workspace", "misaligned", "must be aligned to 16 bytes");
  }
  ~Workspace() {
    if (own_ != 0) driver().cuMemFreeAsync(own_, stream_);
  }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;

  void *data() const { return data_; }

 private:
  Stream stream_;
  Address own_ = 0;
  void *data_ = nullptr;
};

}  // namespace flashspark::cuda
