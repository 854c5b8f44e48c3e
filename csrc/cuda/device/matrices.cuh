// Moves four 8 x 8 matrices of 16-bit values between shared memory and a warp's registers, as mma operands want them.
//
// Lane 8m + r gives the shared address of row r of matrix m: 16 bytes, aligned. Word m of lane 4g + t (t < 4) holds of
// matrix m columns 2t and 2t+1 of row g; transposed, rows 2t and 2t+1 of column g. Without bank conflicts where the
// eight rows of a matrix lie in different 16 bytes modulo 128.
#pragma once

#include "vec.cuh"

namespace s1 {

__device__ __forceinline__ Vec16 load_matrices(uint32 at) {
  Vec16 v{};
#if S1_ARCH >= 900
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(at)
               : "memory");
#endif  // never launched before
  return v;
}
__device__ __forceinline__ Vec16 load_transposed(uint32 at) {
  Vec16 v{};
#if S1_ARCH >= 900
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(at)
               : "memory");
#endif
  return v;
}
__device__ __forceinline__ void store_matrices(uint32 at, const Vec16& v) {
#if S1_ARCH >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#endif
}

}  // namespace s1
