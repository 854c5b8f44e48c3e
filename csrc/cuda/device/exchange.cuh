// How the blocks of a persistent kernel pass activations on: a word is its own flag.
//
// Before the kernel starts, all words hold kEmpty. A writer stores a word once; a reader polls until it is not kEmpty.
// No store has to be ordered with another, so that a hand-over is one store and one load, and no barrier. Conversions
// to bfloat16, float16 and float32 never produce kEmpty: their NaN is another.
// Every wait is bounded: after kPatientPolls a reader gives up for the whole kernel and says so in `abandoned`.
#pragma once

#include "vec.cuh"

namespace s1 {

constexpr uint32 kEmpty = 0xffffffffu;
constexpr int kPatientPolls =
    1 << (S1_RACECHECK ? 29 : 16);  // well below 1 s; Windows resets a GPU that does not answer for 2 s

__device__ __forceinline__ void put_word(uint32* at, uint32 word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}
__device__ __forceinline__ void put_float(uint32* at, float x) { put_word(at, __float_as_uint(x)); }

__device__ __forceinline__ uint32 peek(const uint32* at) {
  uint32 word;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(at) : "memory");
  return word;
}
__device__ __forceinline__ Vec16 peek4(const uint32* at) {
  Vec16 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(at)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 peek2(const uint32* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}

__device__ __forceinline__ bool any_empty(const uint2& v) { return v.x == kEmpty || v.y == kEmpty; }
__device__ __forceinline__ bool any_empty(const Vec16& v) {
  return v.word[0] == kEmpty || v.word[1] == kEmpty || v.word[2] == kEmpty || v.word[3] == kEmpty;
}

// A reader's patience.
struct Waiting {
  int* abandoned;           // global: set once any reader has given up
  volatile bool* given_up;  // shared: whether one of this block knows it

  // Whether to poll once more, after poll number n.
  __device__ __forceinline__ bool again(int n) {
    if (*given_up) return false;
    if (n % 1024 != 1023) return true;
    if (n >= kPatientPolls) atomicExch(abandoned, 1);
    if (*static_cast<volatile int*>(abandoned) == 0) return true;
    *given_up = true;
    return false;
  }
  // kCount times four words, `step` words apart. Every poll asks for all that are missing.
  template <int kCount>
  __device__ __forceinline__ void take4s(const uint32* at, int step, Vec16 (&v)[kCount]) {
    ask4s(at, step, v);
    insist4s(at, step, v);
  }
  // The same in two steps, between which there is something else to do: the first poll, and its result and the others.
  template <int kCount>
  __device__ __forceinline__ void ask4s(const uint32* at, int step, Vec16 (&v)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = peek4(at + i * step);
  }
  template <int kCount>
  __device__ __forceinline__ void insist4s(const uint32* at, int step, Vec16 (&v)[kCount]) {
    for (int n = 0;; ++n) {
      bool missing[kCount], any = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) any |= missing[i] = any_empty(v[i]);
      if (!any || !again(n)) return;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (missing[i]) v[i] = peek4(at + i * step);
    }
  }
  // One word.
  __device__ __forceinline__ void insist(const uint32* at, uint32& word) {
    for (int n = 0; word == kEmpty && again(n); ++n) word = peek(at);
  }
  __device__ __forceinline__ Vec16 take4(const uint32* at) {
    Vec16 v[1];
    take4s(at, 0, v);
    return v[0];
  }
  // kCount times two words.
  template <int kCount>
  __device__ __forceinline__ void take2s(const uint32* const (&at)[kCount], uint2 (&v)[kCount]) {
    ask2s(at, v);
    insist2s(at, v);
  }
  template <int kCount>
  __device__ __forceinline__ void ask2s(const uint32* const (&at)[kCount], uint2 (&v)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = peek2(at[i]);
  }
  template <int kCount>
  __device__ __forceinline__ void insist2s(const uint32* const (&at)[kCount], uint2 (&v)[kCount]) {
    for (int n = 0;; ++n) {
      bool missing[kCount], any = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) any |= missing[i] = any_empty(v[i]);
      if (!any || !again(n)) return;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (missing[i]) v[i] = peek2(at[i]);
    }
  }
  // kCount times two words that are written over and over: each comes with a tag that says which writing it is.
  template <int kCount>
  __device__ __forceinline__ void take_tagged2s(const uint32* const (&at)[kCount], uint32 tag, float2 (&x)[kCount]) {
    Vec16 v[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = peek4(at[i]);
    for (int n = 0;; ++n) {
      bool missing[kCount], any = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) any |= missing[i] = v[i].word[1] != tag || v[i].word[3] != tag;
      if (!any || !again(n)) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (missing[i]) v[i] = peek4(at[i]);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = {__uint_as_float(v[i].word[0]), __uint_as_float(v[i].word[2])};
  }
};
__device__ __forceinline__ void put_tagged2(uint32* at, float x, float y, uint32 tag) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %3, %2, %3};" ::"l"(at), "r"(__float_as_uint(x)),
               "r"(__float_as_uint(y)), "r"(tag)
               : "memory");
}

}  // namespace s1
