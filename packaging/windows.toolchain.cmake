# Cross build for 64-bit Windows: zig's clang and libc++ on mingw-w64. Not GCC's mingw-w64: it keeps 32 and 64-byte
# vectors on a stack that Windows aligns to 16 (GCC bug 54412), and the AVX2 and AVX-512 kernels fault.
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
include(${CMAKE_CURRENT_LIST_DIR}/zig.cmake)
set(CMAKE_CROSSCOMPILING_EMULATOR wine)
