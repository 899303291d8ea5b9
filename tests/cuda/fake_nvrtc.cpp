// An NVRTC of an old version, which must not be called for anything but that.
#include <cstdlib>

#define FLASHSPARK_FAKE(name) \
  extern "C" int name() {     \
    std::abort();             \
  }
FLASHSPARK_FAKE(nvrtcGetErrorString)
FLASHSPARK_FAKE(nvrtcCreateProgram)
FLASHSPARK_FAKE(nvrtcDestroyProgram)
FLASHSPARK_FAKE(nvrtcCompileProgram)
FLASHSPARK_FAKE(nvrtcGetProgramLogSize)
FLASHSPARK_FAKE(nvrtcGetProgramLog)
FLASHSPARK_FAKE(nvrtcGetCUBINSize)
FLASHSPARK_FAKE(nvrtcGetCUBIN)

extern "C" int nvrtcVersion(int *major, int *minor) {
  *major = 12;
  *minor = 8;
  return 0;
}
