#include "forward/quantize.cuh"

FLASHSPARK_KERNEL(flashspark::kQuantizeWarps * 32, 8)
flashspark_attention_forward_quantize(FLASHSPARK_PARAMETER flashspark::QuantizeArguments arguments) {
  flashspark::quantize(arguments);
}
