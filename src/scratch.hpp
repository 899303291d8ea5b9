// Where a call takes scratch memory from that its params do not bring.
#pragma once

#include "flashspark/flashspark.h"

namespace flashspark {

struct ScratchSource {
  flashspark_allocator allocate = nullptr;  // NULL: the implementation's own
  void *context = nullptr;
};

}  // namespace flashspark
