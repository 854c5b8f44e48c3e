// embed_frame: out = text[t0] + sum_i codebook[i*K + t_(i+1)] for a semantic t0, else text[t0].
//
//   tokens [B, N+1] int32; text_embedding [Vt, C], codebook_embedding [N*K, C], out [B, C]: T, contiguous. A row is
//   semantic if semantic_begin <= t0 <= semantic_end; the sum of semantic rows is multiplied by `scale`.
// Grid/block: (B, parts) blocks of 128 threads; a thread owns 16 bytes of a row of `out`.
// Memory: N+1 rows of C read, one written: 22 KB in S1-mini. Bound by latency: all rows are read at once.
// Numerics: sums in float32, one rounding. A token or a code out of range makes its row NaN.
// Requires: nothing; 16-byte accesses where C and the pointers allow them, else one element at a time.
#include "device/pack.cuh"

namespace s1 {

struct EmbedFrameArgs {
  const int* tokens;               // [B, N+1]
  const void* text_embedding;      // [Vt, C]
  const void* codebook_embedding;  // [N*K, C]
  void* out;                       // [B, C]
  int codebooks;                   // N
  int codebook_size;               // K
  int dim;                         // C
  int text_rows;                   // Vt
  int semantic_begin;
  int semantic_end;
  float scale;
};

constexpr int kEmbedThreads = 128;

__device__ __forceinline__ bool in_range(int value, int size) {
  return static_cast<uint32>(value) < static_cast<uint32>(size);
}

template <class T, int kWidth>
__device__ __forceinline__ void embed_columns(const EmbedFrameArgs& a, int b, int column) {
  if (column >= a.dim) return;
  const int* tokens = a.tokens + static_cast<int64>(b) * (a.codebooks + 1);
  const T* text = static_cast<const T*>(a.text_embedding) + column;
  const T* codebooks = static_cast<const T*>(a.codebook_embedding) + column;
  const int main = tokens[0];
  bool valid = in_range(main, a.text_rows);
  float sum[kWidth], more[kWidth];
  load_floats<T, kWidth>(text + static_cast<int64>(valid ? main : 0) * a.dim, sum);
  if (main >= a.semantic_begin && main <= a.semantic_end) {
#pragma unroll 5
    for (int i = 0; i < a.codebooks; ++i) {
      const int code = tokens[i + 1];
      const bool known = in_range(code, a.codebook_size);
      valid = valid && known;
      load_floats<T, kWidth>(codebooks + (static_cast<int64>(i) * a.codebook_size + (known ? code : 0)) * a.dim, more);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum[e] += more[e];
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] *= a.scale;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e)
    if (!valid) sum[e] = not_a_number();
  store_floats<T, kWidth>(static_cast<T*>(a.out) + static_cast<int64>(b) * a.dim + column, sum);
}

template <class T>
__device__ void embed_frame(const EmbedFrameArgs& a) {
  launch_next();
  wait_for_inputs();
  const int b = blockIdx.x, first = static_cast<int>(blockIdx.y) * kEmbedThreads * kPack<T>, thread = threadIdx.x;
  if (all_aligned(a.dim * static_cast<int64>(sizeof(T)), a.text_embedding, a.codebook_embedding, a.out)) {
    embed_columns<T, kPack<T>>(a, b, first + thread * kPack<T>);
  } else {
    for (int i = 0; i < kPack<T>; ++i) embed_columns<T, 1>(a, b, first + i * kEmbedThreads + thread);
  }
}

S1_KERNEL(embed_frame, EmbedFrameArgs, 128, 1, embed_frame)

}  // namespace s1
