// snake: the activation of the codec, and the windows of the convolution behind it.
//
// out[i, k] = a[i * stride + k * dilation], where a is past_cache[turn] and, behind it, y + sin(alpha y)^2 /
// (alpha + 1e-9) of y = x + bias; past_cache[1 - turn] = the last P steps of a
//   x [T, C]; bias, alpha [C] or null; past_cache [2, P, C], P = (taps - 1) * dilation + 1 - stride; turn [1];
//   out [T / stride, taps * C]
// Who: thread t does a range of the P + T steps of a, each to every window that has it.
// Memory: x and a half of past_cache once, T * C * taps / stride elements and the other half written.
// Numerics: fp32 up to the one rounding of a.
#include <cstring>

#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/snake.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

template <class T>
void activate(const Snake& a, const T* x, const float* inverse, T* out) {
  const T *bias = static_cast<const T*>(a.bias), *alpha = static_cast<const T*>(a.alpha);
  for (int c = 0; c < a.channels; c += kLanes) {
    const int left = a.channels - c;
    Vec v = load_upto(x + c, left);
    if (bias) v = v + load_upto(bias + c, left);
    if (alpha) v = fma(load_upto(inverse + c, left), sin_squared(load_upto(alpha + c, left) * v), v);
    store_upto(out + c, v, left);
  }
}

template <class T>
void snake_as(const Snake& a, int thread, int threads) {
  const std::int64_t width = a.channels, reach = a.reach, steps = a.steps;
  const std::size_t bytes = static_cast<std::size_t>(width) * sizeof(T);
  const T* past = static_cast<const T*>(a.past_cache) + (*a.turn & 1) * reach * width;
  T* kept = static_cast<T*>(a.past_cache) + (1 - (*a.turn & 1)) * reach * width;
  float* inverse = thread_scratch(2 * static_cast<std::size_t>(width));
  T* activated = reinterpret_cast<T*>(inverse + width);
  for (int c = 0; a.alpha && c < width; ++c) {
    inverse[c] = 1.0f / (load_one(static_cast<const T*>(a.alpha) + c) + 1e-9f);
  }
  const Range rows = share(reach + steps, thread, threads);
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const T* step = past + row * width;
    if (row >= reach) {
      activate(a, static_cast<const T*>(a.x) + (row - reach) * width, inverse, activated);
      step = activated;
    }
    for (int k = 0; k < a.taps; ++k) {
      const std::int64_t first = row - static_cast<std::int64_t>(k) * a.dilation, i = first / a.stride;
      if (first < 0) break;
      if (i < steps / a.stride && i * a.stride == first) {
        std::memcpy(static_cast<T*>(a.out) + (i * a.taps + k) * width, step, bytes);
      }
    }
    if (row >= steps) std::memcpy(kept + (row - steps) * width, step, bytes);
  }
}

void snake(const Snake& a, int thread, int threads) {
  if (a.dtype == DType::float32) return snake_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return snake_as<BF16>(a, thread, threads);
  snake_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
