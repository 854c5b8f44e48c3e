// swiglu: the gate of the feed-forward block, for the many rows of a prompt.
//
// out = silu(gate) * up,  silu(a) = a / (1 + e^-a)
//   gate, up, out [B, F]
// Who: thread t does a range of rows.
// Memory: 3 * B * F elements, each touched once.
// Numerics: fp32 up to the one rounding of out.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/swiglu.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

template <class T>
void swiglu_as(const Swiglu& a, int thread, int threads) {
  const std::int64_t width = a.intermediate;
  const Range rows = share(a.rows, thread, threads);
  for (std::int64_t b = rows.begin; b < rows.end; ++b) {
    const T* gate = static_cast<const T*>(a.gate) + b * width;
    const T* up = static_cast<const T*>(a.up) + b * width;
    T* out = static_cast<T*>(a.out) + b * width;
    for (std::int64_t f = 0; f < width; f += kLanes)
      store_upto(out + f, silu(load_upto(gate + f, width - f)) * load_upto(up + f, width - f), width - f);
  }
}

void swiglu(const Swiglu& a, int thread, int threads) {
  if (a.dtype == DType::float32) return swiglu_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return swiglu_as<BF16>(a, thread, threads);
  swiglu_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
