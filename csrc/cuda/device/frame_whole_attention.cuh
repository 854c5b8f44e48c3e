// The persistent frame kernel's slow attention at short contexts, in one exchange: a block takes a whole head.
//
// Block 8h + i has elements 16i to 16i + 15 of query head h. Of the past, up to kWhole positions, every warp but the
// last has sixteen: it takes their keys into registers before it waits for the query; those elements of their values
// come to shared memory a layer ahead. It leaves its part of the softmax's sums to the last warp, which has the frame's
// own position, and merges. So eight blocks compute the same scores; that is cheaper than a second exchange. A bfloat16
// query's norm is applied to its scores, not before it is rounded.
#pragma once

#include "frame_projections.cuh"
#include "matrices.cuh"
#include "rotary.cuh"

namespace s1 {

template <class T>
struct FrameWholeAttention : FrameProjections<T> {
  using Base = FrameProjections<T>;
  using Base::a;
  using Base::lane;
  using Base::s;
  using Base::waiting;
  using Base::warp;

  static constexpr int kQueryHeads = 16, kKeyHeads = 8;
  static constexpr int kRowWords = kSlowDim * sizeof(T) / 4;  // of a slow query, key or value

  static __device__ __forceinline__ int query_head() { return Base::block() / 8; }
  static __device__ __forceinline__ int key_head() { return Base::block() / 16; }
  static __device__ __forceinline__ int slice() { return Base::block() % 8; }

  // A layer's keys (side 0) or values (side 1) of this block's key/value head, in its cache.
  static __device__ __forceinline__ T* rows(const PersistentFrameArgs& a, int layer, int side) {
    return reinterpret_cast<T*>(a.caches[2 * layer + side]) + static_cast<int64>(key_head()) * a.capacity * kSlowDim;
  }

  // Of a layer's keys (side 0) or values (side 1), one of this warp's sixteen of the past. Rows that are not there are
  // the last one.
  static __device__ __forceinline__ const T* past_row(const PersistentFrameArgs& a, const Shared<T>& s, int layer,
                                                      int side, int warp, int place) {
    const int row = min(warp * kChunkStep + place, s.position - 1);
    return rows(a, layer, side) + static_cast<int64>(row) * kSlowDim;
  }

  // Starts to copy this warp's values of a layer's past, each lane a matrix's row (device/matrices.cuh). The order of
  // their positions is that of the weights in attend_past().
  static __device__ __forceinline__ void copy_values(const PersistentFrameArgs& a, Shared<T>& s, int layer, int warp,
                                                     int lane) {
    const int row = lane % 8, matrix = lane / 8;
    if (layer >= a.slow_layers || warp >= past_warps(s.position)) return;
    const T* from = past_row(a, s, layer, 1, warp, row / 2 * 2 + row % 2 * 8 + matrix % 2);
    copy_async(&s.whole.values[warp][lane], from + slice() * kSliceDim + matrix / 2 * 8);
  }

  __device__ __forceinline__ void attend_whole(const Phase& f) {
    const int past = past_warps(s.position);
    if (warp() < past) {
      attend_past(f, past);
      copy_values(a, s, f.layer + 1, warp(), lane());
    } else if (warp() == kWorkers - 1) {
      attend_own(f, past);
      merge(f, past + 1);
    }
  }

  // What makes queries (of = 0) or keys (of = 1) of a lane's four elements, from 4 * lane on.
  struct Turn {
    bool normed;
    uint2 weights;

    __device__ __forceinline__ Turn(const PersistentFrameArgs& a, int layer, int of, int lane) {
      const T* from = reinterpret_cast<const T*>(a.norms[2 * layer + of]);
      const uint32 ones = pack<T>(1.0f, 1.0f);
      normed = from != nullptr;
      weights = normed ? load_pairs(from + lane * 4) : uint2{ones, ones};
    }
    // rotary(x * weights); `square` gets the sum of the squares of x.
    __device__ __forceinline__ void operator()(const uint2& x, const uint2& angles, float2 (&y)[2],
                                               float& square) const {
      const float2 v[2] = {unpack<T>(x.x), unpack<T>(x.y)}, n[2] = {unpack<T>(weights.x), unpack<T>(weights.y)};
      const float2 angle[2] = {unpack<T>(angles.x), unpack<T>(angles.y)};
      square = fmaf(v[0].x, v[0].x, v[0].y * v[0].y) + fmaf(v[1].x, v[1].x, v[1].y * v[1].y);
#pragma unroll
      for (int i = 0; i < 2; ++i) y[i] = rotated({v[i].x * n[i].x, v[i].y * n[i].y}, angle[i]);
    }
    // What y is still to be multiplied by. All lanes call it.
    __device__ __forceinline__ float scale(float square, float eps) const {
      const float mean = warp_sum(square) * (1.0f / kSlowDim);
      return normed ? rsqrtf(mean + eps) : 1.0f;
    }
  };
  static __device__ __forceinline__ uint2 load_pairs(const T* at) { return *reinterpret_cast<const uint2*>(at); }
  __device__ __forceinline__ uint2 angles() const {
    return load_pairs(static_cast<const T*>(a.cos_sin) + static_cast<int64>(s.position) * kSlowDim + lane() * 4);
  }
  __device__ __forceinline__ const uint32* query_words(const Phase& f) const {
    return a.words + f.in + query_head() * kRowWords + lane() * 2;
  }

  // Sixteen positions of the past.
  __device__ __forceinline__ void attend_past(const Phase& f, int past) {
    const int warp = this->warp(), lane = this->lane(), t = lane % 4, place = warp * kChunkStep + lane / 4;
    const Turn turn(a, f.layer, 0, lane);
    const uint2 angles = this->angles();
    Vec16 key[2][4];  // rows g and g + 8 of the sixteen, columns 8t on of every 32, where lane is 4g + t
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* from = past_row(a, s, f.layer, 0, warp, i * 8 + lane / 4) + t * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) key[i][j] = load_weight(from + j * 32);
    }
    copies_done();
    __syncwarp();
    const Vec16 value = load_transposed(shared_address(&s.whole.values[warp][lane]));
    uint2 x[1];
    waiting.take2s({query_words(f)}, x);
    __syncwarp();
    float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e, square;
    float2 y[2];
    turn(x[0], angles, y, square);
    if constexpr (kScaleBeforeRounding<T>) {
      const float by = turn.scale(square, a.eps);
      y[0] = {y[0].x * by, y[0].y * by};
      y[1] = {y[1].x * by, y[1].y * by};
    }
    T* query = s.whole.query[warp];
    *reinterpret_cast<uint2*>(query + lane * 4) = {pack<T>(y[0].x, y[0].y), pack<T>(y[1].x, y[1].y)};
    __syncwarp();
    // Scores: operand rows are positions, all operand columns the query.
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Vec16 q = load_vec(query + j * 32 + t * 8), &k = key[0][j], &l = key[1][j];
      Mma<T>::add(even, k.word[0], l.word[0], k.word[1], l.word[1], q.word[0], q.word[1]);
      Mma<T>::add(odd, k.word[2], l.word[2], k.word[3], l.word[3], q.word[2], q.word[3]);
    }
    if constexpr (!kScaleBeforeRounding<T>) scale *= turn.scale(square, a.eps);
    const float score[2] = {place < s.position ? even[0] + odd[0] : -infinity(),
                            place + 8 < s.position ? even[2] + odd[2] : -infinity()};
    const float top = from_ordered(largest(ordered(fmaxf(score[0], score[1])))) * scale;
    const float p = exp2_of(fmaf(score[0], scale, -top)), q = exp2_of(fmaf(score[1], scale, -top));
    const uint32 high = pack<T>(p, q);
    const float2 taken = unpack<T>(high);
    const uint32 rest = pack<T>(p - taken.x, q - taken.y);
    // Values: rows 0 to 7 are all the high part of the weights, rows 8 to 15 the low part, of positions 2t and 2t + 8,
    // then of 2t + 1 and 2t + 9.
    const auto of = [&](uint32 x, int i) { return __shfl_sync(kAllLanes, x, t * 8 + i * 4); };
    const uint32 w[4] = {of(high, 0), of(rest, 0), of(high, 1), of(rest, 1)}, ones = pack<T>(1.0f, 1.0f);
    float sum[2][4] = {}, total[4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) Mma<T>::add(sum[i], w[0], w[1], w[2], w[3], value.word[2 * i], value.word[2 * i + 1]);
    Mma<T>::add(total, w[0], w[1], w[2], w[3], ones, ones);
    const float2 left[3] = {{sum[0][0] + sum[0][2], sum[0][1] + sum[0][3]},
                            {sum[1][0] + sum[1][2], sum[1][1] + sum[1][3]},
                            {total[0] + total[2], top}};
    if (lane < 8) s.whole.sums[warp][lane] = lane < 4 ? left[0] : left[1];
    if (lane == 8) s.whole.known[warp] = left[2];
    leave_part(past);
  }

  // The frame's own position, whose key and value are on their way; and that they are kept.
  __device__ __forceinline__ void attend_own(const Phase& f, int past) {
    const int lane = this->lane(), part = lane % 4 * 4;  // of the slice of the value
    const Turn q_turn(a, f.layer, 0, lane), k_turn(a, f.layer, 1, lane);
    const uint2 angles = this->angles();
    const uint32 *keys = a.words + f.in + (kQueryHeads + key_head()) * kRowWords,
                 *values = keys + kKeyHeads * kRowWords;
    uint2 x[3];
    waiting.take2s({query_words(f), keys + lane * 2, values + (slice() * kSliceDim + part) / 2}, x);
    __syncwarp();
    float2 q[2], k[2];
    float q_square, k_square;
    q_turn(x[0], angles, q, q_square);
    k_turn(x[1], angles, k, k_square);
    const float dot = fmaf(q[0].x, k[0].x, q[0].y * k[0].y) + fmaf(q[1].x, k[1].x, q[1].y * k[1].y);
    const float k_scale = k_turn.scale(k_square, a.eps), q_scale = q_turn.scale(q_square, a.eps);
    const float score = warp_sum(dot) * q_scale * k_scale * (rsqrtf(static_cast<float>(kSlowDim)) * kLog2e);
    if (lane < 4) {
      const float2 low = unpack<T>(x[2].x), high = unpack<T>(x[2].y);
      s.whole.sums[past][lane * 2] = low;
      s.whole.sums[past][lane * 2 + 1] = high;
    }
    if (lane == 4) s.whole.known[past] = {1.0f, score};
    const auto keep = [&](int side, int column, const uint2& what) {
      *reinterpret_cast<uint2*>(rows(a, f.layer, side) + static_cast<int64>(s.position) * kSlowDim + column) = what;
    };
    if (query_head() % 2 == 0 && lane < 4) keep(1, slice() * kSliceDim + part, x[2]);
    if (query_head() % 2 == 0 && slice() == 0)
      keep(0, lane * 4, {pack<T>(k[0].x * k_scale, k[0].y * k_scale), pack<T>(k[1].x * k_scale, k[1].y * k_scale)});
    sync_attending(past + 1);
  }

  // A lane has two elements, and every fourth of `parts`.
  __device__ __forceinline__ void merge(const Phase& f, int parts) {
    const int lane = this->lane(), part = lane % kWorkers;
    float2 known{0.0f, -infinity()}, y{0.0f, 0.0f};
    if (part < parts) known = s.whole.known[part];
    const float weight = exp2_of(known.y - from_ordered(largest(ordered(known.y))));
    const float inverse = inverse_of(warp_sum<kWorkers>(weight * known.x));
#pragma unroll
    for (int i = 0; i < kWorkers / 4; ++i) {
      const int from = i * 4 + lane / 8;
      const float by = __shfl_sync(kAllLanes, weight, from);
      if (from >= parts) continue;
      const float2 v = s.whole.sums[from][lane % 8];
      y = {fmaf(by, v.x, y.x), fmaf(by, v.y, y.y)};
    }
    y = {warp_sum<4, 8>(y.x) * inverse, warp_sum<4, 8>(y.y) * inverse};
    if (lane < 8)
      put_word(a.words + f.out + this->operand_order(Base::block() * (kSliceDim / 2) + lane), pack<T>(y.x, y.y));
  }
};

}  // namespace s1
