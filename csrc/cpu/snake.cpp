// snake: the activation of the codec.
//
// out = x + sin(alpha x)^2 / (alpha + 1e-9), element by element
//   x, out [B, C, T]; alpha [C]
// Who: thread t does a range of the B * C rows.
// Memory: 2 * B * C * T elements, each touched once.
// Numerics: fp32 up to the one rounding of out.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/snake.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

template <class T>
void snake_as(const Snake& a, int thread, int threads) {
  const std::int64_t length = a.length;
  const Range rows = share(static_cast<std::int64_t>(a.rows) * a.channels, thread, threads);
  for (std::int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * length;
    T* out = static_cast<T*>(a.out) + row * length;
    const float rate = load_one(static_cast<const T*>(a.alpha) + row % a.channels);
    const Vec alpha = splat(rate), inverse = splat(1.0f / (rate + 1e-9f));
    for (std::int64_t t = 0; t < length; t += kLanes) {
      const Vec v = load_upto(x + t, length - t);
      store_upto(out + t, fma(inverse, sin_squared(alpha * v), v), length - t);
    }
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
