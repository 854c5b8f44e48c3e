// The persistent frame kernel's heads and draws: the main token's by all blocks together, a fast code's by every block
// alike.
#pragma once

#include "frame_fast_attention.cuh"

namespace s1 {

// The sampling warps of a block that has others too.
struct SamplingWarps {
  static __device__ __forceinline__ void wait() { sync_samplers(); }
};
using WorkerMerger = MergerOf<SamplingWarps>;

template <class T>
struct FrameDraws : FrameFastAttention<T> {
  using Base = FrameFastAttention<T>;
  using Base::a;
  using Base::lane;
  using Base::s;
  using Base::thread;
  using Base::waiting;
  using Base::warp;

  static __device__ __forceinline__ float penalised(float x, bool said, float penalty) {
    if (said) x = x < 0.0f ? x * penalty : x / penalty;
    return x + 0.0f;
  }

  // The slow stack's logits, of which this block has some, 16 at a time, and the draw of the main token by all blocks
  // together.
  __device__ __forceinline__ void head(const Phase& f) {
    constexpr int kUnits = 2, kRows = kUnits * kTileRows;
    const int first = first_row(f), count = rows_here(f);
    prepare_rows(first, count);
    int place;
    const auto keep = [&](const Vec16& x, int word) {
      if (lane() < 8) store_vec(s.begin[0] + word, x);  // the first of the fast stack's first two vectors
    };
    const Vec16 x = this->normed_operand(f, 1, false, this->norm_weights(f), keep, place);
    RingCursor at{f.slot, f.parity};
    for (int step = 0; step * kRows < f.share; ++step, at.advance(kUnits)) {
      const int to = step % 2 * kRows;
      typename Base::template Held<2> held;
      const auto own = this->units(at, kUnits);
      this->await(own);
      this->load_tiles(held, at);
      this->release(own);
      this->multiply_tiles(held, x, place + to * kSums);
      sync_workers();
      if (warp() / 2 != step % (kWorkers / 2)) continue;
      const int row = warp() % 2 * kTileRows + this->result_row();
      const float logit = this->result(0, to + row);
      if (this->result_is_here() && step * kRows + row < count) take_logit(first, step * kRows + row, logit);
    }
    sync_workers();
    draw(f, [&](Start&) { return draw_main(first, count); });
  }

  // A fast code's logits, and its draw by every block alike.
  __device__ __forceinline__ void fast_head(const Phase& f) {
    this->template project_normed<1>(f, 1);
    if (warp() == kWorkers - 1) {
      const int row = this->result_row();
      const float logit = this->result(0, row);
      if (this->result_is_here()) put_logit(f, first_row(f) + row, logit);
    }
    draw(f, [&](Start& start) { return draw_code(f, start); });
  }

  // Of the main draw, for this block's rows: -log(noise), and whether the row is to be penalised. The first warp, which
  // comes late from adding up, takes the last of them.
  __device__ __forceinline__ void prepare_rows(int first, int count) {
    const Gumbel noise{
        nullptr,
        a.ids,
        {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]), static_cast<uint32>(a.main_threads)},
        false};
#pragma unroll 1
    for (int i = (thread + (kWorkers - 1) * 32) % (kWorkers * 32); i < count; i += kWorkers * 32) {
      const int token = a.ids ? a.ids[first + i] : first + i;
      bool said = false;
#pragma unroll 4
      for (int w = 0; w <= a.codebooks; ++w) said |= a.window[w * a.width] == token;  // the window's first frame
      s.logits.value[i] = said ? 1.0f : 0.0f;
      s.logits.gumbel[i] = noise(first + i);
    }
  }

  // A code, and this thread's four elements of its embedding.
  struct Start {
    int code;
    uint2 x;
  };
  __device__ __forceinline__ Start start_with(int code) const {
    return {code, Base::embedding(a.fast_embedding, code, thread * 4)};
  }
  __device__ __forceinline__ int code_of(int row) const { return min(max(row, 0), a.codebook_size - 1); }

  // Every block draws the same token, by its first warps, and begins the fast stack's next pass with its code.
  // draw_token(start) may begin with a code that it is likely to draw.
  template <class Draw>
  __device__ __forceinline__ void draw(const Phase& f, Draw draw_token) {
    if (warp() < kSamplerWarps) {
      const bool main = f.kind == kHead;
      Start start{-1, {}};
      const int token = draw_token(start), code = code_of(main ? max(token, 0) - a.semantic_begin : token);
      if (code != start.code) start = start_with(code);
      this->begin_vector(main ? 1 : 0, thread * 4, start.x);
      if (thread == 0 && this->block() == 0) {
        a.out[main ? 0 : f.position] = token;
        if (main) a.out[1] = start.code;
      }
    }
    sync_workers();
  }

  __device__ __forceinline__ void take_logit(int first, int row, float x) {
    if (a.logit_bias) x += a.logit_bias[first + row];
    a.main_logits[first + row] = x;
    s.logits.value[row] = penalised(x, s.logits.value[row] != 0.0f, *a.repetition_penalty);
  }

  // Merges what all blocks found in a pass, in all of them alike.
  __device__ __forceinline__ Ahead exchange(int pass, const Ahead& mine, WorkerMerger& merge) {
    uint32* all = a.passes + static_cast<int64>(pass) * kBlocks * 8;
    uint32* slot = all + this->block() * 8;
    if (thread == 0) {
      put_float(slot, mine.mass);
      put_word(slot + 1, static_cast<uint32>(mine.count));
      put_word(slot + 2, min(mine.best.key, kEmpty - 1));  // NaN stays larger than infinity
      put_word(slot + 3, static_cast<uint32>(mine.best.row));
      put_float(slot + 4, mine.best.value);
      for (int i = 5; i < 8; ++i) put_word(slot + i, 0u);
    }
    Ahead found = nothing();
    if (thread < kBlocks) {
      const uint32* from = all + thread * 8;
      Vec16 x[2];
      waiting.take4s(from, 4, x);
      found = {__uint_as_float(x[0].word[0]),
               static_cast<int>(x[0].word[1]),
               {x[0].word[2], static_cast<int>(x[0].word[3]), __uint_as_float(x[1].word[0])}};
    }
    return merge(found);
  }

  __device__ __forceinline__ int draw_main(int first, int count) {
    WorkerMerger merge{s.slots, 0};
    uint32 top = 0;
#pragma unroll 1
    for (int i = thread; i < count; i += kSamplerThreads) top = max(top, ordered_or_nan(s.logits.value[i]));
    int pass = 0;
    top = exchange(pass++, {0.0f, 0, {merge.largest_of_block(top), 0, 0.0f}}, merge).best.key;
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), 1.0f / fmaxf(*a.temperature, kLowestTemperature)};
    const Choice choice = s1::draw(Limits{*a.top_p, *a.top_k}, scale, [&](uint64 place) {
      Ahead ahead = nothing();
#pragma unroll 1
      for (int i = thread; i < count; i += kSamplerThreads)
        consider(ahead, s.logits.value[i], s.logits.gumbel[i], first + i, place, scale);
      return exchange(pass++, merge(ahead), merge);
    });
    if (choice.key == 0) return -1;
    return a.ids ? a.ids[choice.row] : choice.row;
  }

  __device__ __forceinline__ void put_logit(const Phase& f, int row, float x) {
    put_float(a.words + f.out + row, x);
    a.fast_logits[static_cast<int64>(f.position - 2) * a.fast_rows + row] = x;
  }

  // Each thread has four of a fast code's logits.
  __device__ __forceinline__ int draw_code(const Phase& f, Start& start) {
    WorkerMerger merge{s.slots, 0};
    const int first = thread * 4;
    const Limits limits{*a.top_p, *a.top_k};
    const float inverse_temperature = 1.0f / fmaxf(*a.temperature, kLowestTemperature);
    const float penalty = *a.repetition_penalty;
    float value[4];
    const float4 gumbel = reinterpret_cast<const float4*>(s.gumbel)[thread];
    const float noise[4] = {gumbel.x, gumbel.y, gumbel.z, gumbel.w};
    uint32 said = 0, top = 0;
#pragma unroll 4
    for (int w = 0; w < a.width; ++w) {
      const int at = a.window[f.position * a.width + w] - first;
      if (at >= 0 && at < 4) said |= 1u << at;
    }
    const Vec16 words = waiting.take4(a.words + f.out + first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = penalised(__uint_as_float(words.word[i]), said >> i & 1u, penalty);
      top = max(top, ordered_or_nan(value[i]));
    }
    top = merge.largest_of_block(top);
    if (!is_finite(top)) return -1;
    const Scale scale{from_ordered(top), inverse_temperature};
    const Choice choice = s1::draw(limits, scale, [&](uint64 place) {
      if (place != kEverywhere) start = start_with(code_of(static_cast<int>(place)));  // a proposal's row
      Ahead ahead = nothing();
#pragma unroll
      for (int i = 0; i < 4; ++i) consider(ahead, value[i], noise[i], first + i, place, scale);
      return merge(ahead);
    });
    return choice.key == 0 ? -1 : choice.row;
  }
};

}  // namespace s1
