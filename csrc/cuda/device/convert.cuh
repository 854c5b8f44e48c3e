// bfloat16 and float16 as bits, and their conversion to and from float32, rounding to nearest even.
// On sm_75, which has no bfloat16 instructions, bfloat16 is rounded with integers.
#pragma once

#include "kernel.cuh"

namespace s1 {

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

struct bfloat16 {
  uint16 bits;
};
struct float16 {
  uint16 bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32>(x.bits) << 16); }
__device__ __forceinline__ float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
#if S1_ARCH >= 800
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // NaN
  return {static_cast<uint16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
template <>
__device__ __forceinline__ float16 from_float<float16>(float x) {
  float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// The nearest value of T, as float32.
template <class T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// Two 16-bit values in a word, the first in the low half.
template <class T>
__device__ __forceinline__ float2 unpack(uint32 word) {
  return {to_float(T{static_cast<uint16>(word & 0xffffu)}), to_float(T{static_cast<uint16>(word >> 16)})};
}
template <class T>
__device__ __forceinline__ uint32 pack(float low, float high) {
  return static_cast<uint32>(from_float<T>(low).bits) | static_cast<uint32>(from_float<T>(high).bits) << 16;
}
#if S1_ARCH >= 800  // in one instruction, which the compiler finds only where nobody unpacks the word
template <>
__device__ __forceinline__ uint32 pack<bfloat16>(float low, float high) {
  uint32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32 pack<float16>(float low, float high) {
  uint32 word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#endif

// a * b + c of two bfloat16 each, rounded once.
__device__ __forceinline__ uint32 fma_pair(uint32 a, uint32 b, uint32 c) {
  uint32 y = 0;
#if S1_ARCH >= 800
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
#endif
  return y;
}

}  // namespace s1
