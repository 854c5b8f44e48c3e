// The persistent frame kernel's attention: the slow stack's, its positions shared out among the blocks, and the fast
// stack's, by every block alike.
#pragma once

#include "frame_projections.cuh"
#include "matrices.cuh"

namespace s1 {

template <class T>
struct FrameAttention : FrameProjections<T> {
  using Base = FrameProjections<T>;
  using Base::a;
  using Base::before_polls;
  using Base::lane;
  using Base::s;
  using Base::thread;
  using Base::waiting;
  using Base::warp;

  static __device__ __forceinline__ int chunk_of(int length) {
    return ceil_div(ceil_div(length, kSplits), kChunkStep) * kChunkStep;
  }

  // This block's share of the positions of a slow head.
  struct Share {
    int head, split, length, chunk, begin, end;

    __device__ __forceinline__ explicit Share(int position) {
      const int block = Base::block();
      head = block / kSplits;
      split = block % kSplits;
      length = position + 1;
      chunk = chunk_of(length);
      begin = split * chunk;
      end = min(begin + chunk, length);
    }
    // Of the head's keys (side 0) or values (side 1) in a layer's cache.
    __device__ __forceinline__ T* rows(const PersistentFrameArgs& a, int layer, int side) const {
      return reinterpret_cast<T*>(a.caches[2 * layer + side]) + static_cast<int64>(head) * a.capacity * kSlowDim;
    }
  };

  // Starts to copy the keys and values that a layer will want, the frame's own but for. One thread.
  static __device__ __forceinline__ void copy_past(const PersistentFrameArgs& a, Shared<T>& s, int layer) {
    if (layer >= a.slow_layers) return;
    const Share mine(s.position);
    const int rows = max(0, min(min(mine.end, s.position) - mine.begin, kNear));
    const int bytes = rows * kSlowDim * static_cast<int>(sizeof(T));
    barrier_expect(&s.past_full, 2 * bytes);
    if (rows == 0) return;
    for (int side = 0; side < 2; ++side)
      bulk_copy(s.past[side], mine.rows(a, layer, side) + static_cast<int64>(mine.begin) * kSlowDim, bytes,
                &s.past_full);
  }

  // Slow attention, first half: this block has a sixteenth of the positions of one key/value head. The first kNear of
  // them have been copied to shared memory since the layer before.
  __device__ __forceinline__ void attend(const Phase& f) {
    constexpr int kHeadWarps = kWorkers / 2;  // of a query head
    using Part = Positions<T, kSlowDim, kHeadWarps, 2>;
    using Head = HeadLanes<kSlowDim>;
    static_assert(kNear % Part::kBlock == 0, "");
    const int warp = this->warp(), lane = this->lane(), here = s.position;
    const Share mine(here);
    const int g = mine.head, begin = mine.begin, length = mine.length;
    const bool last = here >= begin && here < begin + mine.chunk;
    Part p;
    p.k_row = mine.rows(a, f.layer, 0);
    p.v_row = mine.rows(a, f.layer, 1);
    p.end = mine.end;
    p.stored = min(p.end, here);
    p.load(begin + kNear);
    if (warp < 4 && begin < length && (warp < 2 || last)) {
      // A warp a vector: two query heads, the key, the value. A lane has four elements.
      const int heads = 2 * (kBlocks / kSplits), row = warp < 2 ? 2 * g + warp : heads + (warp - 2) * (heads / 2) + g;
      const T* weight = warp < 3 ? reinterpret_cast<const T*>(a.norms[2 * f.layer + (warp == 2)]) : nullptr;
      const T* angle = static_cast<const T*>(a.cos_sin) + static_cast<int64>(here) * kSlowDim + lane * 4;
      const uint2 turns = *reinterpret_cast<const uint2*>(angle);
      const uint2 weights = weight ? *reinterpret_cast<const uint2*>(weight + lane * 4) : uint2{0, 0};
      before_polls();
      uint2 word = waiting.take2(a.words + f.in + row * (kSlowDim / 2) + lane * 2);
      if (warp < 3) {
        float2 x = unpack<T>(word.x), y = unpack<T>(word.y);
        if (weight) {
          const float2 n = unpack<T>(weights.x), m = unpack<T>(weights.y);
          const float square = x.x * x.x + x.y * x.y + y.x * y.x + y.y * y.y;
          const float scale = rsqrtf(warp_sum(square) * (1.0f / kSlowDim) + a.eps);
          x = {x.x * (scale * n.x), x.y * (scale * n.y)};
          y = {y.x * (scale * m.x), y.y * (scale * m.y)};
        }
        const float2 first = unpack<T>(turns.x), second = unpack<T>(turns.y);  // cos, sin
        word.x = pack<T>(x.x * first.x - x.y * first.y, x.y * first.x + x.x * first.y);
        word.y = pack<T>(y.x * second.x - y.y * second.y, y.y * second.x + y.x * second.y);
      }
      if (warp < 2) {
        const float scale = rsqrtf(static_cast<float>(kSlowDim)) * kLog2e;
        const float2 x = unpack<T>(word.x), y = unpack<T>(word.y);
        reinterpret_cast<float4*>(s.query[warp])[lane] = {x.x * scale, x.y * scale, y.x * scale, y.y * scale};
      } else {
        reinterpret_cast<uint2*>(s.fresh[warp - 2])[lane] = word;
        T* to = (warp == 2 ? p.k_row : p.v_row) + static_cast<int64>(here) * kSlowDim + lane * 4;
        *reinterpret_cast<uint2*>(to) = word;
      }
    }
    sync_workers();
    barrier_wait(&s.past_full, f.layer % 2);
    if (begin < length) {
      float q[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) q[e] = s.query[warp / kHeadWarps][Head::column() + e];
      SoftmaxSum sum;
      sum.clear();
      const auto add = [&](int start, const Vec16(&k)[Part::kLoads], const Vec16(&v)[Part::kLoads]) {
        float score[Part::kLoads];
#pragma unroll
        for (int i = 0; i < Part::kLoads; ++i) {
          const float x = head_dot<T, kSlowDim>(q, k[i]);
          score[i] = p.of(start, i) < p.end ? x : -infinity();
        }
        sum.template add<T>(score, v);
      };
#pragma unroll 1
      for (int start = begin; start < min(p.end, begin + kNear); start += Part::kBlock) {
        Vec16 k[Part::kLoads], v[Part::kLoads];
#pragma unroll
        for (int i = 0; i < Part::kLoads; ++i) {
          const int at = p.of(start, i);
          k[i] = load_vec((at == here ? s.fresh[0] : s.past[0][at - begin]) + Head::column());
          v[i] = load_vec((at == here ? s.fresh[1] : s.past[1][at - begin]) + Head::column());
        }
        add(start, k, v);
      }
#pragma unroll 1
      for (int start = begin + kNear; start < p.end; start += Part::kBlock) {
#pragma unroll
        for (int i = 0; i < Part::kLoads; ++i) {
          if (p.of(start, i) != here) continue;
          p.k[i] = load_vec(s.fresh[0] + Head::column());
          p.v[i] = load_vec(s.fresh[1] + Head::column());
        }
        add(start, p.k, p.v);
        p.load(start + Part::kBlock);
      }
      sum.template merge_slots<Head::kLanes>();
      if (Head::slot() == 0) {
        float* to = s.merged[warp];
#pragma unroll
        for (int e = 0; e < 8; ++e) to[Head::column() + e] = sum.value[e];
        if (Head::column() == 0) {
          to[kSlowDim] = sum.total;
          to[kSlowDim + 1] = sum.top;
        }
      }
    }
    sync_workers();
    if (thread == kWorkers * 32 - 1) copy_past(a, s, f.layer + 1);
    if (begin >= length || thread >= 2 * kSlowDim) return;
    const int h = thread / kSlowDim, d = thread % kSlowDim;
    const auto& parts = *reinterpret_cast<const float (*)[kHeadWarps][kSlowDim + 2]>(s.merged[h * kHeadWarps]);
    float top = -infinity(), total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kHeadWarps; ++w) top = fmaxf(top, parts[w][kSlowDim + 1]);
#pragma unroll
    for (int w = 0; w < kHeadWarps; ++w) {
      const float weight = exp2f(parts[w][kSlowDim + 1] - top);
      total = fmaf(weight, parts[w][kSlowDim], total);
      value = fmaf(weight, parts[w][d], value);
    }
    uint32* to = a.parts + (static_cast<int>(blockIdx.x) * kPartWords + h * (kSlowDim + 2)) * 2;
    put_tagged(to + d * 2, value, tag(f));
    if (d != 0) return;
    put_tagged(to + kSlowDim * 2, total, tag(f));
    put_tagged(to + kSlowDim * 2 + 2, top, tag(f));
  }
  __device__ __forceinline__ uint32 tag(const Phase& f) const {
    return s.turn * static_cast<uint32>(a.slow_layers) + static_cast<uint32>(f.layer) + 1u;
  }

  // Second half: this block merges the parts of sixteen elements of one query head: two a lane of half a warp, whose
  // lanes have a part each.
  __device__ __forceinline__ void combine(const Phase& f) {
    if (warp() >= 4) return;
    const int g = blockIdx.x / kSplits, split = blockIdx.x % kSplits, h = split / 8;
    const int first = split % 8 * 16 + warp() * 4 + lane() / kSplits * 2, part = lane() % kSplits;
    const int length = s.position + 1;
    const int chunk = chunk_of(length);
    float low = 0.0f, high = 0.0f, total = 0.0f, top = -infinity();
    if (part * chunk < length) {
      const uint32* from = a.parts + ((g * kSplits + part) * kPartWords + h * (kSlowDim + 2)) * 2;
      before_polls();
      float2 x[2];
      waiting.take_tagged2s({from + first * 2, from + kSlowDim * 2}, tag(f), x);
      low = x[0].x, high = x[0].y, total = x[1].x, top = x[1].y;
    }
    __syncwarp();
    const float weight = exp2f(top - warp_max<kSplits>(top));
    total = warp_sum<kSplits>(weight * total);
    low = warp_sum<kSplits>(weight * low);
    high = warp_sum<kSplits>(weight * high);
    if (part == 0) put_word(a.words + f.out + ((2 * g + h) * kSlowDim + first) / 2, pack<T>(low / total, high / total));
  }

  // A projection back into the residual stream.
  __device__ __forceinline__ void output(const Phase& f, int half) {
    switch (f.slices) {
      case 1:
        return output<1>(f, half);
      case 2:
        return output<2>(f, half);
      default:
        return output<3>(f, half);
    }
  }

  template <int kSlices>
  __device__ __forceinline__ void output(const Phase& f, int half) {
    this->template project_residual<kSlices, false>(f, half, [&](Vec16(&x)[kSlices]) {
      const int vector = this->part_is_there(f) ? this->part_vector() : 0;
      const int column = (vector * kWidth + warp() * 64) * kSlices + this->part_column();
      before_polls();
      waiting.take4s(a.words + f.in + column / 2, 32, x);
    });
  }

  // Fast attention, by every block alike, and its projection: a warp's columns are a query head, so that it needs no
  // other's. While the inputs are on their way, the first layer draws the noise of the code that will come of them.
  __device__ __forceinline__ void fast_output(const Phase& f, int half) {
    if (f.layer == 0) draw_noise(f.position + f.vectors);
    this->template project_residual<1, false>(f, half, [&](Vec16(&x)[1]) {
      if (f.vectors == 2) {
        x[0] = fast_attention<2, 1>(f);
      } else {
        x[0] = f.position < 8 ? fast_attention<1, 1>(f) : fast_attention<1, 2>(f);
      }
    });
    keep_head(f);
  }

  // This lane's part of the result for this warp's query head, of up to kTiles * 8 positions. The warp takes the query
  // and the key and value that it shares with the next warp into s.heads. There and in s.cache, word j of a vector's
  // 16-byte piece i is word i % 4 of piece i / 4 * 4 + j, so that the result is an operand of the projection as it is;
  // and piece i lies where piece i ^ position % 8 would, so that eight positions are read without bank conflicts.
  // Operand rows g and g + 8 of all products belong to the vector and the columns that lane 4g has of the result.
  // Scores: rows g have the even pieces of the query, rows g + 8 the odd ones. Values: rows g have the high part of the
  // weights, rows g + 8 the low part; half of the inner indices are for the first 32 columns and half for the others,
  // with zeros for those that are not the row's.
  template <int kVectors, int kTiles>
  __device__ __forceinline__ Vec16 fast_attention(const Phase& f) {
    const float scale = rsqrtf(static_cast<float>(kFastDim)) * kLog2e;
    const uint32 lane = this->lane(), h = warp(), row = lane % 8, matrix = lane / 8, position = f.position;
    const uint32 vector = kVectors == 2 ? row / 4 : 0;
    const uint32 here = position + (kVectors == 2 ? this->part_vector() : 0);
    const uint32 heads = shared_address(s.heads[h]), kept = shared_address(s.cache[f.layer][0][0][h / 2]);
    const uint32 query_at = heads + vector * sizeof(s.heads[0][0]) + (matrix ^ (position + vector) % 8) * 16;
    uint32 key_at[kTiles], value_at[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32 place = min(i * 8 + row, position + kVectors - 1);
      const bool fresh = place >= position;
      const uint32 key = fresh ? heads + (place - position) * sizeof(s.heads[0][0]) + sizeof(s.heads[0][0][0])
                               : kept + place * sizeof(s.cache[0][0][0]);
      key_at[i] = key + ((matrix % 2 * 2 + matrix / 2) ^ place % 8) * 16;
      value_at[i] = key + (fresh ? sizeof(s.heads[0][0][0]) : sizeof(s.cache[0][0])) +
                    ((matrix % 2 * 4 + matrix / 2) ^ place % 8) * 16;
    }
    Vec16 x[kVectors];
    const uint32 kind = min(matrix, 2u), head = kind == 0 ? h : 8 + 8 * kind + h / 2;  // the last eight lanes repeat
    const uint32 to = heads + min(row / 2, 2u) * sizeof(s.heads[0][0][0]), piece = row % 2 * 4 + matrix;
    waiting.take4s(a.words + f.in + head * (kFastDim / 2) + row * 4, kFastQkvRows / 2, x);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kVectors; ++r)
      store_matrices(to + r * sizeof(s.heads[0][0]) + (piece ^ (position + r) % 8) * 16, x[r]);
    __syncwarp();
    const Vec16 query[2] = {load_matrices(query_at), load_matrices(query_at ^ 64)};
    Vec16 key[kTiles][2], value[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) key[i][j] = load_matrices(key_at[i] ^ (j * 64));
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) value[i][j] = load_transposed(value_at[i] ^ (j * 32));
    }
    float score[kTiles][2], top = -infinity();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float even[4] = {}, odd[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Vec16 &q = query[j], &k = key[i][j];
        Mma<T>::add(even, q.word[0], q.word[1], q.word[2], q.word[3], k.word[0], k.word[1]);
        Mma<T>::add(odd, q.word[0], q.word[1], q.word[2], q.word[3], k.word[2], k.word[3]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        score[i][e] = i * 8 + lane % 4 * 2 + e <= here ? even[e] + odd[2 + e] : -infinity();
        top = fmaxf(top, score[i][e]);
      }
    }
    top = warp_max<4>(top) * scale;
    const bool low = lane / 4 % 2 == 0;  // columns
    const uint32 ones = pack<T>(1.0f, 1.0f);
    float sum[4][4] = {}, total[4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float p = exp2_of(fmaf(score[i][0], scale, -top)), q = exp2_of(fmaf(score[i][1], scale, -top));
      const uint32 high = pack<T>(p, q);
      const float2 taken = unpack<T>(high);
      const uint32 rest = pack<T>(p - taken.x, q - taken.y);
      const uint32 w[4] = {low ? high : 0, low ? rest : 0, low ? 0 : high, low ? 0 : rest};
      Mma<T>::add(total, w[0], w[1], w[2], w[3], ones, ones);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vec16& v = value[i][j / 2];
        Mma<T>::add(sum[j], w[0], w[1], w[2], w[3], v.word[j % 2 * 2], v.word[j % 2 * 2 + 1]);
      }
    }
    const float inverse = inverse_of(total[0] + total[2]);
    Vec16 y;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      y.word[j] = pack<T>((sum[j][0] + sum[j][2]) * inverse, (sum[j][1] + sum[j][3]) * inverse);
    return y;
  }

  // Puts the new keys and values where later positions find them.
  __device__ __forceinline__ void keep_head(const Phase& f) {
    const int h = warp(), vector = lane() / 16, side = lane() / 8 % 2, column = lane() % 8 * 8;
    if (h % 2 == 0 || vector >= f.vectors) return;
    store_vec(&s.cache[f.layer][side][f.position + vector][h / 2][column],
              load_vec(&s.heads[h][vector][1 + side][column]));
  }

  // -log(noise) of a fast code's rows.
  __device__ __forceinline__ void draw_noise(int number) {
    const uint64 offset = static_cast<uint32>(a.fast_offset + (number - 2) * a.fast_step);
    const Gumbel noise{
        nullptr,
        nullptr,
        {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]) + offset, static_cast<uint32>(a.fast_threads)},
        false};
#pragma unroll 1
    for (int row = thread; row < 1024; row += kWorkers * 32) s.gumbel[row] = noise(row);
  }
};

}  // namespace s1
