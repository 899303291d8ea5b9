// Fuzzes attention: any params struct can be validated without a crash, and a small valid problem runs cleanly on every
// implementation, in buffers exactly as large as the struct describes.
#include <string>

#include "problem.hpp"

using namespace flashspark::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Stream in(data, size);
  Attention problem(in);
  P &p = problem.params;
  const flashspark_status status = flashspark_attention_validate(&p);
  char text[200];
  flashspark_attention_explain(&p, text, sizeof text);
  if (status != FLASHSPARK_OK) {
    const char *error = flashspark_last_error();
    if (std::string(error).find_first_of("=:") == std::string::npos) complain("an error that names no argument");
    if (flashspark_attention_forward(&p) == FLASHSPARK_OK) complain("forward accepts what validate refuses");
    return 0;
  }
  Block blocks[6];
  if (p.device != FLASHSPARK_CPU || work(p) > 3e6 || !attach(p, blocks)) return 0;
  for (const char *implementation : {"cpu-engine", "cpu-reference"}) {
    p.implementation = implementation;
    if (flashspark_attention_forward(&p) != FLASHSPARK_OK) complain("forward refuses what validate accepts");
  }
  return 0;
}
