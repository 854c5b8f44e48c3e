// The kernels that were compiled into this module; none if it was built without a CUDA toolkit.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace s1 {

std::vector<std::string> cuda_kernels();

// The CUfunction of a compiled kernel in the primary context of a device, which becomes the current one. Throws if
// there is no such kernel, or none for this device.
std::uintptr_t cuda_function(const std::string& name, int device);

}  // namespace s1
