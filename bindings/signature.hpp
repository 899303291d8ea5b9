// The indices and names of the native calls' arguments, generated from signature.def.
#pragma once

#include <cstdint>

namespace flashspark::ffi {

enum Face { kFunc = 0, kCache = 1, kForward = 2, kNumFaces = 3 };  // flash_attn_*func, *_with_kvcache, _flash_attn_fwd
// Added to a face: q, k, v and out are (num_seqs, heads, tokens, width), as flex_attention's are.
inline constexpr int64_t kHeadsFirst = 4;

namespace attention {
enum Argument : int32_t {
#define ATTENTION(kind, field, ...) field,
#include "signature.def"
  kCount
};
inline constexpr const char *kNames[kNumFaces][kCount] = {{
#define ATTENTION(kind, field, fallback, func, cache, forward) func,
#include "signature.def"
                                                          },
                                                          {
#define ATTENTION(kind, field, fallback, func, cache, forward) cache,
#include "signature.def"
                                                          },
                                                          {
#define ATTENTION(kind, field, fallback, func, cache, forward) forward,
#include "signature.def"
                                                          }};
}  // namespace attention

namespace backward {
enum Argument : int32_t {
#define BACKWARD(kind, name, fallback) name,
#include "signature.def"
  kCount
};
inline constexpr const char *kNames[] = {
#define BACKWARD(kind, name, fallback) #name,
#include "signature.def"
};
}  // namespace backward

namespace append {
enum Argument : int32_t {
#define APPEND(kind, name, fallback) name,
#include "signature.def"
};
inline constexpr const char *kNames[] = {
#define APPEND(kind, name, fallback) #name,
#include "signature.def"
};
}  // namespace append

namespace schedule {
enum Argument : int32_t {
#define SCHEDULE(kind, name, ...) name,
#include "signature.def"
};
inline constexpr const char *kNames[] = {
#define SCHEDULE(kind, name, fallback, word) word,
#include "signature.def"
};
}  // namespace schedule

// The table as text for Python, one line for each argument: "attention rows k required k k_cache k".
inline constexpr const char *kSignature =
#define ATTENTION(kind, field, fallback, func, cache, forward) \
  "attention " #kind " " #field " " #fallback " " func " " cache " " forward "\n"
#define BACKWARD(kind, name, fallback) "backward " #kind " " #name " " #fallback " " #name "\n"
#define APPEND(kind, name, fallback) "append " #kind " " #name " " #fallback " " #name "\n"
#define SCHEDULE(kind, name, fallback, word) "schedule " #kind " " #name " " #fallback " " word "\n"
#include "signature.def"
    ;

}  // namespace flashspark::ffi
