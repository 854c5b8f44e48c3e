// snake: out = x + sin(alpha x)^2 / (alpha + 1e-9), element by element.
//
//   x, out [B, C, T]: T, contiguous; alpha [C].
// Grid/block: blocks of 256 threads, ceil(T / (256 * elements in 16 bytes)) of them to a row of T samples, row by row;
//   a thread owns 16 bytes.
// Memory: 2*B*C*T values, bound by it.
// Numerics: float32, one rounding. The sine's square has the period pi: the angle is reduced to [-pi/2, pi/2] in three
//   steps. An angle so large that it cannot be leaves a square between 0 and 1, which x then outweighs.
// Requires: nothing; 16-byte accesses where the pointers and T allow them, else one element at a time.
#include "device/pack.cuh"

namespace s1 {

struct SnakeArgs {
  const void* x;      // [B, C, T]
  const void* alpha;  // [C]
  void* out;          // [B, C, T]
  int channels;       // C
  int length;         // T
  int row_blocks;     // blocks to a row
};

constexpr int kSnakeThreads = 256;

__device__ __forceinline__ float sin_squared(float x) {
  const float n = rintf(x * 0.318309886f);
  float r = fmaf(n, -3.140625f, x);
  r = fmaf(n, -9.67025757e-4f, r);
  r = fmaf(n, -6.27711415e-7f, r);
  if (fabsf(r) > 1.5708f) r = 1.5708f;  // NaN stays NaN
  const float s = r * r;
  float p = -2.50521084e-8f;  // Taylor's series, whose remainder is below 6e-8
  p = fmaf(p, s, 2.75573192e-6f);
  p = fmaf(p, s, -1.98412698e-4f);
  p = fmaf(p, s, 8.33333333e-3f);
  p = fmaf(p, s, -1.66666667e-1f);
  const float sine = fmaf(r * s, p, r);
  return sine * sine;
}

template <class T, int kWidth>
__device__ __forceinline__ void snake_elements(const T* x, T* out, float alpha, float inverse) {
  float v[kWidth];
  load_floats<T, kWidth>(x, v);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) v[e] = fmaf(inverse, sin_squared(alpha * v[e]), v[e]);
  store_floats<T, kWidth>(out, v);
}

template <class T>
__device__ void snake(const SnakeArgs& a) {
  launch_next();
  const int row = static_cast<int>(blockIdx.x) / a.row_blocks, thread = static_cast<int>(threadIdx.x);
  const int64 first = static_cast<int64>(static_cast<int>(blockIdx.x) % a.row_blocks) * kSnakeThreads * kPack<T>;
  const float alpha = to_float(static_cast<const T*>(a.alpha)[row % a.channels]), inverse = 1.0f / (alpha + 1e-9f);
  const T* x = static_cast<const T*>(a.x) + static_cast<int64>(row) * a.length;
  T* out = static_cast<T*>(a.out) + static_cast<int64>(row) * a.length;
  wait_for_inputs();
  if (all_aligned(static_cast<int64>(a.length) * static_cast<int>(sizeof(T)), a.x, a.out)) {
    const int64 at = first + thread * kPack<T>;
    if (at < a.length) snake_elements<T, kPack<T>>(x + at, out + at, alpha, inverse);
  } else {
    for (int i = 0; i < kPack<T>; ++i) {
      const int64 at = first + i * kSnakeThreads + thread;
      if (at < a.length) snake_elements<T, 1>(x + at, out + at, alpha, inverse);
    }
  }
}

S1_KERNEL(snake, SnakeArgs, 256, 1, snake)

}  // namespace s1
