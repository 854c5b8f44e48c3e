// Launches kernels through the NVIDIA driver, which is loaded at run time: this module needs no CUDA to be built.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace s1 {

using Dim3 = std::array<unsigned, 3>;

// Why no kernel can be launched on this machine; empty if they can.
const std::string& driver_error();

// A kernel with all that it takes but the stream. What its arguments point to must outlive it.
class Launch {
 public:
  // function, context: CUfunction and the CUcontext it was loaded in. args: the bytes of the kernel's one argument.
  // pdl: the kernel may start before its predecessor in the stream ends (see wait_for_inputs in device/kernel.cuh).
  Launch(std::string name, std::uintptr_t function, std::uintptr_t context, Dim3 grid, Dim3 block, unsigned shared,
         bool pdl, bool cooperative, std::string args);

  // Puts the kernel into a stream of the context (a CUstream; 0 is the default stream). The thread's current context
  // stays what it was.
  void enqueue(std::uintptr_t stream) const;

 private:
  std::string name_;
  std::uintptr_t function_, context_;
  Dim3 grid_, block_;
  unsigned shared_;
  std::vector<int> attributes_;  // CUlaunchAttributeID of those that are set
  std::string args_;
};

}  // namespace s1
