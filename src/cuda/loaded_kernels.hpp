// Kernels of run-time compilation that are loaded on devices.
#pragma once

#include <map>
#include <mutex>

#include "cuda/compile_cache.hpp"
#include "cuda/module.hpp"

namespace flashspark::cuda {

// By what tells one kernel from another, the device included. Never destroyed: a static one outlives all calls.
template <class Key>
class LoadedKernels {
 public:
  // The kernel of a key, from the cubin of request(), which is asked for at the first call. For any thread; threads
  // that need one kernel at once compile it once.
  template <class MakeRequest>
  Kernel get(const Key &key, int index, uint32_t shared_bytes, MakeRequest request) {
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = loaded_.find(key); found != loaded_.end()) return found->second.kernel;
    }
    const CompileRequest what = request();
    const Cubin cubin = cubin_for(what);  // without the lock: others may compile meanwhile
    const std::lock_guard lock(mutex_);
    Loaded &entry = loaded_[key];
    if (entry.kernel == nullptr) {
      const Kernel kernel = load_kernel(cubin->data(), what.entry, index, shared_bytes);
      entry = {cubin, kernel};
    }
    return entry.kernel;
  }

 private:
  struct Loaded {
    Cubin cubin;  // the driver may read it as long as the library is loaded
    Kernel kernel = nullptr;
  };

  std::mutex mutex_;
  std::map<Key, Loaded> loaded_;
};

}  // namespace flashspark::cuda
