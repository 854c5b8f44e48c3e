// embed_frame: the slow transformer's input row of one frame.
//
// out[b] = text_embedding[t0] + (sum_i codebook_embedding[i*K + t_{i+1}] if t0 is semantic), t = tokens[b];
// a semantic row is divided by sqrt(N+1) if `scale`.
//   tokens [B, N+1] int32, text_embedding [Vt, C], codebook_embedding [N*K, C], out [B, C]
// Who: thread t does a range of columns of every row.
// Memory: (N+2) * B * C elements; nothing beside the projections.
// Numerics: the sum is fp32 in the order above, rounded once.
// Requires: tokens in [0, Vt) and, in semantic rows, codes in [0, K). Other rows' codes are never looked at.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/embed_frame.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

template <class T>
void embed_frame_as(const EmbedFrame& a, int thread, int threads) {
  const T* text = static_cast<const T*>(a.text_embedding);
  const T* codebooks = static_cast<const T*>(a.codebook_embedding);
  T* out = static_cast<T*>(a.out);
  const std::int64_t dim = a.dim;
  const Range columns = share(dim, thread, threads);
  for (int b = 0; b < a.rows; ++b) {
    const std::int32_t* tokens = a.tokens + static_cast<std::int64_t>(b) * (a.codebooks + 1);
    const bool semantic = tokens[0] >= a.semantic_begin && tokens[0] <= a.semantic_end;
    const Vec divisor = splat(a.scale && semantic ? std::sqrt(static_cast<float>(a.codebooks + 1)) : 1.0f);
    for (std::int64_t c = columns.begin; c < columns.end; c += kLanes) {
      const std::int64_t left = columns.end - c;
      Vec total = load_upto(text + tokens[0] * dim + c, left);
      if (semantic) {
        for (int i = 0; i < a.codebooks; ++i) {
          const std::int64_t row = static_cast<std::int64_t>(i) * a.codebook_size + tokens[i + 1];
          total = total + load_upto(codebooks + row * dim + c, left);
        }
      }
      store_upto(out + b * dim + c, total / divisor, left);
    }
  }
}

void embed_frame(const EmbedFrame& a, int thread, int threads) {
  if (a.dtype == DType::float32) return embed_frame_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return embed_frame_as<BF16>(a, thread, threads);
  embed_frame_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
