// One kernel for the emulator, as kernels/forward/forward.cu is one for a GPU. CMake writes a file for each that sets
// the same macros (kernels.json) and EMULATED_TILES (sm_120f), and includes this one.
#include "forward/kernel.cuh"

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

using Element = ptx::FLASHSPARK_ELEMENT;
#if defined(FLASHSPARK_ELEMENT_KV)
using ElementKV = ptx::FLASHSPARK_ELEMENT_KV;
#else
using ElementKV = Element;
#endif
using Chosen = Traits<InstanceIndex::FLASHSPARK_NAME, Architecture::EMULATED_TILES, Element, ElementKV>;

const Registration kRegistration{{&kInstances[static_cast<int32_t>(InstanceIndex::FLASHSPARK_NAME)],
                                  std::is_same_v<ElementKV, ptx::E4m3>       ? FLASHSPARK_FLOAT8_E4M3
                                  : std::is_same_v<ElementKV, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16
                                                                             : FLASHSPARK_FLOAT16,
                                  Architecture::EMULATED_TILES, forward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
