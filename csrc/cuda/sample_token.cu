// sample_token: repetition penalty or repetition-aware sampling, top-k, top-p, temperature, and the draw.
//
// device/sampler.cuh has the draw. Without `ras` the rows whose tokens occur in the window are penalised first:
// l < 0 ? l * penalty : l / penalty. With it, a semantic token that occurs in the window is drawn once more, from the
// same logits with temperature 1 and top_p 0.9.
//   logits [B, V] fp32 (a bias is added in place); out [B]: a token, or -1 if a logit is NaN or none is finite. Noise
//   is given, or drawn as torch draws it (device/rng.cuh). A frame also has the token's code written and its embedding
//   put where the next transformer pass reads it (finish()).
// Grid/block: 256 threads. sample_token: a block a row, which it keeps in shared memory, 8*V bytes. Larger vocabularies
//   take two launches of (V/1024, B) blocks: sample_token_survey finds each chunk's top, mass and best row;
//   sample_token_settle finds what is ahead of the best of all, lists it chunk by chunk, and its last block to finish
//   decides, going over those lists if the first proposal is not kept.
// Memory: logits and noise once; with chunks 24*V bytes more, in L2. Bound by latency.
// Numerics: fp32; sums of a thread's rows, then of threads in a fixed order: the same bits in every call.
// Requires: any strides and alignment; V below 2^31.
#include "device/token.cuh"

namespace s1 {

constexpr int kChunkItems = 4;
constexpr int kChunk = kChunkItems * kSamplerThreads;

template <class T>
__device__ void sample_token(const SampleTokenArgs& a) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Ahead slots[2 * kSamplerWarps];
  if (!reads_early(a)) wait_for_inputs();
  const int b = blockIdx.x, first = threadIdx.x;
  float* value = reinterpret_cast<float*>(shared);  // a thread reads only what it has written here
  float* gumbel = value + a.vocabulary;
  const uint32 said = penalised_rows(a, b, 0, a.vocabulary);
  const float penalty = *a.repetition_penalty;
  Scale scale{0.0f, inverse_temperature(a)};
  Limits limits{*a.top_p, *a.top_k};
  const auto draw_noise = [&](bool ras) {
    const Gumbel source = gumbel_of(a, b, ras);
#pragma unroll 2
    for (int v = first; v < a.vocabulary; v += kSamplerThreads) gumbel[v] = source(v);
  };
  draw_noise(false);
  if (reads_early(a)) wait_for_inputs();
  launch_next();  // not before: what a later kernel reads before its own wait is then complete, up to the last kernel

  float* logits = a.logits + static_cast<int64>(b) * a.logits_stride;
  uint32 top = 0;
#pragma unroll 4
  for (int v = first; v < a.vocabulary; v += kSamplerThreads) {
    value[v] = load_logit(a, logits, v, said >> v / kSamplerThreads & 1u, penalty);
    top = max(top, ordered_or_nan(value[v]));
  }
  Merger merge{slots, 0};
  top = merge.largest_of_block(top);
  scale.top = from_ordered(top);
  int token = -1;
  if (is_finite(top)) {
    for (bool again = false;; again = true) {
      const Choice choice = draw(limits, scale, [&](uint64 place) {
        Ahead ahead = nothing();
#pragma unroll 4
        for (int v = first; v < a.vocabulary; v += kSamplerThreads)
          consider(ahead, value[v], gumbel[v], v, place, scale);
        return merge(ahead);
      });
      token = token_of(a, choice);
      if (again || !draws_again(a, b, token)) break;
      draw_noise(true);
      scale.inverse_temperature = 1.0f;
      limits.top_p = kRasTopP;
    }
  }
  finish<T>(a, b, token);
}

// What a row's blocks leave each other.
struct Survey {
  Ahead all;   // of a chunk, relative to its own top
  uint32 top;  // ordered_or_nan()
};

struct Scratch {
  float* value;    // [chunks, kChunk]: logits; then, in the first places of a chunk, those ahead of the first proposal
  float* gumbel;   // [chunks, kChunk]: theirs
  int* row;        // [chunks, kChunk]: their rows, once they are listed
  Survey* survey;  // [chunks]
  Ahead* ahead;    // [chunks]: of the first proposal
  int* arrived;    // [1]
};

constexpr int kScratchAlign = 128;

__device__ __forceinline__ Scratch scratch_of(const SampleTokenArgs& a, int b) {
  const int64 chunks = gridDim.x;
  const int64 used = chunks * (kChunk * 12 + static_cast<int64>(sizeof(Survey) + sizeof(Ahead))) + 4;
  const int64 size = (used + kScratchAlign - 1) / kScratchAlign * kScratchAlign;
  Scratch s;
  s.value = reinterpret_cast<float*>(static_cast<unsigned char*>(a.scratch) + b * size);
  s.gumbel = s.value + chunks * kChunk;
  s.row = reinterpret_cast<int*>(s.gumbel + chunks * kChunk);
  s.survey = reinterpret_cast<Survey*>(s.row + chunks * kChunk);
  s.ahead = reinterpret_cast<Ahead*>(s.survey + chunks);
  s.arrived = reinterpret_cast<int*>(s.ahead + chunks);
  return s;
}

// This thread's rows of its block's chunk.
__device__ __forceinline__ int chunk_row(int item) {
  return static_cast<int>(blockIdx.x) * kChunk + item * kSamplerThreads + static_cast<int>(threadIdx.x);
}

template <class T>
__device__ void sample_token_survey(const SampleTokenArgs& a) {
  __shared__ Ahead slots[2 * kSamplerWarps];
  launch_next();
  if (!reads_early(a)) wait_for_inputs();
  const int b = blockIdx.y, first = static_cast<int>(blockIdx.x) * kChunk;
  const Scratch s = scratch_of(a, b);
  const uint32 said = penalised_rows(a, b, first, min(kChunk, a.vocabulary - first));
  const float penalty = *a.repetition_penalty;
  Scale scale{0.0f, inverse_temperature(a)};
  const Gumbel source = gumbel_of(a, b, false);
  float value[kChunkItems], gumbel[kChunkItems];
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j) gumbel[j] = chunk_row(j) < a.vocabulary ? source(chunk_row(j)) : 0.0f;
  if (reads_early(a)) wait_for_inputs();
  launch_next();  // not before: what a later kernel reads before its own wait is then complete, up to the last kernel

  float* logits = a.logits + static_cast<int64>(b) * a.logits_stride;
  uint32 top = 0;
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j) {
    const int v = chunk_row(j);
    if (v >= a.vocabulary) continue;
    value[j] = load_logit(a, logits, v, said >> j & 1u, penalty);
    s.value[v] = value[j];
    s.gumbel[v] = gumbel[j];
    top = max(top, ordered_or_nan(value[j]));
  }
  Merger merge{slots, 0};
  top = merge.largest_of_block(top);
  scale.top = top == kOrderedMinusInfinity ? 0.0f : from_ordered(top);
  Ahead all = nothing();
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j)
    if (chunk_row(j) < a.vocabulary) consider(all, value[j], gumbel[j], chunk_row(j), kEverywhere, scale);
  all = merge(all);
  if (threadIdx.x != 0) return;
  s.survey[blockIdx.x] = {all, top};
  if (blockIdx.x == 0) *s.arrived = 0;
}

// Everything, merged from the surveys of all chunks.
__device__ __forceinline__ Ahead everything(const Scratch& s, int chunks, const Scale& scale, Merger& merge) {
  Ahead all = nothing();
  for (int c = threadIdx.x; c < chunks; c += kSamplerThreads) {
    Survey part = s.survey[c];
    const float top = part.top == kOrderedMinusInfinity ? 0.0f : from_ordered(part.top);
    part.all.mass *= scale.weight(top);
    if (part.all.best.key != 0) {
      const float score = from_ordered(part.all.best.key) + (top - scale.top) * scale.inverse_temperature;
      part.all.best.key = ordered(score + 0.0f);
    }
    all = joined(all, part.all);
  }
  return merge(all);
}

// What is ahead of a place that is not behind the first proposal, from the lists that settle's blocks left.
__device__ __forceinline__ Ahead ahead_in_lists(const Scratch& s, int chunks, uint64 place, const Scale& scale) {
  constexpr int kBatch = 4;  // chunks whose loads are under way together
  Ahead ahead = nothing();
  for (int c0 = warp_id(); c0 < chunks; c0 += kBatch * kSamplerWarps) {
    int count[kBatch], row[kBatch];
    float value[kBatch], gumbel[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int c = c0 + k * kSamplerWarps;
      count[k] = c < chunks ? s.ahead[c].count : 0;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64 at = static_cast<int64>(c0 + k * kSamplerWarps) * kChunk + lane_id();
      if (lane_id() >= count[k]) continue;
      value[k] = s.value[at];
      gumbel[k] = s.gumbel[at];
      row[k] = s.row[at];
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      Ahead part = nothing();
      if (lane_id() < count[k]) consider(part, value[k], gumbel[k], row[k], place, scale);
      const int64 at = static_cast<int64>(c0 + k * kSamplerWarps) * kChunk;
      for (int i = lane_id() + kWarp; i < count[k]; i += kWarp)
        consider(part, s.value[at + i], s.gumbel[at + i], s.row[at + i], place, scale);
      ahead = joined(ahead, part);
    }
  }
  return ahead;
}

// The second draw of a large vocabulary: one block, straight from the logits.
__device__ __forceinline__ Choice draw_ras(const SampleTokenArgs& a, int b, float top, Merger& merge) {
  const float* logits = a.logits + static_cast<int64>(b) * a.logits_stride;
  const Gumbel source = gumbel_of(a, b, true);
  const Scale scale{top, 1.0f};
  return draw(Limits{kRasTopP, *a.top_k}, scale, [&](uint64 place) {
    Ahead ahead = nothing();
    for (int first = 0; first < a.vocabulary; first += kChunk) {
      Ahead part = nothing();
#pragma unroll
      for (int j = 0; j < kChunkItems; ++j) {
        const int v = first + j * kSamplerThreads + static_cast<int>(threadIdx.x);
        if (v < a.vocabulary) consider(part, logits[v] + 0.0f, source(v), v, place, scale);
      }
      ahead = joined(ahead, part);
    }
    return merge(ahead);
  });
}

template <class T>
__device__ void sample_token_settle(const SampleTokenArgs& a) {
  static_assert(kChunkItems * kSamplerWarps == kWarp, "a lane scans one warp's items");
  __shared__ Ahead slots[2 * kSamplerWarps];
  __shared__ int listed[kWarp];  // rows ahead, by item and warp
  __shared__ int last;
  launch_next();
  wait_for_inputs();
  const int b = blockIdx.y, chunks = gridDim.x, lane = lane_id();
  const Scratch s = scratch_of(a, b);
  float value[kChunkItems], gumbel[kChunkItems];
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j) {
    const int v = chunk_row(j);
    value[j] = v < a.vocabulary ? s.value[v] : 0.0f;
    gumbel[j] = v < a.vocabulary ? s.gumbel[v] : 0.0f;
  }
  Merger merge{slots, 0};
  uint32 top = 0;
  for (int c = threadIdx.x; c < chunks; c += kSamplerThreads) top = max(top, s.survey[c].top);
  top = merge.largest_of_block(top);
  if (!is_finite(top)) {  // the same in all blocks of a row
    if (blockIdx.x == 0) finish<T>(a, b, -1);
    return;
  }
  const Scale scale{from_ordered(top), inverse_temperature(a)};
  const Ahead all = everything(s, chunks, scale, merge);
  const uint64 first_place = place_of(all.best.value, all.best.row);

  Ahead mine = nothing();
  uint32 votes[kChunkItems];
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j) {
    const bool is_ahead =
        chunk_row(j) < a.vocabulary && consider(mine, value[j], gumbel[j], chunk_row(j), first_place, scale);
    votes[j] = __ballot_sync(kAllLanes, is_ahead);
    if (lane == 0) listed[j * kSamplerWarps + warp_id()] = __popc(votes[j]);
  }
  mine = merge(mine);  // its barrier also shows everybody's `listed`, and that this chunk's values have been read
  const int own = listed[lane];
  int before = own;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, before, offset);
    if (lane >= offset) before += lower;
  }
  before -= own;
#pragma unroll
  for (int j = 0; j < kChunkItems; ++j) {
    const int start = __shfl_sync(kAllLanes, before, j * kSamplerWarps + warp_id());
    if (!(votes[j] >> lane & 1u)) continue;
    const int64 at = static_cast<int64>(blockIdx.x) * kChunk + start + __popc(votes[j] & ((1u << lane) - 1u));
    s.value[at] = value[j];
    s.gumbel[at] = gumbel[j];
    s.row[at] = chunk_row(j);
  }
  if (threadIdx.x == 0) s.ahead[blockIdx.x] = mine;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(s.arrived, 1) == chunks - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();

  const Limits limits{*a.top_p, *a.top_k};
  const Choice choice = draw(limits, scale, [&](uint64 place) {
    if (place == kEverywhere) return all;
    Ahead ahead = nothing();
    if (place == first_place) {
      for (int c = threadIdx.x; c < chunks; c += kSamplerThreads) ahead = joined(ahead, s.ahead[c]);
    } else {
      ahead = ahead_in_lists(s, chunks, place, scale);
    }
    return merge(ahead);
  });
  int token = token_of(a, choice);
  if (draws_again(a, b, token)) token = token_of(a, draw_ras(a, b, scale.top, merge));
  finish<T>(a, b, token);
}

S1_KERNEL(sample_token, SampleTokenArgs, 256, 1, sample_token)
S1_KERNEL(sample_token_survey, SampleTokenArgs, 256, 1, sample_token_survey)
S1_KERNEL(sample_token_settle, SampleTokenArgs, 256, 1, sample_token_settle)

}  // namespace s1
