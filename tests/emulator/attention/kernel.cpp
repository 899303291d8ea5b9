// One forward kernel for the emulator, the counterpart of kernels/forward/forward.cu. CMake generates one source per
// kernel that defines the same macros (kernels.json) and EMULATED_TILES (sm_120f) and includes this file.
#include "forward/kernel.cuh"

#include "attention/harness.hpp"

namespace flashspark::emulator {
namespace {

#if defined(FLASHSPARK_ELEMENT_KV)
using Mma = MmaE4m3Dequant;
#else
using Mma = MmaF16<ptx::FLASHSPARK_ELEMENT>;
#endif
using ElementKV = Mma::ElementKV;
using Chosen = Traits<InstanceIndex::FLASHSPARK_NAME, Architecture::EMULATED_TILES, Mma>;

const Registration kRegistration{{&kInstances[static_cast<int32_t>(InstanceIndex::FLASHSPARK_NAME)],
                                  std::is_same_v<ElementKV, ptx::E4m3>       ? FLASHSPARK_FLOAT8_E4M3
                                  : std::is_same_v<ElementKV, ptx::Bfloat16> ? FLASHSPARK_BFLOAT16
                                                                             : FLASHSPARK_FLOAT16,
                                  Architecture::EMULATED_TILES, forward<Chosen>}};

}  // namespace
}  // namespace flashspark::emulator
