// LD_PRELOAD library: a GPU that grants a block at most 99 KB of shared memory, as SM12x does. flash-attention 2 asks
// cudaDevAttrMaxSharedMemoryPerBlockOptin for the tiles of its backward pass: what torch's takes is then what an SM12x
// GPU gets. Everything else about the GPU stays as it is.
//   cc -O2 -shared -fPIC bench/gpu/fa2_smem.c -o fa2_smem.so -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

enum { kMaxSharedMemoryPerBlockOptin = 97, kLimit = 99 * 1024 };  // of cudaDeviceAttr

typedef int (*GetAttribute)(int *value, int attribute, int device);

// Python loads torch's runtime where RTLD_NEXT does not look.
static GetAttribute next_one(void) {
  static const char *const runtimes[] = {"libcudart.so.13", "libcudart.so.12"};
  void *found = dlsym(RTLD_NEXT, "cudaDeviceGetAttribute");
  for (unsigned n = 0; found == NULL && n < sizeof runtimes / sizeof runtimes[0]; ++n) {
    void *runtime = dlopen(runtimes[n], RTLD_LAZY | RTLD_NOLOAD);
    if (runtime != NULL) found = dlsym(runtime, "cudaDeviceGetAttribute");
  }
  if (found == NULL) {
    fputs("fa2_smem: found no cudaDeviceGetAttribute\n", stderr);
    abort();
  }
  return (GetAttribute)found;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  static GetAttribute next;
  if (next == NULL) next = next_one();
  const int status = next(value, attribute, device);
  if (status == 0 && attribute == kMaxSharedMemoryPerBlockOptin && *value > kLimit) {
    static int told;
    if (!told++) fprintf(stderr, "fa2_smem: %d bytes of shared memory a block become %d\n", *value, kLimit);
    *value = kLimit;
  }
  return status;
}
