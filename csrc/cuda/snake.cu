// snake: out[i, k] = a[i * stride + k * dilation], where a is past_cache[turn] and, behind it, y + sin(alpha y)^2 /
// (alpha + 1e-9) of y = x + bias; past_cache[1 - turn] = the last P steps of a. What follows is one matrix product.
//
//   x [T, C]; bias, alpha [C] or null; past_cache [2, P, C], P = (taps - 1) * dilation + 1 - stride;
//   out [T / stride, taps * C]: T, contiguous. turn [1] int32, of which the lowest bit counts.
// Grid/block: blocks of 256 threads; a thread owns a pack, 16 bytes, of one of the P + T steps of a. Steps of fewer
//   than 256 packs share a block, as many as fit; in one of more, a thread goes on 256 packs farther.
// Memory: x and a half of past_cache once, T * C * taps / stride values and the other half written; bound by it.
// Order: no block reads what another one writes: the halves of past_cache change places from call to call, by a number
//   in device memory, so that a CUDA graph replays it.
// Numerics: float32, one rounding. The sine's square has the period pi: the angle is reduced to [-pi/2, pi/2] in three
//   steps. An angle so large that it cannot be leaves a square between 0 and 1, which y then outweighs.
// Requires: nothing; packs of 16 bytes where the pointers and C allow them, else of one element.
#include "device/pack.cuh"

namespace s1 {

struct SnakeArgs {
  const void* x;      // [T, C]
  const void* bias;   // [C] or null
  const void* alpha;  // [C] or null
  void* past_cache;   // [2, P, C]
  const int* turn;    // [1]
  void* out;          // [T / stride, taps * C]
  int steps;          // T
  int channels;       // C
  int reach;          // P
  int taps;
  int dilation;
  int stride;
  int packs;  // of a step: of 16 bytes each, or of one element where 16-byte accesses do not fit
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

// Channels [c, c + kWidth) of a step of x, activated.
template <class T, int kWidth>
__device__ __forceinline__ void activate(const SnakeArgs& a, int step, int c, float (&v)[kWidth]) {
  load_floats<T, kWidth>(static_cast<const T*>(a.x) + static_cast<int64>(step) * a.channels + c, v);
  if (a.bias) {
    float bias[kWidth];
    load_floats<T, kWidth>(static_cast<const T*>(a.bias) + c, bias);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] += bias[e];
  }
  if (a.alpha) {
    float alpha[kWidth];
    load_floats<T, kWidth>(static_cast<const T*>(a.alpha) + c, alpha);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) v[e] = fmaf(1.0f / (alpha[e] + 1e-9f), sin_squared(alpha[e] * v[e]), v[e]);
  }
}

// Channels [c, c + kWidth) of step `row` of a, to every window that has it and to what is kept.
template <class T, int kWidth>
__device__ __forceinline__ void place(const SnakeArgs& a, int half, int row, int c) {
  const int64 kept = static_cast<int64>(a.reach) * a.channels;
  T* past = static_cast<T*>(a.past_cache);
  float v[kWidth];
  if (row < a.reach) {
    load_floats<T, kWidth>(past + half * kept + static_cast<int64>(row) * a.channels + c, v);
  } else {
    activate<T, kWidth>(a, row - a.reach, c, v);
  }
  const int windows = a.steps / a.stride;
  T* out = static_cast<T*>(a.out) + c;
  for (int k = 0, first = row; k < a.taps && first >= 0; ++k, first -= a.dilation) {
    const int i = a.stride == 1 ? first : first / a.stride;
    if (i < windows && i * a.stride == first) {
      store_floats<T, kWidth>(out + (static_cast<int64>(i) * a.taps + k) * a.channels, v);
    }
  }
  if (row >= a.steps) {
    store_floats<T, kWidth>(past + (1 - half) * kept + static_cast<int64>(row - a.steps) * a.channels + c, v);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void snake_rows(const SnakeArgs& a) {
  const int together = max(1, kSnakeThreads / a.packs), thread = static_cast<int>(threadIdx.x);
  const int in_block = a.packs < kSnakeThreads ? thread / a.packs : 0;
  const int64 row = static_cast<int64>(blockIdx.x) * together + in_block;
  if (in_block >= together || row >= static_cast<int64>(a.reach) + a.steps) return;
  const int half = *a.turn & 1;
  for (int pack = thread - in_block * a.packs; pack < a.packs; pack += kSnakeThreads) {
    place<T, kWidth>(a, half, static_cast<int>(row), pack * kWidth);
  }
}

template <class T>
__device__ void snake(const SnakeArgs& a) {
  launch_next();
  wait_for_inputs();
  if (a.packs == a.channels) {
    snake_rows<T, 1>(a);
  } else {
    snake_rows<T, kPack<T>>(a);
  }
}

S1_KERNEL(snake, SnakeArgs, 256, 1, snake)

}  // namespace s1
