// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight, row by row.
//
//   x [B, C], weight [C], out [B, C]: T, contiguous.
// Grid/block: B blocks of 256 threads, a row each.
// Memory: x read (a second time from L1) and out written, 4*B*C bytes in 16-bit; bound by it for long prompts.
// Numerics: sums in float32, one rounding.
// Requires: nothing; 16-byte accesses where C and the pointers allow them, else one element at a time.
#include "device/pack.cuh"
#include "device/reduce.cuh"

namespace s1 {

struct RmsNormArgs {
  const void* x;       // [B, C]
  const void* weight;  // [C]
  void* out;           // [B, C]
  int dim;             // C
  float eps;
};

constexpr int kRmsNormThreads = 256;

template <class T, int kWidth>
__device__ __forceinline__ void rms_norm_row(const RmsNormArgs& a) {
  __shared__ float scratch[kRmsNormThreads / kWarp];
  const int64 row = static_cast<int64>(blockIdx.x) * a.dim;
  const T* x = static_cast<const T*>(a.x) + row;
  const T* weight = static_cast<const T*>(a.weight);
  T* out = static_cast<T*>(a.out) + row;
  const int first = static_cast<int>(threadIdx.x) * kWidth, step = kRmsNormThreads * kWidth;
  float v[kWidth], w[kWidth], square = 0.0f;
  for (int column = first; column < a.dim; column += step) {
    load_floats<T, kWidth>(x + column, v);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) square = fmaf(v[e], v[e], square);
  }
  const float scale = rsqrtf(block_sum(square, scratch) / static_cast<float>(a.dim) + a.eps);
  for (int column = first; column < a.dim; column += step) {
    load_floats<T, kWidth>(x + column, v);
    load_floats<T, kWidth>(weight + column, w);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = v[e] * scale * w[e];
    store_floats<T, kWidth>(out + column, v);
  }
}

template <class T>
__device__ void rms_norm(const RmsNormArgs& a) {
  launch_next();
  wait_for_inputs();
  if (all_aligned(a.dim * static_cast<int64>(sizeof(T)), a.x, a.weight, a.out)) {
    rms_norm_row<T, kPack<T>>(a);
  } else {
    rms_norm_row<T, 1>(a);
  }
}

S1_KERNEL(rms_norm, RmsNormArgs, 256, 1, rms_norm)

}  // namespace s1
