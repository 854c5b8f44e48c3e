// A few neighbouring elements as float32: 16 bytes at once where addresses allow, else one by one.
#pragma once

#include "vec.cuh"

namespace s1 {

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

// Whether rows of `row_bytes` at these addresses can be accessed 16 bytes at a time.
template <class... Pointers>
__device__ __forceinline__ bool all_aligned(int64 row_bytes, Pointers... pointers) {
  return (((reinterpret_cast<uint64>(pointers) | ...) | static_cast<uint64>(row_bytes)) & 15u) == 0;
}

// kWidth is 1 or kPack<T>.
template <class T, int kWidth>
__device__ __forceinline__ void load_floats(const T* at, float (&out)[kWidth]) {
  if constexpr (kWidth == 1) {
    out[0] = to_float(*at);
  } else if constexpr (kWidth == 8) {
    unpack8<T>(load_vec(at), out);
  } else {
    const Vec16 v = load_vec(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(v.word[i]);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void store_floats(T* at, const float (&in)[kWidth]) {
  if constexpr (kWidth == 1) {
    *at = from_float<T>(in[0]);
  } else if constexpr (kWidth == 8) {
    store_vec(at, pack8<T>(in));
  } else {
    Vec16 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) v.word[i] = __float_as_uint(in[i]);
    store_vec(at, v);
  }
}

}  // namespace s1
