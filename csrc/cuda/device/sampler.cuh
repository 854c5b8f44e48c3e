// One draw from a row of logits, without a sort, by a block.
//
// Rows are ordered by descending logit, ties by ascending row. Kept is a prefix of that order: the rows up to which the
// probabilities sum to at most top_p, top_k rows at most, one at least. Drawn is the kept row of the best score
//   (logit - top) / temperature - log(noise),   ties to the lower row.
// The best row of all is proposed first. One pass over the rows finds what is ahead of it: their mass and number, which
// say whether the proposal is kept, and the best of them, which is the next proposal if it is not, for all that is
// behind a row that is not kept is not kept either. With noise that does not depend on the logits a rejected proposal
// halves what is left on average; of normally distributed logits 1.0 to 1.25 rows are proposed (simulated). After
// kPatience proposals the end of the prefix is bisected, which bounds the work for any noise.
#pragma once

#include "reduce.cuh"

namespace s1 {

constexpr int kSamplerThreads = 256;
constexpr int kSamplerWarps = kSamplerThreads / kWarp;
constexpr int kPatience = 16;
constexpr int kNoRow = 0x7fffffff;

// A number's bits, such that they order as unsigned integers. NaN comes last or first.
__device__ __forceinline__ uint32 ordered(float x) {
  const uint32 bits = __float_as_uint(x);
  return bits ^ (static_cast<uint32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32 key) {
  return __uint_as_float(key ^ (static_cast<uint32>(static_cast<int>(~key) >> 31) | 0x80000000u));
}
constexpr uint32 kOrderedNaN = 0xffffffffu, kOrderedInfinity = 0xff800000u, kOrderedMinusInfinity = 0x007fffffu;

// As ordered(), but any NaN is the largest.
__device__ __forceinline__ uint32 ordered_or_nan(float x) { return x == x ? ordered(x) : kOrderedNaN; }

// Where a row stands in the order; every place before kEverywhere can be a row's. Takes no value of -0.
constexpr uint64 kEverywhere = ~0ull;
__device__ __forceinline__ uint64 place_of(float value, int row) {
  return static_cast<uint64>(~ordered(value)) << 32 | static_cast<uint32>(row);
}

struct Choice {
  uint32 key;   // ordered score; 0: no row, or a NaN
  int row;      // kNoRow: none
  float value;  // its logit
};

// What is strictly ahead of a place.
struct Ahead {
  float mass;  // sum of e^(logit - top)
  int count;
  Choice best;
};

__device__ __forceinline__ Ahead nothing() { return {0.0f, 0, {0, kNoRow, 0.0f}}; }

__device__ __forceinline__ Choice better(const Choice& a, const Choice& b) {
  return b.key > a.key || (b.key == a.key && b.row < a.row) ? b : a;
}

__device__ __forceinline__ Ahead joined(const Ahead& a, const Ahead& b) {
  return {a.mass + b.mass, a.count + b.count, better(a.best, b.best)};
}

struct Scale {
  float top;  // the largest logit
  float inverse_temperature;

  __device__ __forceinline__ float weight(float value) const { return __expf(value - top); }
  __device__ __forceinline__ uint32 key(float value, float gumbel) const {
    const float score = (value - top) * inverse_temperature + gumbel;
    return score == score ? ordered(score + 0.0f) : 0;
  }
};

// Adds a row to `ahead` if it is ahead of `place`; whether it is.
__device__ __forceinline__ bool consider(Ahead& ahead, float value, float gumbel, int row, uint64 place,
                                         const Scale& scale) {
  if (place_of(value, row) >= place) return false;
  ahead.mass += scale.weight(value);
  ++ahead.count;
  const uint32 key = scale.key(value, gumbel);
  if (key > ahead.best.key || (key == ahead.best.key && key != 0 && row < ahead.best.row))
    ahead.best = {key, row, value};
  return true;
}

// Warp-wide, to every lane.
__device__ __forceinline__ uint32 largest(uint32 x) {
#if S1_ARCH >= 800
  return __reduce_max_sync(kAllLanes, x);
#else
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
#endif
}
__device__ __forceinline__ int smallest(int x) {
#if S1_ARCH >= 800
  return __reduce_min_sync(kAllLanes, x);
#else
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = min(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
#endif
}
__device__ __forceinline__ int count_of(int x) {
#if S1_ARCH >= 800
  return __reduce_add_sync(kAllLanes, x);
#else
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
#endif
}
__device__ __forceinline__ Choice best_of(const Choice& mine) {
  const uint32 key = largest(mine.key);
  const int row = smallest(mine.key == key ? mine.row : kNoRow);
  const uint32 owners = __ballot_sync(kAllLanes, mine.key == key && mine.row == row);
  return {key, row, __shfl_sync(kAllLanes, mine.value, __ffs(static_cast<int>(owners)) - 1)};
}

// The barrier of a block that has no other warps than those that sample.
struct WholeBlock {
  static __device__ __forceinline__ void wait() { __syncthreads(); }
};

// Merges what kSamplerWarps warps found, in a fixed order; every thread gets the result. One barrier a merge: a merge
// may write one half of `slots` while slow threads still read the other half. Sync::wait() is a barrier of these warps.
template <class Sync>
struct MergerOf {
  Ahead* slots;  // shared [2, kSamplerWarps]
  int half;

  __device__ __forceinline__ Ahead operator()(Ahead found) {
    found = {warp_sum(found.mass), count_of(found.count), best_of(found.best)};
    const Ahead* all = exchange(found);
    found = all[0];
#pragma unroll
    for (int w = 1; w < kSamplerWarps; ++w) found = joined(found, all[w]);
    return found;
  }

  __device__ __forceinline__ uint32 largest_of_block(uint32 key) {
    const Ahead* all = exchange({0.0f, 0, {largest(key), 0, 0.0f}});
    key = all[0].best.key;
#pragma unroll
    for (int w = 1; w < kSamplerWarps; ++w) key = max(key, all[w].best.key);
    return key;
  }

 private:
  __device__ __forceinline__ const Ahead* exchange(const Ahead& of_warp) {
    Ahead* now = slots + half * kSamplerWarps;
    half ^= 1;
    if (lane_id() == 0) now[warp_id()] = of_warp;
    Sync::wait();
    return now;
  }
};
using Merger = MergerOf<WholeBlock>;

struct Limits {
  float top_p;
  int top_k;

  __device__ __forceinline__ bool none() const { return top_p >= 1.0f && top_k <= 0; }
  // Whether the first `count` rows, which weigh `mass` of `total`, are all kept.
  __device__ __forceinline__ bool keep(float mass, int count, float total) const {
    return count <= 1 || ((top_p >= 1.0f || mass <= top_p * total) && (top_k <= 0 || count <= top_k));
  }
};

// The row drawn; none if all scores are NaN. pass(place) returns what is ahead of a place, to all threads alike; the
// first call asks for everything.
template <class Pass>
__device__ __forceinline__ Choice draw(const Limits& limits, const Scale& scale, const Pass& pass) {
  Choice proposal{}, found{0, kNoRow, 0.0f};
  float total = 0.0f;
  uint64 kept = 0, cut = kEverywhere, place = kEverywhere;  // all that is ahead of `kept` is kept; of `cut`, not
  for (int turn = 0;; ++turn) {
    const Ahead ahead = pass(place);
    if (turn == 0) {
      total = ahead.mass;
      proposal = ahead.best;
      if (limits.none()) return proposal;
    } else if (turn <= kPatience) {
      if (limits.keep(ahead.mass + scale.weight(proposal.value), ahead.count + 1, total)) return proposal;
      cut = place + 1;
      proposal = ahead.best;
    } else {
      const bool all = limits.keep(ahead.mass, ahead.count, total);
      if (all) found = ahead.best;
      (all ? kept : cut) = place;
      if (cut - kept <= 1) return found;
    }
    if (proposal.key == 0) return proposal;
    place = turn < kPatience ? place_of(proposal.value, proposal.row) : kept + (cut - kept) / 2;
  }
}

}  // namespace s1
