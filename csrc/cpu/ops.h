// The CPU ops: one argument struct and one slice function each.
//
// A slice function does the share of thread `thread` of `threads` and returns; the op is done when all threads have
// returned. Output rows (or heads) are shared out, never the terms of a sum, so the result has the same bits for every
// number of threads. Only sample_token has a barrier inside. Arguments are taken as correct; module.cpp and
// decode_frame.cpp check them.
//
// B rows, C hidden, F intermediate, D head_dim, H query heads, G key/value heads, S cache capacity, R caches,
// N codebooks, K codebook size, V rows of the head, W window length, P rotary positions. All tensors are contiguous;
// `void*` tensors have the type `dtype`. Alignment to the element is enough.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace s1 {

class Barrier;

enum class DType { float32, bfloat16, float16 };

struct BF16 {
  std::uint16_t bits;
};
struct FP16 {
  std::uint16_t bits;
};

inline std::size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// Rows [begin, end) of `total` that belong to a thread.
struct Range {
  std::int64_t begin, end;
};
inline Range share(std::int64_t total, int thread, int threads) {
  return {total * thread / threads, total * (thread + 1) / threads};
}

// `next` in the ops that stream a matrix or a cache: where this thread will read after the op, or null. The end of the
// stream prefetches it, so that memory does not idle at the barrier.

struct EmbedFrame {
  DType dtype;
  const std::int32_t* tokens;      // [B, N+1]
  const void* text_embedding;      // [Vt, C]
  const void* codebook_embedding;  // [N*K, C]
  void* out;                       // [B, C]
  int rows, codebooks, codebook_size, dim;
  std::int32_t semantic_begin, semantic_end;
  bool scale;
};

struct RmsNormQkv {
  DType dtype;
  const void* x;            // [B, C]
  const void* norm_weight;  // [C]
  const void* weight;       // [(H+2G)*D, C]
  const void* bias;         // [(H+2G)*D] or null
  void* out;                // [B, (H+2G)*D]
  int rows, dim, out_dim;
  float eps;
  const void* next;
};

struct QkNormRotaryAppend {
  DType dtype;
  const void* qkv;               // [B, (H+2G)*D]: q | k | v
  const void* q_norm_weight;     // [D] or null
  const void* k_norm_weight;     // [D] or null
  const void* cos_sin;           // [P, D/2, 2]
  const std::int32_t* position;  // [B]
  void* k_cache;                 // [R, G, S, D]
  void* v_cache;                 // [R, G, S, D]
  void* out;                     // [B, H, D]
  int rows, caches, heads, kv_heads, head_dim, capacity;
  float eps;
};

struct AttentionDecode {
  DType dtype;
  const void* q;               // [B, H, D]
  const void* k_cache;         // [R, G, S, D]
  const void* v_cache;         // [R, G, S, D]
  const std::int32_t* length;  // [B]
  void* out;                   // [B, H, D]
  int rows, caches, heads, kv_heads, head_dim, capacity;
  const void* next;
};

struct LinearResidual {
  DType dtype;
  const void* x;         // [B, J]
  const void* weight;    // [C, J]
  const void* bias;      // [C] or null
  const void* residual;  // [B, C] or null
  void* out;             // [B, C], may be residual
  int rows, in_dim, out_dim;
  const void* next;
};

struct RmsNormSwiglu {
  DType dtype;
  const void* x;            // [B, C]
  const void* norm_weight;  // [C]
  const void* w1;           // [F, C]
  const void* w3;           // [F, C]
  void* out;                // [B, F]
  int rows, dim, intermediate;
  float eps;
  const void* next;
};

struct RmsNormLogits {
  DType dtype;
  const void* x;            // [B, C], row b at x + b * x_stride elements
  const void* norm_weight;  // [C]
  const void* weight;       // [V, C]
  const float* logit_bias;  // [V] or null
  float* logits;            // [B, V], row b at logits + b * logits_stride
  void* normed;             // [B, C] or null
  int rows, dim, vocabulary;
  std::int64_t x_stride, logits_stride;
  float eps;
  const void* next;
};

struct RmsNorm {
  DType dtype;
  const void* x;       // [B, C]
  const void* weight;  // [C]
  void* out;           // [B, C]
  int rows, dim;
  float eps;
};

struct Swiglu {
  DType dtype;
  const void* gate;  // [B, F]
  const void* up;    // [B, F]
  void* out;         // [B, F]
  int rows, intermediate;
};

struct Snake {
  DType dtype;
  const void* x;             // [T, C]
  const void* bias;          // [C] or null
  const void* alpha;         // [C] or null
  void* past_cache;          // [2, P, C]
  const std::int32_t* turn;  // [1]
  void* out;                 // [T / stride, taps * C]
  int steps, channels, reach, taps, dilation, stride;
};

struct SampleToken {
  const float* logits;         // [B, V], rows row_stride apart, as those of noise and ras_noise
  const float* noise;          // [B, V]
  const float* ras_noise;      // [B, V] or null
  const std::int32_t* window;  // row b at window + b * window_stride, W entries; null if W is 0
  const std::int32_t* ids;     // [V] ascending, or null
  std::int32_t* out;           // row b at out + b * out_stride
  int rows, vocabulary, window_length;
  std::int64_t row_stride, window_stride, out_stride;
  float temperature, top_p, repetition_penalty;
  int top_k;  // 0: no limit
  std::int32_t semantic_begin, semantic_end;
  void* scratch;     // sample_token_scratch_bytes(rows, vocabulary)
  Barrier* barrier;  // of the calling threads
};
std::size_t sample_token_scratch_bytes(int rows, int vocabulary);

struct Kernels {
  void (*embed_frame)(const EmbedFrame&, int thread, int threads);
  void (*rms_norm_qkv)(const RmsNormQkv&, int thread, int threads);
  void (*qk_norm_rotary_append)(const QkNormRotaryAppend&, int thread, int threads);
  void (*attention_decode)(const AttentionDecode&, int thread, int threads);
  void (*linear_residual)(const LinearResidual&, int thread, int threads);
  void (*rms_norm_swiglu)(const RmsNormSwiglu&, int thread, int threads);
  void (*rms_norm_logits)(const RmsNormLogits&, int thread, int threads);
  void (*rms_norm)(const RmsNorm&, int thread, int threads);
  void (*swiglu)(const Swiglu&, int thread, int threads);
  void (*snake)(const Snake&, int thread, int threads);
  void (*sample_token)(const SampleToken&, int thread, int threads);
};

enum class Isa { scalar, avx2, avx512 };

// The instruction sets that this machine has, slowest first.
std::vector<Isa> available_isas();
const char* name_of(Isa isa);
// The instruction set in use: the fastest one, or the one that S1KERNELS_ISA named when the first op ran.
Isa current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument
const Kernels& kernels(Isa isa);

// Growing fp32 scratch of the calling thread, 64-byte aligned; contents are lost at the next call.
float* thread_scratch(std::size_t floats);

}  // namespace s1
