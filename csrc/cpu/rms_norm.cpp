// rms_norm: the norm alone, for the many rows of a prompt.
//
// out = x * rsqrt(mean(x^2) + eps) * weight
//   x [B, C], weight [C], out [B, C]
// Who: thread t does a range of rows.
// Memory: 2 * B * C elements; a row is read twice, the second time from the first-level cache.
// Numerics: fp32 up to the one rounding of out; a sum takes the columns in order, then its lanes are summed.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/rms_norm.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

template <class T>
void rms_norm_as(const RmsNorm& a, int thread, int threads) {
  const T* weight = static_cast<const T*>(a.weight);
  const std::int64_t dim = a.dim;
  const Range rows = share(a.rows, thread, threads);
  for (std::int64_t b = rows.begin; b < rows.end; ++b) {
    const T* x = static_cast<const T*>(a.x) + b * dim;
    T* out = static_cast<T*>(a.out) + b * dim;
    Vec squares = splat(0.0f);
    for (std::int64_t c = 0; c < dim; c += kLanes) {
      const Vec v = load_upto(x + c, dim - c);
      squares = fma(v, v, squares);
    }
    const Vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + a.eps));
    for (std::int64_t c = 0; c < dim; c += kLanes)
      store_upto(out + c, load_upto(x + c, dim - c) * scale * load_upto(weight + c, dim - c), dim - c);
  }
}

void rms_norm(const RmsNorm& a, int thread, int threads) {
  if (a.dtype == DType::float32) return rms_norm_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return rms_norm_as<BF16>(a, thread, threads);
  rms_norm_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
