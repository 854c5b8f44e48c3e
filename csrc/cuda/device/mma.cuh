// Tensor-core products of 16 x 8 x 16, 16-bit operands and float32 sums.
#pragma once

#include "convert.cuh"

namespace s1 {

template <class T>
struct Mma;

// sum [16, 8] += a [16, 16] @ b [16, 8]. In lane 4g + t (t < 4): a0, a2 hold row g and a1, a3 row g+8; b0, b1 hold
// column g; sum[0], sum[1] are row g and sum[2], sum[3] row g+8, columns 2t and 2t+1. a0, a1 and b0 hold the same two
// of the 16 inner indices, a2, a3 and b1 another two: which ones does not matter as long as a and b agree.
template <>
struct Mma<bfloat16> {
  static __device__ __forceinline__ void add(float (&sum)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                             uint32 b1) {
#if S1_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif  // sm_75 has none; the host refuses bfloat16 there
  }
};

template <>
struct Mma<float16> {
  static __device__ __forceinline__ void add(float (&sum)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                             uint32 b1) {
#if S1_ARCH >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#elif S1_ARCH >= 750
    half_step(sum, a0, a1, b0);
    half_step(sum, a2, a3, b1);
#endif
  }

 private:
  static __device__ __forceinline__ void half_step(float (&sum)[4], uint32 a0, uint32 a1, uint32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(b0));
  }
};

}  // namespace s1
