// What an emulated source's library offers to C: its kernels by name, and reports. It stands behind the source.
#pragma once

#include "launch.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

struct Entry {
  const char* name;
  void (*run)(const void* args);
  size_t argument_bytes;
};
static std::vector<Entry> entries;

template <class A>
struct Kernel {
  template <void (*kKernel)(A)>
  static bool enter(const char* name) {
    entries.push_back({name, [](const void* args) { kKernel(*(const A*)args); }, sizeof(A)});
    return true;
  }
};
template <class A>
Kernel<A> kernel_of(void (*)(A));

}  // namespace emulator

#if S1_DTYPES == 2
#define EMULATOR_KERNEL(name) EMULATOR_ENTER(name##_bfloat16)
#else
#define EMULATOR_KERNEL(name) EMULATOR_ENTER(name##_float16)
#endif
#define EMULATOR_ENTER(name) \
  static const bool name##_entered = decltype(emulator::kernel_of(s1::name))::enter<s1::name>(#name);

// Returns a Result; emulator_report() says what is behind any but kDone.
EMULATOR_EXPORT int emulator_launch(const char* name, const void* args, size_t argument_bytes, unsigned grid,
                                    unsigned block, size_t shared_bytes, uint64_t seed) {
  for (const emulator::Entry& e : emulator::entries)
    if (!strcmp(e.name, name) && e.argument_bytes == argument_bytes)
      return emulator::run(e.run, args, {grid, 1, 1}, {block, 1, 1}, shared_bytes, seed);
  emulator::report = emulator::text("no kernel %s takes %zu bytes of arguments", name, argument_bytes);
  return emulator::kFailed;
}
EMULATOR_EXPORT const char* emulator_report() { return emulator::report.c_str(); }
// The buffers that reports name, instead of those before.
EMULATOR_EXPORT void emulator_name(size_t count, const char* const* names, const void* const* begins,
                                   const size_t* bytes) {
  emulator::buffers.clear();
  for (size_t i = 0; i < count; ++i) emulator::buffers.push_back({names[i], (const char*)begins[i], bytes[i]});
}
