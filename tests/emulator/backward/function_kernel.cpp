// One backward kernel with named functions for the emulator, the counterpart of kernels/backward/function.cu. CMake
// generates one source per kernel that defines the same macros and
//
//   EMULATED_TILES             sm_120f
//   EMULATED_NAME              alibi: of the functions (tests/support/named_graphs.hpp)
//   FLASHSPARK_IN_TURNS, FLASHSPARK_NATIVE, FLASHSPARK_EXACT_SUMS  of function.cu
//   FLASHSPARK_USER_FUNCTIONS  the file that function_source.cpp has written
//   EMULATED_FUNCTIONS         UserFunctions_alibi or UserFunctions_pairs_alibi: the type in it
//
// and includes this file.
#include "backward/function_loop.cuh"

#include FLASHSPARK_USER_FUNCTIONS

#include "backward/problem.hpp"

namespace flashspark::emulator {
namespace {

#define FLASHSPARK_QUOTED(a) #a
#define FLASHSPARK_TEXT(a) FLASHSPARK_QUOTED(a)

using Element = ptx::FLASHSPARK_ELEMENT;
constexpr BackwardIndex kIndex = BackwardIndex::FLASHSPARK_NAME;
using Chosen = FunctionBackwardTraits<kIndex, Architecture::EMULATED_TILES, Element, EMULATED_FUNCTIONS,
                                      FLASHSPARK_BLOCK_SPARSE != 0, FLASHSPARK_IN_TURNS != 0, FLASHSPARK_NATIVE != 0,
                                      FLASHSPARK_EXACT_SUMS != 0>;

const BackwardRegistration kRegistration{
    {&instance_of(kIndex), std::is_same_v<Element, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16 : FLASHSPARK_FLOAT16,
     Architecture::EMULATED_TILES, nullptr, FLASHSPARK_TEXT(EMULATED_NAME), FLASHSPARK_BLOCK_SPARSE != 0,
     FLASHSPARK_IN_TURNS != 0, FLASHSPARK_NATIVE != 0, FLASHSPARK_EXACT_SUMS != 0, function_backward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
