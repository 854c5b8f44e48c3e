// CUDA's types and intrinsics, as far as the kernels use them. One that is missing is an ordinary function here.
//
// Approximate functions are correctly rounded ones. Products and sums are not contracted.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <time.h>

#include "launch.h"

struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulator {

inline float from_bfloat16(uint32_t bits) { return of_bits<float>(bits << 16); }
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = (uint32_t)bits_of(x);
  return x != x ? 0x7fff : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline float from_float16(uint32_t bits) { return _cvtsh_ss((uint16_t)bits); }
inline uint16_t to_float16(float x) { return x != x ? 0x7fff : _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

}  // namespace emulator

using emulator::here;
using emulator::Site;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline unsigned __float_as_uint(float x) { return (unsigned)emulator::bits_of(x); }
inline int __float_as_int(float x) { return (int)emulator::bits_of(x); }
inline float __uint_as_float(unsigned x) { return emulator::of_bits<float>(x); }
inline float __int_as_float(int x) { return emulator::of_bits<float>((unsigned)x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline float rsqrtf(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float emulated_exp(float x) { return (float)exp((double)x); }
inline float emulated_log(float x) { return (float)log((double)x); }
#define __expf emulated_exp  // the C library has functions of these names
#define __logf emulated_log
inline float __fdividef(float a, float b) { return a / b; }

inline long long clock64() { return (long long)(emulator::current->clock += 2000); }
inline void __nanosleep(unsigned, Site site = here()) { emulator::spin(emulator::Wait::kSleep, 0, 0, site); }
[[noreturn]] inline void __trap(Site site = here()) { emulator::fail(site, "__trap()"); }
inline size_t __cvta_generic_to_shared(const void* p) { return emulator::to_shared(p); }
inline void __threadfence() {}

inline void __syncthreads(Site site = here()) { emulator::barrier_of_all(0, site); }
inline int __syncthreads_or(int x, Site site = here()) { return emulator::barrier_of_all(x, site); }
inline void __syncwarp(unsigned mask = ~0u, Site site = here()) { emulator::sync_warp(mask, site); }
inline unsigned __activemask(Site site = here()) { return emulator::active_mask(site); }

template <class T>
inline T __shfl_sync(unsigned mask, T x, int from, int width = 32, Site site = here()) {
  return emulator::shuffle(mask, x, (emulator::lane() & -width) + (from & (width - 1)), site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int offset, int width = 32, Site site = here()) {
  const int lane = emulator::lane(), from = lane ^ offset;
  return emulator::shuffle(mask, x, from < (lane & -width) + width ? from : lane, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned offset, int width = 32, Site site = here()) {
  const int lane = emulator::lane(), from = lane + (int)offset;
  return emulator::shuffle(mask, x, from < (lane & -width) + width ? from : lane, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned offset, int width = 32, Site site = here()) {
  const int lane = emulator::lane(), from = lane - (int)offset;
  return emulator::shuffle(mask, x, from >= (lane & -width) ? from : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int x, Site site = here()) {
  const auto votes = [](const emulator::Meeting& m) {
    unsigned y = 0;
    for (int i = 0; i < 32; ++i)
      if (m.mask >> i & 1) y |= (unsigned)m.value[i] << i;
    return y;
  };
  return emulator::collect(mask, emulator::kVote, (unsigned)(x != 0), votes, site);
}
inline int __any_sync(unsigned mask, int x, Site site = here()) { return __ballot_sync(mask, x, site) != 0; }
inline int __all_sync(unsigned mask, int x, Site site = here()) { return __ballot_sync(mask, x, site) == mask; }
template <class T>
inline T __reduce_max_sync(unsigned mask, T x, Site site = here()) {
  return emulator::reduce(mask, x, [](T a, T b) { return a > b ? a : b; }, site);
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T x, Site site = here()) {
  return emulator::reduce(mask, x, [](T a, T b) { return a < b ? a : b; }, site);
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T x, Site site = here()) {
  return emulator::reduce(mask, x, [](T a, T b) { return (T)(a + b); }, site);
}

template <class T>
inline T atomicExch(T* p, T x, Site site = here()) {
  return emulator::atomic(p, [&](T) { return x; }, site);
}
template <class T>
inline T atomicAdd(T* p, T x, Site site = here()) {
  return emulator::atomic(p, [&](T old) { return (T)(old + x); }, site);
}
