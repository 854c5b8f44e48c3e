#include "kernel_table.h"

#include <map>
#include <stdexcept>

#ifdef S1_CUDA
#include <cuda_runtime_api.h>
#endif

namespace s1 {
namespace {

// Filled while the module loads, by the KernelEntry of every S1_KERNEL.
std::map<std::string, const void*>& table() {
  static std::map<std::string, const void*> kernels;
  return kernels;
}

}  // namespace

// As in device/kernel.cuh, which only nvcc reads.
struct KernelEntry {
  KernelEntry(const char* name, const void* symbol);
};
KernelEntry::KernelEntry(const char* name, const void* symbol) { table()[name] = symbol; }

std::vector<std::string> cuda_kernels() {
  std::vector<std::string> names;
  for (const auto& entry : table()) names.push_back(entry.first);
  return names;
}

std::uintptr_t cuda_function(const std::string& name, [[maybe_unused]] int device) {
  const auto found = table().find(name);
  if (found == table().end()) throw std::runtime_error("kernel " + name + " was not compiled into s1kernels._C");
#ifdef S1_CUDA
  const auto check = [&](cudaError_t error) {
    if (error != cudaSuccess) {
      throw std::runtime_error("kernel " + name + " on cuda:" + std::to_string(device) + ": " +
                               cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
    }
  };
  cudaFunction_t function = nullptr;
  check(cudaSetDevice(device));
  check(cudaGetFuncBySymbol(&function, found->second));
  return reinterpret_cast<std::uintptr_t>(function);
#else
  return 0;  // the table is empty
#endif
}

}  // namespace s1
