#include "kernels.hpp"
#include "quantize/quantize.cuh"

constexpr flashspark::OperationTraits kOperation = traits_of(flashspark::Operation::attention_forward_quantize);
static_assert(kOperation.threads == flashspark::kQuantizeWarps * 32);
static_assert(kOperation.rows == flashspark::kQuantizeRows);

FLASHSPARK_KERNEL(kOperation.threads, kOperation.min_ctas)
FLASHSPARK_ENTRY(FLASHSPARK_PARAMETER flashspark::QuantizeArguments arguments) {
  flashspark::quantize(arguments);
}
