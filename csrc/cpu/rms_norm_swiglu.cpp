// rms_norm_swiglu: the norm before the feed-forward block and its gated half.
//
// out = silu(w1 @ n) * (w3 @ n),  n = x * rsqrt(mean(x^2) + eps) * norm_weight,  silu(a) = a / (1 + e^-a)
//   x [B, C], norm_weight [C], w1 and w3 [F, C], out [B, F]
// Who: thread t does a range of rows of both matrices for all B: all its rows of w1, then all of w3, so that it reads
// one stream of addresses at a time. The products with w1 wait in the thread's scratch.
// Memory: 2 * F * C weights, read once for up to all B rows; they bound the op.
// Numerics: n, both products and the gate stay fp32; one rounding, of out.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/rms_norm_swiglu.cpp"
#include "cpu/for_each_isa.h"
#else
#include "cpu/gemv.h"

namespace s1 {
namespace S1_ISA {

struct KeepGate {
  float* gate;  // [B, rows of the range]
  Range range;
  S1_INLINE void operator()(std::int64_t b, std::int64_t row, float sum) const {
    gate[b * (range.end - range.begin) + row - range.begin] = sum;
  }
};

template <class T>
struct MultiplyByGate {
  const float* gate;
  Range range;
  T* out;
  std::int64_t out_dim;
  S1_INLINE void operator()(std::int64_t b, std::int64_t row, float sum) const {
    const float a = gate[b * (range.end - range.begin) + row - range.begin];
    store_first(out + b * out_dim + row, silu(splat(a)) * splat(sum), 1);
  }
};

template <class T>
void rms_norm_swiglu_as(const RmsNormSwiglu& a, int thread, int threads) {
  const T* w1 = static_cast<const T*>(a.w1);
  const T* w3 = static_cast<const T*>(a.w3);
  const Range range = share(a.intermediate, thread, threads);
  const std::int64_t gates = a.rows * (range.end - range.begin);
  const float* n = stage_rms_norm(static_cast<const T*>(a.x), a.dim, static_cast<const T*>(a.norm_weight), a.rows,
                                  a.dim, a.eps, gates);
  float* gate = const_cast<float*>(n) + a.rows * padded(a.dim);
  gemv(w1, a.dim, range, n, a.rows, w3 + range.begin * a.dim, KeepGate{gate, range});
  gemv(w3, a.dim, range, n, a.rows, a.next, MultiplyByGate<T>{gate, range, static_cast<T*>(a.out), a.intermediate});
}

void rms_norm_swiglu(const RmsNormSwiglu& a, int thread, int threads) {
  if (a.dtype == DType::float32) return rms_norm_swiglu_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return rms_norm_swiglu_as<BF16>(a, thread, threads);
  rms_norm_swiglu_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
