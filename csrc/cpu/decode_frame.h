// One frame of the DualAR model in one call: slow transformer, head, sampling, and the fast transformer's codebooks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/ops.h"

namespace s1 {

struct StackConfig {
  int layers, dim, heads, kv_heads, head_dim, intermediate;
};

struct FrameConfig {
  DType dtype;
  StackConfig slow, fast;
  float norm_eps;
  int text_rows;      // Vt, rows of text_embedding
  int head_rows;      // V, rows of the head that are sampled
  int fast_rows;      // K', rows of the fast head that are sampled
  int rotary_rows;    // P, rows of cos_sin
  int codebooks;      // N
  int codebook_size;  // K
  std::int32_t semantic_begin, semantic_end;
  bool scale_codebook_embeddings;  // of semantic rows, by 1 / sqrt(N+1)
  bool norm_fast_input;            // the fast transformer takes the normed hidden state
};

// dims: those of the layer's own stack.
struct LayerWeights {
  const void* attention_norm;  // [C]
  const void* wqkv;            // [(H+2G)*D, C]
  const void* qkv_bias;        // [(H+2G)*D] or null
  const void* q_norm;          // [D] or null
  const void* k_norm;          // [D] or null
  const void* wo;              // [C, H*D]
  const void* o_bias;          // [C] or null
  const void* ffn_norm;        // [C]
  const void* w1;              // [F, C]
  const void* w3;              // [F, C]
  const void* w2;              // [C, F]
};

struct FrameWeights {
  const void* text_embedding;      // [Vt, C]
  const void* codebook_embedding;  // [N*K, C]
  const void* norm;                // [C]
  const void* head;                // [V, C]
  const void* project_weight;      // [Cf, C] or null
  const void* project_bias;        // [Cf] or null
  const void* fast_embedding;      // [K, Cf]
  const void* fast_norm;           // [Cf]
  const void* fast_head;           // [K', Cf]
  const void* cos_sin;             // [P, D/2, 2]
  const void* fast_cos_sin;        // [N, Df/2, 2]
  std::vector<LayerWeights> slow, fast;
};

struct FrameStep {
  const std::int32_t* tokens;       // [B, N+1]
  const std::int32_t* position;     // [B]
  const std::int32_t* main_window;  // [B, W] or null
  const std::int32_t* fast_window;  // [B, N-1, Wf] or null
  const float* main_noise;          // [B, V]
  const float* ras_noise;           // [B, V] or null
  const float* fast_noise;          // [B, N-1, K']
  const std::int32_t* ids;          // [V] ascending, or null
  const float* logit_bias;          // [V] or null
  float* main_logits;               // [B, V], with logit_bias
  float* fast_logits;               // [B, N-1, K']
  std::int32_t* out;                // [B, N+1]
  int rows, main_window_length, fast_window_length;
  float temperature, top_p, repetition_penalty;
  int top_k;
};

// Bound once to weights that the caller keeps alive. Not for two threads at once.
class Frame {
 public:
  Frame(const FrameConfig& config, FrameWeights weights);
  ~Frame();

  // Caches [B, G, S, D] of each slow layer, S = capacity. Call again when they have moved.
  void set_caches(std::vector<void*> k_caches, std::vector<void*> v_caches, int rows, int capacity);

  // Both throw std::invalid_argument on tokens, codes, positions or windows out of range, before anything is written.
  void decode(const FrameStep& step, int threads);

  // The slow transformer alone: logits [B, V] fp32, hidden (before the last norm) and normed [B, C].
  void slow_step(const std::int32_t* tokens, const std::int32_t* position, int rows, float* logits, void* hidden,
                 void* normed, int threads);

 private:
  struct Buffers;
  class Run;

  void check(const std::int32_t* tokens, const std::int32_t* position, int rows) const;
  void prepare(const std::int32_t* position, int rows);

  const FrameConfig config_;
  const FrameWeights weights_;
  std::vector<void*> k_caches_, v_caches_;
  int cache_rows_ = 0, capacity_ = 0;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace s1
