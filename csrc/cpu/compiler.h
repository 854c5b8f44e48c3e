// What differs between compilers and processors, and nothing else.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define S1_X86 1
// GCC 12 warns of its own _mm512_undefined_* (bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#else
#define S1_X86 0
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define S1_INLINE __forceinline
#define S1_RESTRICT __restrict
#else
#define S1_INLINE inline __attribute__((always_inline))
#define S1_RESTRICT __restrict__
#endif

namespace s1 {

// Tells the processor that the caller spins.
inline void cpu_relax() {
#if S1_X86
  _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
  __asm__ __volatile__("yield");
#endif
}

// Asks for the cache line at p. near: into the first-level cache; far: into the second level.
inline void prefetch_near(const void* p) {
#if S1_X86
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#elif !defined(_MSC_VER)
  __builtin_prefetch(p, 0, 3);
#endif
}

inline void prefetch_far(const void* p) {
#if S1_X86
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#elif !defined(_MSC_VER)
  __builtin_prefetch(p, 0, 2);
#endif
}

}  // namespace s1
