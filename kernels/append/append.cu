// One kernel for every type: what it does beside moving bytes is little.
#include "append/append.cuh"

FLASHSPARK_KERNEL(flashspark::kAppendWarps * 32, 8)
flashspark_append_kv(FLASHSPARK_PARAMETER flashspark::AppendArguments arguments) {
  flashspark::append(arguments);
}
