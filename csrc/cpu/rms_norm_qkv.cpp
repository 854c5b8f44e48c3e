// rms_norm_qkv: the norm before attention and its three projections in one matrix.
//
// out = weight @ n + bias,  n = x * rsqrt(mean(x^2) + eps) * norm_weight
//   x [B, C], norm_weight [C], weight [(H+2G)*D, C], bias [(H+2G)*D] or null, out [B, (H+2G)*D]
// Who: thread t does a range of output rows for all B; every thread norms x itself.
// Memory: (H+2G)*D * C weights, read once for up to all B rows; they bound the op.
// Numerics: n stays fp32; sums are fp32; one rounding, of out.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/rms_norm_qkv.cpp"
#include "cpu/for_each_isa.h"
#else
#include "cpu/gemv.h"

namespace s1 {
namespace S1_ISA {

template <class T>
struct AddBias {
  const T* bias;
  T* out;
  std::int64_t out_dim;
  S1_INLINE void operator()(std::int64_t b, std::int64_t row, float sum) const {
    store_one(out + b * out_dim + row, bias ? sum + load_one(bias + row) : sum);
  }
};

template <class T>
void rms_norm_qkv_as(const RmsNormQkv& a, int thread, int threads) {
  const T* norm_weight = static_cast<const T*>(a.norm_weight);
  const float* n = stage_rms_norm(static_cast<const T*>(a.x), a.dim, norm_weight, a.rows, a.dim, a.eps);
  const AddBias<T> finish{static_cast<const T*>(a.bias), static_cast<T*>(a.out), a.out_dim};
  gemv(static_cast<const T*>(a.weight), a.dim, share(a.out_dim, thread, threads), n, a.rows, a.next, finish);
}

void rms_norm_qkv(const RmsNormQkv& a, int thread, int threads) {
  if (a.dtype == DType::float32) return rms_norm_qkv_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return rms_norm_qkv_as<BF16>(a, thread, threads);
  rms_norm_qkv_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
