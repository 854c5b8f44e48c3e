// rms_norm_logits: the last norm and the rows of the head that can be sampled.
//
// logits = weight @ n + logit_bias,  normed = n,  n = x * rsqrt(mean(x^2) + eps) * norm_weight
//   x [B, C] with a row stride, norm_weight [C], weight [V, C], logit_bias [V] fp32 or null,
//   logits [B, V] fp32, normed [B, C] or null
// Who: thread t does a range of head rows for all B; row b of normed is written by thread b mod threads.
// Memory: V * C weights, read once for up to all B rows; they bound the op.
// Numerics: n stays fp32 for the products; logits are never rounded; normed is rounded once.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/rms_norm_logits.cpp"
#include "cpu/for_each_isa.h"
#else
#include "cpu/gemv.h"

namespace s1 {
namespace S1_ISA {

struct StoreLogit {
  const float* bias;
  float* logits;
  std::int64_t stride;
  S1_INLINE void operator()(std::int64_t b, std::int64_t row, float sum) const {
    logits[b * stride + row] = bias ? sum + bias[row] : sum;
  }
};

template <class T>
void rms_norm_logits_as(const RmsNormLogits& a, int thread, int threads) {
  const std::int64_t dim = a.dim;
  const T* norm_weight = static_cast<const T*>(a.norm_weight);
  const float* n = stage_rms_norm(static_cast<const T*>(a.x), a.x_stride, norm_weight, a.rows, dim, a.eps);
  if (a.normed) {
    for (int b = thread; b < a.rows; b += threads)
      for (std::int64_t c = 0; c < dim; c += kLanes)
        store_upto(static_cast<T*>(a.normed) + b * dim + c, load(n + b * padded(dim) + c), dim - c);
  }
  gemv(static_cast<const T*>(a.weight), dim, share(a.vocabulary, thread, threads), n, a.rows, a.next,
       StoreLogit{a.logit_bias, a.logits, a.logits_stride});
}

void rms_norm_logits(const RmsNormLogits& a, int thread, int threads) {
  if (a.dtype == DType::float32) return rms_norm_logits_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return rms_norm_logits_as<BF16>(a, thread, threads);
  rms_norm_logits_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
