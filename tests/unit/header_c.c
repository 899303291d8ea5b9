/* flashspark.h must be plain C, and its structs must have no hidden padding that init() would miss. */
#include <flashspark/flashspark.h>

int flashspark_header_in_c(void) {
  flashspark_attention_params attention;
  flashspark_attention_backward_params backward;
  flashspark_append_params append;
  flashspark_block_mask_params mask;
  flashspark_attention_params_init(&attention);
  flashspark_attention_backward_params_init(&backward);
  flashspark_append_params_init(&append);
  flashspark_block_mask_params_init(&mask);
  if (attention.struct_size != sizeof(flashspark_attention_params)) return 1;
  if (append.struct_size != sizeof(flashspark_append_params)) return 2;
  if (mask.struct_size != sizeof(flashspark_block_mask_params)) return 2;
  if (backward.struct_size != sizeof(flashspark_attention_backward_params)) return 2;
  if (backward.forward.struct_size != sizeof(flashspark_attention_params)) return 2;
  if (flashspark_attention_backward(0) != FLASHSPARK_INVALID_ARGUMENT) return 3;
  if (flashspark_attention_forward(0) != FLASHSPARK_INVALID_ARGUMENT) return 3;
  return 0;
}
