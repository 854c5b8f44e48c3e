// attention_decode: grouped-query attention of one new position over the cache.
//
// out[b, h] = softmax(q[b, h] . k / sqrt(D)) v over the first length[b] positions of cache b / (B/R), kv head h / (H/G)
//   q, out [B, H, D]; k_cache, v_cache [R, G, S, D]; length [B] int32, 1 to S. Positions from length on are not read.
// Who: thread t does a range of the R*G key/value heads, each with its H/G query heads, so that keys and values are
// read once; with more threads than key/value heads, a range of the B*H query heads.
// Memory: 2 * length * G * D elements a cache; 58 MB a frame at 512 positions of S1-mini, 3% of the frame.
// Numerics: scores, softmax and the weighted sum are fp32 in the order of positions; one rounding, of out. A head's
// bits do not depend on the partition.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/attention_decode.cpp"
#include "cpu/for_each_isa.h"
#else
#include "cpu/gemv.h"

namespace s1 {
namespace S1_ISA {

constexpr int kHeadTile = 2;                 // query heads that share one pass over the values
constexpr int kColumnTile = kRegisters / 4;  // vectors of columns: kHeadTile * kColumnTile sums stay in registers

struct StoreScore {
  float* scores;
  std::int64_t stride;
  S1_INLINE void operator()(std::int64_t head, std::int64_t position, float sum) const {
    scores[head * stride + position] = sum;
  }
};

// scores [length] become e^(score - max); returns their sum. The padding of the last vector adds 1e-38 a lane: nothing.
S1_INLINE float exponentiate(float* scores, std::int64_t length) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (std::int64_t s = length; s < padded(length); ++s) scores[s] = -infinity;
  Vec top = splat(-infinity), total = splat(0.0f);
  for (std::int64_t s = 0; s < length; s += kLanes) top = max(top, load(scores + s));
  const Vec largest = splat(max_lane(top));
  for (std::int64_t s = 0; s < length; s += kLanes) {
    const Vec e = exp(load(scores + s) - largest);
    store(scores + s, e);
    total = total + e;
  }
  return sum(total);
}

// out[h][c] = sum_s weights[h][s] * values[s][c] / total[h] for kVectors vectors of columns of kHeads heads. `columns`
// is how many of the columns exist; only the last vector may be cut.
template <class T, int kHeads, int kVectors>
S1_INLINE void weighted_sum(const T* values, std::int64_t dim, std::int64_t length, const float* weights,
                            std::int64_t stride, const float* totals, std::int64_t columns, const ReadAhead& ahead,
                            T* out) {
  Vec acc[kHeads][kVectors];
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kVectors; ++i) acc[h][i] = splat(0.0f);
  for (std::int64_t s = 0; s < length; ++s) {
    const T* row = values + s * dim;
    const std::int64_t offset = reinterpret_cast<const char*>(row) - ahead.begin;
    const char* near_at = ahead.at(offset + kNearBytes);
    const char* far_at = ahead.at(offset + kFarBytes);
    Vec weight[kHeads];
    for (int h = 0; h < kHeads; ++h) weight[h] = splat(weights[h * stride + s]);
    for (int i = 0; i < kVectors; ++i) {
      prefetch_near(near_at + i * kLanes * sizeof(T));
      prefetch_far(far_at + i * kLanes * sizeof(T));
      const Vec v = kVectors > 1 ? load(row + i * kLanes) : load_upto(row, columns);
      for (int h = 0; h < kHeads; ++h) acc[h][i] = fma(weight[h], v, acc[h][i]);
    }
  }
  for (int h = 0; h < kHeads; ++h)
    for (int i = 0; i < kVectors; ++i)
      store_upto(out + h * dim + i * kLanes, acc[h][i] / splat(totals[h]), columns - i * kLanes);
}

template <class T, int kHeads>
S1_INLINE void weighted_sums(const T* values, std::int64_t dim, std::int64_t length, const float* weights,
                             std::int64_t stride, const float* totals, const ReadAhead& ahead, T* out) {
  std::int64_t c = 0;
  for (; c + kColumnTile * kLanes <= dim; c += kColumnTile * kLanes)
    weighted_sum<T, kHeads, kColumnTile>(values + c, dim, length, weights, stride, totals, dim - c, ahead, out + c);
  for (; c < dim; c += kLanes)
    weighted_sum<T, kHeads, 1>(values + c, dim, length, weights, stride, totals, dim - c, ahead, out + c);
}

// `count` query heads of row b from head h on, all of key/value head g. `next`: what the thread reads after them.
template <class T>
void attend(const AttentionDecode& a, std::int64_t b, std::int64_t h, int count, std::int64_t g, const void* next) {
  const std::int64_t dim = a.head_dim, length = a.length[b], stride = padded(length);
  const std::int64_t cache = b / (a.rows / a.caches);
  const std::int64_t entry = (cache * a.kv_heads + g) * a.capacity * dim;
  const T* keys = static_cast<const T*>(a.k_cache) + entry;
  const T* values = static_cast<const T*>(a.v_cache) + entry;
  const std::int64_t first = (b * a.heads + h) * dim;
  float* q = stage(static_cast<const T*>(a.q) + first, dim, count, dim, count * (stride + 1));
  float* scores = q + count * padded(dim);
  float* totals = scores + count * stride;
  const Vec scale = splat(1.0f / std::sqrt(static_cast<float>(dim)));
  for (std::int64_t i = 0; i < count * padded(dim); i += kLanes) store(q + i, load(q + i) * scale);
  gemv(keys, dim, Range{0, length}, q, count, values, StoreScore{scores, stride});
  for (int i = 0; i < count; ++i) totals[i] = exponentiate(scores + i * stride, length);
  const ReadAhead ahead{reinterpret_cast<const char*>(values), length * dim * static_cast<std::int64_t>(sizeof(T)),
                        static_cast<const char*>(next)};
  T* out = static_cast<T*>(a.out) + first;
  int i = 0;
  for (; i + kHeadTile <= count; i += kHeadTile)
    weighted_sums<T, kHeadTile>(values, dim, length, scores + i * stride, stride, totals + i, ahead, out + i * dim);
  for (; i < count; ++i)
    weighted_sums<T, 1>(values, dim, length, scores + i * stride, stride, totals + i, ahead, out + i * dim);
}

template <class T>
void attention_decode_as(const AttentionDecode& a, int thread, int threads) {
  const int group = a.heads / a.kv_heads, rows_per_cache = a.rows / a.caches;
  const std::int64_t kv_heads = static_cast<std::int64_t>(a.caches) * a.kv_heads;
  if (threads <= kv_heads) {
    const Range mine = share(kv_heads, thread, threads);
    for (std::int64_t head = mine.begin; head < mine.end; ++head) {
      const std::int64_t cache = head / a.kv_heads, g = head % a.kv_heads;
      const T* next_keys = static_cast<const T*>(a.k_cache) + (head + 1) * a.capacity * a.head_dim;
      const void* next = head + 1 < mine.end ? static_cast<const void*>(next_keys) : a.next;
      for (std::int64_t b = cache * rows_per_cache; b < (cache + 1) * rows_per_cache; ++b)
        attend<T>(a, b, g * group, group, g, next);
    }
  } else {
    const Range mine = share(static_cast<std::int64_t>(a.rows) * a.heads, thread, threads);
    for (std::int64_t head = mine.begin; head < mine.end; ++head)
      attend<T>(a, head / a.heads, head % a.heads, 1, head % a.heads / group, a.next);
  }
}

void attention_decode(const AttentionDecode& a, int thread, int threads) {
  if (a.dtype == DType::float32) return attention_decode_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return attention_decode_as<BF16>(a, thread, threads);
  attention_decode_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
