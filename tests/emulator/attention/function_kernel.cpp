// One forward kernel with named functions for the emulator, the counterpart of kernels/forward/function.cu. CMake
// generates one source per kernel that defines the same macros and
//
//   EMULATED_TILES           sm_120f
//   EMULATED_NAME            alibi: of the functions (tests/support/named_graphs.hpp)
//   FLASHSPARK_USER_FUNCTIONS  the file that function_source.cpp has written: type UserFunctions_alibi
//
// and includes this file.
#include "forward/kernel.cuh"

#include FLASHSPARK_USER_FUNCTIONS

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

#define FLASHSPARK_PASTE(a, b) a##b
#define FLASHSPARK_JOINED(a, b) FLASHSPARK_PASTE(a, b)
#define FLASHSPARK_QUOTED(a) #a
#define FLASHSPARK_TEXT(a) FLASHSPARK_QUOTED(a)

#if defined(FLASHSPARK_ELEMENT_KV)
using Mma = MmaE4m3Dequant;
#else
using Mma = MmaF16<ptx::FLASHSPARK_ELEMENT>;
#endif
using ElementKV = Mma::ElementKV;
using Functions = FLASHSPARK_JOINED(UserFunctions_, EMULATED_NAME);
using Chosen =
    Traits<InstanceIndex::FLASHSPARK_NAME, Architecture::EMULATED_TILES, Mma,
           FunctionScoreMod<Functions, FLASHSPARK_NATIVE != 0, FLASHSPARK_BLOCK_SPARSE != 0,
                            FLASHSPARK_BLOCK_SPARSE == 2, FLASHSPARK_DROPOUT != 0, FLASHSPARK_CONTIGUOUS != 0>>;
static_assert(Chosen::kInstance.score_mod == (FLASHSPARK_NATIVE != 0 ? ScoreMod::native : ScoreMod::none));

const Registration kRegistration{{&kInstances[static_cast<int32_t>(InstanceIndex::FLASHSPARK_NAME)],
                                  std::is_same_v<ElementKV, ptx::E4m3>       ? FLASHSPARK_FLOAT8_E4M3
                                  : std::is_same_v<ElementKV, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16
                                                                             : FLASHSPARK_FLOAT16,
                                  Architecture::EMULATED_TILES, nullptr, FLASHSPARK_TEXT(EMULATED_NAME),
                                  FLASHSPARK_BLOCK_SPARSE != 0, FLASHSPARK_BLOCK_SPARSE == 2, FLASHSPARK_DROPOUT != 0,
                                  FLASHSPARK_CONTIGUOUS != 0, forward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
