// What the kernels of sample_token.cu share: their arguments, a row's noise and logits, and what becomes of its token.
#pragma once

#include "pack.cuh"
#include "rng.cuh"
#include "sampler.cuh"

namespace s1 {

struct SampleTokenArgs {
  float* logits;                    // [B, V], rows logits_stride apart; written if there is a bias
  const float* noise;               // [B, V], rows noise_stride apart, or null: drawn
  const float* ras_noise;           // as noise, for the second draw
  const int* window;                // [B, W], window_stride and window_step apart, or null
  const int* ids;                   // [V] ascending, the tokens of the rows, or null: their numbers
  const float* temperature;         // []
  const float* top_p;               // []
  const float* repetition_penalty;  // []
  const int* top_k;                 // []
  const float* logit_bias;          // [V] or null
  const int64* rng;                 // [2], seed and offset of torch's generator, or null: noise is given
  int* out;                         // [B], out_stride apart
  int* code;                        // [B], out_stride apart, or null: no code of the main token is wanted
  const void* embedding;            // [K, C] T, or null
  const void* hidden;               // [B, C] T, hidden_stride apart, or null
  void* next_x;                     // [B, C] T, next_stride apart: the embedding; with hidden, C elements before it
  void* scratch;                    // scratch_bytes() of the host; null for one launch
  int vocabulary;                   // V
  int logits_stride;
  int noise_stride;
  int window_length;  // W
  int window_step;
  int window_stride;
  int semantic_begin;
  int semantic_end;
  int out_stride;
  int codebook_size;  // K
  int dim;            // C
  int next_stride;
  int hidden_stride;
  int ras;
  int rng_threads;  // of the grid that torch launches for the whole tensor of noise
  int rng_offset;   // from the generator's offset to the draw's
  int ras_rng_offset;
  int rng_uniform;  // the noise is -log(uniform), not exponential
};

constexpr float kRasTopP = 0.9f;
constexpr float kLowestTemperature = 1e-5f;

struct Gumbel {
  const float* noise;  // [V] or null
  const int* ids;      // [V] or null
  TorchGenerator generator;
  bool uniform;

  // -log(noise) of a row.
  __device__ __forceinline__ float operator()(int row) const {
    if (noise) return -__logf(noise[row]);
    const uint32 element = static_cast<uint32>(ids ? ids[row] : row);
    return -__logf(uniform ? generator.minus_log_uniform(element) : generator.exponential(element));
  }
};

__device__ __forceinline__ Gumbel gumbel_of(const SampleTokenArgs& a, int b, bool ras) {
  const float* noise = ras ? a.ras_noise : a.noise;
  Gumbel gumbel{noise ? noise + static_cast<int64>(b) * a.noise_stride : nullptr, a.ids, {0, 0, 1}, a.rng_uniform != 0};
  if (a.rng) {
    gumbel.noise = nullptr;
    gumbel.generator = {static_cast<uint64>(a.rng[0]),
                        static_cast<uint64>(a.rng[1]) + static_cast<uint32>(ras ? a.ras_rng_offset : a.rng_offset),
                        static_cast<uint32>(a.rng_threads)};
  }
  return gumbel;
}

// What no kernel of a frame writes can be read before the frame's earlier kernels are through: the generator's state,
// window, ids, sampling options. As an op, whose arguments come from anywhere, everything waits.
__device__ __forceinline__ bool reads_early(const SampleTokenArgs& a) { return a.rng != nullptr; }

__device__ __forceinline__ const int* window_of(const SampleTokenArgs& a, int b) {
  return a.window + static_cast<int64>(b) * a.window_stride;
}

// Bit j is set if row first + j*kSamplerThreads + threadIdx.x, j < 32, is to be penalised.
__device__ __forceinline__ uint32 penalised_rows(const SampleTokenArgs& a, int b, int first, int count) {
  if (!a.window || a.ras) return 0;
  const int* window = window_of(a, b);
  uint32 said = 0;
  if (a.ids) {
    for (int i = threadIdx.x, j = 0; i < count; i += kSamplerThreads, ++j) {
      const int token = a.ids[first + i];
#pragma unroll 4
      for (int w = 0; w < a.window_length; ++w) said |= static_cast<uint32>(window[w * a.window_step] == token) << j;
    }
  } else {
#pragma unroll 4
    for (int w = 0; w < a.window_length; ++w) {
      const uint32 at = static_cast<uint32>(window[w * a.window_step]) - static_cast<uint32>(first);
      if (at < static_cast<uint32>(count) && at % kSamplerThreads == threadIdx.x) said |= 1u << at / kSamplerThreads;
    }
  }
  return said;
}

// The logit of a row as it is drawn from, never -0.
__device__ __forceinline__ float load_logit(const SampleTokenArgs& a, float* logits, int row, bool said,
                                            float penalty) {
  float x = logits[row];
  if (a.logit_bias) {
    x += a.logit_bias[row];
    logits[row] = x;
  }
  if (said) x = x < 0.0f ? x * penalty : x / penalty;
  return x + 0.0f;
}

__device__ __forceinline__ float inverse_temperature(const SampleTokenArgs& a) {
  return 1.0f / fmaxf(*a.temperature, kLowestTemperature);
}

__device__ __forceinline__ bool is_finite(uint32 key) { return key > kOrderedMinusInfinity && key < kOrderedInfinity; }

__device__ __forceinline__ int token_of(const SampleTokenArgs& a, const Choice& choice) {
  if (choice.key == 0) return -1;
  return a.ids ? a.ids[choice.row] : choice.row;
}

// Whether repetition-aware sampling draws again. All threads call it, with the same token.
__device__ __forceinline__ bool draws_again(const SampleTokenArgs& a, int b, int token) {
  if (!a.ras || !a.window || token < 0 || token < a.semantic_begin || token > a.semantic_end) return false;
  const int* window = window_of(a, b);
  int said = 0;
  for (int w = threadIdx.x; w < a.window_length; w += kSamplerThreads) said |= window[w * a.window_step] == token;
  return __syncthreads_or(said) != 0;
}

template <class T, int kWidth>
__device__ __forceinline__ void copy_rows(T* to, const T* embedding, const T* hidden, int dim) {
  float values[kWidth];
  for (int i = static_cast<int>(threadIdx.x) * kWidth; i < dim; i += kSamplerThreads * kWidth) {
    load_floats<T, kWidth>(embedding + i, values);
    store_floats<T, kWidth>(to + i, values);
    if (!hidden) continue;
    load_floats<T, kWidth>(hidden + i, values);
    store_floats<T, kWidth>(to - dim + i, values);
  }
}

// What becomes of row b's token, in the block that knows it: all threads call it.
template <class T>
__device__ __forceinline__ void finish(const SampleTokenArgs& a, int b, int token) {
  const int64 at = static_cast<int64>(b) * a.out_stride;
  const int code = min(max(a.code && token >= 0 ? token - a.semantic_begin : token, 0), a.codebook_size - 1);
  if (threadIdx.x == 0) {
    a.out[at] = token;
    if (a.code) a.code[at] = code;
  }
  if (!a.embedding) return;
  const T* embedding = static_cast<const T*>(a.embedding) + static_cast<int64>(code) * a.dim;
  const T* hidden = a.hidden ? static_cast<const T*>(a.hidden) + static_cast<int64>(b) * a.hidden_stride : nullptr;
  T* to = static_cast<T*>(a.next_x) + static_cast<int64>(b) * a.next_stride;
  if (all_aligned(a.dim * static_cast<int64>(sizeof(T)), embedding, hidden, to)) {
    copy_rows<T, kPack<T>>(to, embedding, hidden, a.dim);
  } else {
    copy_rows<T, 1>(to, embedding, hidden, a.dim);
  }
}

}  // namespace s1
