// 16-byte loads and stores.
#pragma once

#include "convert.cuh"

namespace s1 {

// A load of what is read once a frame and written by no kernel: weights. It does not displace what L1 holds, and the
// compiler keeps its place before wait_for_inputs().
__device__ __forceinline__ Vec16 load_weight(const void* at) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(at));
  return v;
}

__device__ __forceinline__ Vec16 load_vec(const void* at) { return *static_cast<const Vec16*>(at); }
__device__ __forceinline__ void store_vec(void* at, const Vec16& v) { *static_cast<Vec16*>(at) = v; }

// Has L2 fetch the line of an address.
constexpr int kLineBytes = 128;
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Copies 16 bytes from global to shared memory in the background, for this thread alone; copies_done() waits for all of
// this thread's copies. sm_75 copies at once.
__device__ __forceinline__ void copy_async(Vec16* to, const void* from) {
#if S1_ARCH >= 800
  const uint32 at = static_cast<uint32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
  *to = load_weight(from);
#endif
}
__device__ __forceinline__ void copy_async8(uint64* to, const uint64* from) {
#if S1_ARCH >= 800
  const uint32 at = static_cast<uint32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
#else
  *to = *from;
#endif
}
__device__ __forceinline__ void copy_async4(uint32* to, const uint32* from) {
#if S1_ARCH >= 800
  const uint32 at = static_cast<uint32>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
#else
  *to = *from;
#endif
}
__device__ __forceinline__ void copies_done() {
#if S1_ARCH >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Eight 16-bit values as float32.
template <class T>
__device__ __forceinline__ void unpack8(const Vec16& v, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(v.word[i]);
    out[2 * i] = pair.x;
    out[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ Vec16 pack8(const float (&in)[8]) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = pack<T>(in[2 * i], in[2 * i + 1]);
  return v;
}

}  // namespace s1
