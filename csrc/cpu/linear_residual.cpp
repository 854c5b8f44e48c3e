// linear_residual: a projection back into the residual stream (wo, w2), or a plain one (residual null).
//
// out = weight @ x + bias + residual
//   x [B, J], weight [C, J], bias [C] or null, residual [B, C] or null, out [B, C], which may be residual
// Who: thread t does a range of output rows for all B.
// Memory: C * J weights, read once for up to all B rows; they bound the op.
// Numerics: sums are fp32, bias and residual are added in fp32; one rounding, of out.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/linear_residual.cpp"
#include "cpu/for_each_isa.h"
#else
#include "cpu/gemv.h"

namespace s1 {
namespace S1_ISA {

template <class T>
struct AddBiasAndResidual {
  const T* bias;
  const T* residual;
  T* out;
  std::int64_t out_dim;
  S1_INLINE void operator()(std::int64_t b, std::int64_t row, float sum) const {
    if (bias) sum += load_one(bias + row);
    if (residual) sum += load_one(residual + b * out_dim + row);
    store_one(out + b * out_dim + row, sum);
  }
};

template <class T>
void linear_residual_as(const LinearResidual& a, int thread, int threads) {
  const float* x = stage(static_cast<const T*>(a.x), a.in_dim, a.rows, a.in_dim);
  const AddBiasAndResidual<T> finish{static_cast<const T*>(a.bias), static_cast<const T*>(a.residual),
                                     static_cast<T*>(a.out), a.out_dim};
  gemv(static_cast<const T*>(a.weight), a.in_dim, share(a.out_dim, thread, threads), x, a.rows, a.next, finish);
}

void linear_residual(const LinearResidual& a, int thread, int threads) {
  if (a.dtype == DType::float32) return linear_residual_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return linear_residual_as<BF16>(a, thread, threads);
  linear_residual_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
