// The persistent frame kernel's heads and draws: the main token's by all blocks together, a fast code's by every block
// alike.
#pragma once

#include "frame_attention.cuh"

namespace s1 {

// The sampling warps of a block that has others too.
struct SamplingWarps {
  static __device__ __forceinline__ void wait() { sync_samplers(); }
};
using WorkerMerger = MergerOf<SamplingWarps>;

template <class T>
struct FrameDraws : FrameAttention<T> {
  using Base = FrameAttention<T>;
  using Base::a;
  using Base::norm_scale;
  using Base::pass;
  using Base::s;
  using Base::stage_normed;
  using Base::waiting;

  __device__ __forceinline__ float penalised(float x, bool said) const {
    const float penalty = *a.repetition_penalty;
    if (said) x = x < 0.0f ? x * penalty : x / penalty;
    return x + 0.0f;
  }

  // The slow stack's logits, of which this block has some, and the draw of the main token by all blocks together.
  __device__ __forceinline__ void head(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int first = static_cast<int>(blockIdx.x) * f.pairs * 2, count = min(2 * pairs_here(f), f.rows - first);
    this->template units<true>(f, s.stage[half], kWidth * 4, [&](int u, int, float2 y) {
      const float scale = norm_scale(half, 0);
      if (lane_id() >= 2 || 2 * u + lane_id() >= count) return;
      const int row = 2 * u + lane_id();
      float x = (lane_id() == 0 ? y.x : y.y) * scale;
      if (a.logit_bias) x += a.logit_bias[first + row];
      s.logits.value[row] = x;
      a.main_logits[first + row] = x;
    });
    sync_workers();
    if (warp_id() < kSamplerWarps) {
      const int token = draw_main(first, count);
      if (threadIdx.x == 0) {
        s.code = min(max(token - (token < 0 ? 0 : a.semantic_begin), 0), a.codebook_size - 1);
        if (blockIdx.x == 0) {
          a.out[0] = token;
          a.out[1] = s.code;
        }
      }
    }
    sync_workers();
  }

  // Merges what all blocks found, in all of them alike.
  __device__ __forceinline__ Ahead exchange(const Ahead& mine, WorkerMerger& merge) {
    uint32* slot = a.passes + (static_cast<int64>(pass++) * kBlocks + blockIdx.x) * 8;
    if (threadIdx.x == 0) {
      put_float(slot, mine.mass);
      put_word(slot + 1, static_cast<uint32>(mine.count));
      put_word(slot + 2, min(mine.best.key, kEmpty - 1));  // NaN stays larger than infinity
      put_word(slot + 3, static_cast<uint32>(mine.best.row));
      put_float(slot + 4, mine.best.value);
      put_word(slot + 5, 0u);
    }
    Ahead found = nothing();
    if (threadIdx.x < kBlocks) {
      const uint32* from = slot + (static_cast<int>(threadIdx.x) - static_cast<int>(blockIdx.x)) * 8;
      const Vec16 x = waiting.take4(from);
      const uint2 y = waiting.take2(from + 4);
      found = {__uint_as_float(x.word[0]),
               static_cast<int>(x.word[1]),
               {x.word[2], static_cast<int>(x.word[3]), __uint_as_float(y.x)}};
    }
    return merge(found);
  }

  __device__ __forceinline__ int draw_main(int first, int count) {
    WorkerMerger merge{s.slots, 0};
    const Gumbel noise{
        nullptr,
        a.ids,
        {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]), static_cast<uint32>(a.main_threads)},
        false};
    uint32 top = 0;
    for (int i = threadIdx.x; i < count; i += kSamplerThreads) {
      const int token = a.ids ? a.ids[first + i] : first + i;
      bool said = false;
      for (int w = 0; w <= a.codebooks; ++w) said |= a.window[w * a.width] == token;  // the window's first frame
      s.logits.value[i] = penalised(s.logits.value[i], said);
      s.logits.gumbel[i] = noise(first + i);
      top = max(top, ordered_or_nan(s.logits.value[i]));
    }
    top = exchange({0.0f, 0, {merge.largest_of_block(top), 0, 0.0f}}, merge).best.key;
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), 1.0f / fmaxf(*a.temperature, kLowestTemperature)};
    const Choice choice = draw(Limits{*a.top_p, *a.top_k}, scale, [&](uint64 place) {
      Ahead ahead = nothing();
      for (int i = threadIdx.x; i < count; i += kSamplerThreads)
        consider(ahead, s.logits.value[i], s.logits.gumbel[i], first + i, place, scale);
      return exchange(merge(ahead), merge);
    });
    if (choice.key == 0) return -1;
    return a.ids ? a.ids[choice.row] : choice.row;
  }

  // A fast code's logits, and its draw by every block alike.
  __device__ __forceinline__ void fast_head(const Phase& f, int half) {
    const int number = f.position;  // of the code that is drawn, 2 ... N
    const int first = static_cast<int>(threadIdx.x) * 4;
    float gumbel[4];
    uint32 said = 0;
    if (warp_id() < kSamplerWarps) {  // while the inputs are on their way
      const uint64 offset = static_cast<uint32>(a.fast_offset + (number - 2) * a.fast_step);
      const Gumbel noise{
          nullptr,
          nullptr,
          {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]) + offset, static_cast<uint32>(a.fast_threads)},
          false};
#pragma unroll
      for (int i = 0; i < 4; ++i) gumbel[i] = noise(first + i);
      for (int w = 0; w < a.width; ++w) {
        const int at = a.window[number * a.width + w] - first;
        if (at >= 0 && at < 4) said |= 1u << at;
      }
    }
    stage_normed(f, half);
    sync_workers();
    float* logits = a.fast_logits + static_cast<int64>(number - 2) * a.fast_rows;
    this->template units<true>(f, s.stage[half], kWidth * 4, [&](int u, int, float2 y) {
      const float scale = norm_scale(half, 0);
      const int row = (static_cast<int>(blockIdx.x) * f.pairs + u) * 2 + lane_id();
      if (lane_id() >= 2) return;
      const float x = (lane_id() == 0 ? y.x : y.y) * scale;
      put_float(a.words + f.out + row, x);
      logits[row] = x;
    });
    if (warp_id() < kSamplerWarps) {
      const int code = draw_code(f, said, gumbel);
      if (threadIdx.x == 0) {
        s.code = min(max(code, 0), a.codebook_size - 1);
        if (blockIdx.x == 0) a.out[number] = code;
      }
    }
    sync_workers();
  }

  __device__ __forceinline__ int draw_code(const Phase& f, uint32 said, const float (&gumbel)[4]) {
    WorkerMerger merge{s.slots, 0};
    const int first = static_cast<int>(threadIdx.x) * 4;
    const Limits limits{*a.top_p, *a.top_k};
    const float inverse_temperature = 1.0f / fmaxf(*a.temperature, kLowestTemperature);
    float value[4];
    uint32 top = 0;
    const Vec16 words = waiting.take4(a.words + f.out + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = penalised(__uint_as_float(words.word[i]), said >> i & 1u);
      top = max(top, ordered_or_nan(value[i]));
    }
    top = merge.largest_of_block(top);
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), inverse_temperature};
    const Choice choice = draw(limits, scale, [&](uint64 place) {
      Ahead ahead = nothing();
#pragma unroll
      for (int i = 0; i < 4; ++i) consider(ahead, value[i], gumbel[i], first + i, place, scale);
      return merge(ahead);
    });
    return choice.key == 0 ? -1 : choice.row;
  }
};

}  // namespace s1
