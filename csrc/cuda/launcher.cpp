#include "launcher.h"

#include <cstddef>
#include <stdexcept>
#include <type_traits>
#include <utility>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif
#ifdef S1_CUDA
#include <cuda.h>
#endif

namespace s1 {
namespace {

// The part of cuda.h that is used here. It never changes: old programs run with new drivers.
using Result = int;
constexpr int kCooperative = 2, kProgrammaticStreamSerialization = 6;
struct LaunchAttribute {
  int id;
  int pad;
  int value;
  char rest[60];
};
struct LaunchConfig {
  unsigned grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};
#ifdef S1_CUDA
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute));
static_assert(offsetof(LaunchAttribute, value) == offsetof(CUlaunchAttribute, value));
static_assert(sizeof(LaunchConfig) == sizeof(CUlaunchConfig));
static_assert(offsetof(LaunchConfig, shared) == offsetof(CUlaunchConfig, sharedMemBytes));
static_assert(offsetof(LaunchConfig, stream) == offsetof(CUlaunchConfig, hStream));
static_assert(offsetof(LaunchConfig, attribute_count) == offsetof(CUlaunchConfig, numAttrs));
static_assert(kCooperative == CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
static_assert(kProgrammaticStreamSerialization == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
#endif

struct Driver {
  std::string error;
  Result (*launch)(const LaunchConfig*, void* function, void** params, void** extra) = nullptr;
  Result (*current_context)(void**) = nullptr;
  Result (*push_context)(void*) = nullptr;
  Result (*pop_context)(void**) = nullptr;
  Result (*error_name)(Result, const char**) = nullptr;
  Result (*error_text)(Result, const char**) = nullptr;

  Driver() {
#ifdef _WIN32
    const HMODULE library = LoadLibraryExA("nvcuda.dll", nullptr, LOAD_LIBRARY_SEARCH_SYSTEM32);
    if (!library) {
      refuse("nvcuda.dll cannot be loaded (error " + std::to_string(GetLastError()) + ")");
      return;
    }
    const auto symbol = [&](const char* name) { return reinterpret_cast<void*>(GetProcAddress(library, name)); };
#else
    void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      refuse(std::string("libcuda.so.1 cannot be loaded (") + dlerror() + ")");
      return;
    }
    const auto symbol = [&](const char* name) { return dlsym(library, name); };
#endif
    const auto get = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol(name));
      if (!function && error.empty()) error = std::string("the NVIDIA driver has no ") + name + "; install a newer one";
    };
    get(launch, "cuLaunchKernelEx");
    get(current_context, "cuCtxGetCurrent");
    get(push_context, "cuCtxPushCurrent_v2");
    get(pop_context, "cuCtxPopCurrent_v2");
    get(error_name, "cuGetErrorName");
    get(error_text, "cuGetErrorString");
  }

  void refuse(const std::string& reason) {
    error = "no NVIDIA driver: " + reason + "; install the driver from nvidia.com/drivers";
  }

  std::string describe(Result result) const {
    const char *name = nullptr, *text = nullptr;
    error_name(result, &name);
    error_text(result, &text);
    return std::string(name ? name : "unknown error") + " (" + (text ? text : std::to_string(result)) + ")";
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

// Makes a context current for a scope: a thread that has used no CUDA yet has none, and torch's may be another GPU's.
class Current {
 public:
  explicit Current(void* context) {
    void* before = nullptr;
    result = driver().current_context(&before);
    if (result == 0 && before != context) pushed_ = (result = driver().push_context(context)) == 0;
  }
  ~Current() {
    void* popped = nullptr;
    if (pushed_) driver().pop_context(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  Result result;

 private:
  bool pushed_ = false;
};

std::string text_of(const Dim3& d) {
  return std::to_string(d[0]) + "x" + std::to_string(d[1]) + "x" + std::to_string(d[2]);
}

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

const std::string& driver_error() { return driver().error; }

Launch::Launch(std::string name, std::uintptr_t function, std::uintptr_t context, Dim3 grid, Dim3 block,
               unsigned shared, bool pdl, bool cooperative, std::string args)
    : name_(std::move(name)),
      function_(function),
      context_(context),
      grid_(grid),
      block_(block),
      shared_(shared),
      args_(std::move(args)) {
  if (!driver_error().empty()) throw std::runtime_error("kernel " + name_ + ": " + driver_error());
  if (pdl) attributes_.push_back(kProgrammaticStreamSerialization);
  if (cooperative) attributes_.push_back(kCooperative);
}

void Launch::enqueue(std::uintptr_t stream) const {
  LaunchAttribute attributes[2] = {};
  for (std::size_t i = 0; i < attributes_.size(); ++i) attributes[i] = {attributes_[i], 0, 1, {}};
  const LaunchConfig config{{grid_[0], grid_[1], grid_[2]},
                            {block_[0], block_[1], block_[2]},
                            shared_,
                            pointer(stream),
                            attributes_.empty() ? nullptr : attributes,
                            static_cast<unsigned>(attributes_.size())};
  void* params[] = {const_cast<char*>(args_.data())};
  const Current current(pointer(context_));
  Result result = current.result;
  if (result == 0) result = driver().launch(&config, pointer(function_), params, nullptr);
  if (result == 0) return;
  // From 700 on, errors are those of a kernel that ran before.
  throw std::runtime_error("kernel " + name_ + ", grid " + text_of(grid_) + ", block " + text_of(block_) + ", " +
                           std::to_string(shared_) + " bytes of shared memory: " + driver().describe(result) + "; " +
                           (result >= 700 && result < 720
                                ? "an earlier kernel failed: set CUDA_LAUNCH_BLOCKING=1 to find it, then restart"
                                : "please report this with the output of `s1kernels info`"));
}

}  // namespace s1
