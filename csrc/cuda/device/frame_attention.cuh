// The persistent frame kernel's attention: the slow stack's, its positions shared out among the blocks, and the fast
// stack's, by every block alike.
#pragma once

#include "frame_projections.cuh"

namespace s1 {

template <class T>
struct FrameAttention : FrameProjections<T> {
  using Base = FrameProjections<T>;
  using Base::a;
  using Base::position;
  using Base::project;
  using Base::s;
  using Base::stage_words;
  using Base::turn;
  using Base::waiting;

  // Slow attention, first half: this block has a sixteenth of the positions of one key/value head.
  __device__ __forceinline__ void attend(const Phase& f) {
    using Part = Positions<T, kSlowDim, 8, 2>;
    using Head = HeadLanes<kSlowDim>;
    const int g = blockIdx.x / kSplits, split = blockIdx.x % kSplits, warp = warp_id(), lane = lane_id();
    const int here = position, length = here + 1;
    const int chunk = ceil_div(ceil_div(length, kSplits), Part::kStep) * Part::kStep, begin = split * chunk;
    const bool last = here >= begin && here < begin + chunk;
    const int64 cache = static_cast<int64>(g) * a.capacity * kSlowDim;
    Part p;
    p.k_row = reinterpret_cast<T*>(a.caches[2 * f.layer]) + cache;
    p.v_row = reinterpret_cast<T*>(a.caches[2 * f.layer + 1]) + cache;
    p.end = min(begin + chunk, length);
    p.stored = min(p.end, here);
    if (warp < 8) p.load(begin);
    if (warp < 4 && begin < length && (warp < 2 || last)) {
      // A warp a vector: two query heads, the key, the value. A lane has four elements.
      const int heads = 2 * (kBlocks / kSplits), row = warp < 2 ? 2 * g + warp : heads + (warp - 2) * (heads / 2) + g;
      const T* weight = warp < 3 ? reinterpret_cast<const T*>(a.norms[2 * f.layer + (warp == 2)]) : nullptr;
      const T* angle = static_cast<const T*>(a.cos_sin) + static_cast<int64>(here) * kSlowDim + lane * 4;
      const uint2 turns = *reinterpret_cast<const uint2*>(angle);
      const uint2 weights = weight ? *reinterpret_cast<const uint2*>(weight + lane * 4) : uint2{0, 0};
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
    if (begin < length && warp < 8) {
      float q[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int e = 0; e < 8; ++e) q[h][e] = s.query[h][Head::column() + e];
      SoftmaxSum sums[2];
      sums[0].clear();
      sums[1].clear();
      for (int start = begin; start < p.end; start += Part::kBlock) {
        float score[2][Part::kLoads];
#pragma unroll
        for (int i = 0; i < Part::kLoads; ++i) {
          if (p.of(start, i) == here) {
            p.k[i] = load_vec(s.fresh[0] + Head::column());
            p.v[i] = load_vec(s.fresh[1] + Head::column());
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = head_dot<T, kSlowDim>(q[h], p.k[i]);
            score[h][i] = p.of(start, i) < p.end ? x : -infinity();
          }
        }
        sums[0].template add<T>(score[0], p.v);
        sums[1].template add<T>(score[1], p.v);
        p.load(start + Part::kBlock);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[h].template merge_slots<Head::kLanes>();
        if (Head::slot() != 0) continue;
        float* to = s.merged[warp][h];
#pragma unroll
        for (int e = 0; e < 8; ++e) to[Head::column() + e] = sums[h].value[e];
        if (Head::column() == 0) {
          to[kSlowDim] = sums[h].total;
          to[kSlowDim + 1] = sums[h].top;
        }
      }
    }
    sync_workers();
    const int i = threadIdx.x;
    if (begin >= length || i >= 2 * kSlowDim) return;
    const int h = i / kSlowDim, d = i % kSlowDim;
    float top = -infinity(), total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; ++w) top = fmaxf(top, s.merged[w][h][kSlowDim + 1]);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
      const float weight = exp2f(s.merged[w][h][kSlowDim + 1] - top);
      total = fmaf(weight, s.merged[w][h][kSlowDim], total);
      value = fmaf(weight, s.merged[w][h][d], value);
    }
    uint32* to = a.parts + (static_cast<int>(blockIdx.x) * kPartWords + h * (kSlowDim + 2)) * 2;
    put_tagged(to + d * 2, value, tag(f));
    if (d != 0) return;
    put_tagged(to + kSlowDim * 2, total, tag(f));
    put_tagged(to + kSlowDim * 2 + 2, top, tag(f));
  }
  __device__ __forceinline__ uint32 tag(const Phase& f) const {
    return turn * static_cast<uint32>(a.slow_layers) + static_cast<uint32>(f.layer) + 1u;
  }

  // Second half: this block merges the parts of sixteen elements of one query head.
  __device__ __forceinline__ void combine(const Phase& f) {
    const int g = blockIdx.x / kSplits, split = blockIdx.x % kSplits, h = split / 8, first = split % 8 * 16;
    const int length = position + 1;
    const int chunk = ceil_div(ceil_div(length, kSplits), 16) * 16, used = ceil_div(length, chunk);
    const int part = threadIdx.x / 18, item = threadIdx.x % 18;
    if (part < used) {
      const int at = item < 16 ? first + item : kSlowDim + item - 16;
      const uint32* from = a.parts + ((g * kSplits + part) * kPartWords + h * (kSlowDim + 2) + at) * 2;
      s.part[part][item] = waiting.take_tagged(from, tag(f));
    }
    sync_workers();
    if (threadIdx.x >= 8) return;
    float top = -infinity(), total = 0.0f, low = 0.0f, high = 0.0f;
    for (int k = 0; k < used; ++k) top = fmaxf(top, s.part[k][17]);
    for (int k = 0; k < used; ++k) {
      const float weight = exp2f(s.part[k][17] - top);
      total = fmaf(weight, s.part[k][16], total);
      low = fmaf(weight, s.part[k][2 * threadIdx.x], low);
      high = fmaf(weight, s.part[k][2 * threadIdx.x + 1], high);
    }
    put_word(a.words + f.out + (2 * g + h) * (kSlowDim / 2) + first / 2 + threadIdx.x,
             pack<T>(low / total, high / total));
  }

  // A fast head's vector at a position, rotated: eight elements in each of the slot's lanes.
  __device__ __forceinline__ Vec16 rotated(const T* x, int position) const {
    const int column = HeadLanes<kFastDim>::column();
    return norm_rotary<T, kFastDim>(load_vec(x + column), false, Vec16{}, load_vec(&s.angles[position][column]), a.eps);
  }

  // Fast attention, by every block alike, and its projection.
  __device__ __forceinline__ void fast_output(const Phase& f, int half) {
    using Head = HeadLanes<kFastDim>;
    constexpr int kSteps = kPlaces / Head::kSlots, kRow = 32 * kFastDim;  // of qkv
    stage_words(f, half, kRow / 2);
    sync_workers();
    const T* qkv = reinterpret_cast<const T*>(s.stage[half]);
    T* attended = reinterpret_cast<T*>(s.stage[half] + 8 * 1024);
    const int g = warp_id(), column = Head::column(), length = f.position + f.vectors;
    if (g < 8) {
      for (int r = 0; r < f.vectors; ++r) {
        const int here = f.position + r;
        const float scale = rsqrtf(static_cast<float>(kFastDim)) * kLog2e;
        float q[2][8], score[2][kSteps];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          unpack8<T>(rotated(qkv + r * kRow + (2 * g + h) * kFastDim, here), q[h]);
#pragma unroll
          for (int e = 0; e < 8; ++e) q[h][e] *= scale;
        }
        Vec16 v[kSteps];
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          score[0][i] = score[1][i] = -infinity();
          if (i * Head::kSlots > here) continue;  // the same in the whole warp
          const int p = i * Head::kSlots + Head::slot();
          Vec16 k{};
          if (p < f.position) {
            k = load_vec(&s.cache[f.layer][0][p][g][column]);
            v[i] = load_vec(&s.cache[f.layer][1][p][g][column]);
          } else if (p < length) {
            const T* row = qkv + (p - f.position) * kRow;
            k = rotated(row + (16 + g) * kFastDim, p);
            v[i] = load_vec(row + (24 + g) * kFastDim + column);
            if (r == 0) {
              store_vec(&s.cache[f.layer][0][p][g][column], k);
              store_vec(&s.cache[f.layer][1][p][g][column], v[i]);
            }
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float x = head_dot<T, kFastDim>(q[h], k);
            if (p <= here) score[h][i] = x;
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float value[8];
          SoftmaxSum sum;
          sum.clear();
          sum.template add<T>(score[h], v);
          sum.merge_slots<Head::kLanes>();
          const float inverse = 1.0f / sum.total;
#pragma unroll
          for (int e = 0; e < 8; ++e) value[e] = sum.value[e] * inverse;
          if (Head::slot() == 0) store_vec(attended + r * kWidth + (2 * g + h) * kFastDim + column, pack8<T>(value));
        }
      }
    }
    sync_workers();
    project(f, half, reinterpret_cast<const unsigned char*>(attended), kWidth * 2);
  }
};

}  // namespace s1
