// What the attention kernels share: a few lanes hold one head's vector, eight elements each.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace s1 {

constexpr float kLog2e = 1.4426950408889634f;

// 2^x, or 0 if that is below the normal numbers.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x), 1/sqrt(x) and 1/x, of a normal number.
__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt_of(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// kLanes neighbouring lanes hold a head of kDim elements; a warp holds kSlots such vectors side by side.
template <int kDim>
struct HeadLanes {
  static constexpr int kLanes = kDim / 8;
  static constexpr int kSlots = kWarp / kLanes;
  static __device__ __forceinline__ int slot() { return lane_id() / kLanes; }
  static __device__ __forceinline__ int column() { return lane_id() % kLanes * 8; }
};

// rotary(norm(x)) of the head that the lanes hold, rounded to T. `norm` has the lane's eight norm weights, if
// `normalize`; `angles` its four (cos, sin) pairs. All lanes of the warp call it.
template <class T, int kDim>
__device__ __forceinline__ Vec16 norm_rotary(const Vec16& x, bool normalize, const Vec16& norm, const Vec16& angles,
                                             float eps) {
  float v[8], a[8], y[8];
  unpack8<T>(x, v);
  unpack8<T>(angles, a);
  if (normalize) {
    float n[8], square = 0.0f;
    unpack8<T>(norm, n);
#pragma unroll
    for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
    const float scale = rsqrtf(warp_sum<HeadLanes<kDim>::kLanes>(square) / static_cast<float>(kDim) + eps);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] *= scale * n[e];
  }
#pragma unroll
  for (int e = 0; e < 8; e += 2) {
    y[e] = v[e] * a[e] - v[e + 1] * a[e + 1];
    y[e + 1] = v[e + 1] * a[e] + v[e] * a[e + 1];
  }
  return pack8<T>(y);
}

// q . k over the head, in every one of its lanes.
template <class T, int kDim>
__device__ __forceinline__ float head_dot(const float (&q)[8], const Vec16& k) {
  float v[8], sum = 0.0f;
  unpack8<T>(k, v);
#pragma unroll
  for (int e = 0; e < 8; ++e) sum = fmaf(q[e], v[e], sum);
  return warp_sum<HeadLanes<kDim>::kLanes>(sum);
}

// A block's part of the positions of one head, read by kWarps warps, and the kLoads positions that a lane has loaded.
template <class T, int kDim, int kWarps, int kDepth>
struct Positions {
  using Head = HeadLanes<kDim>;
  static constexpr int kStep = kWarps * Head::kSlots;  // positions that the warps read with one load a lane
  static constexpr int kLoads = kDepth;
  static constexpr int kBlock = kLoads * kStep;

  T* k_row;
  T* v_row;
  int end, stored;  // positions before `stored` are in the cache
  Vec16 k[kLoads], v[kLoads];

  static __device__ __forceinline__ int of(int start, int i) {
    return start + i * kStep + warp_id() % kWarps * Head::kSlots + Head::slot();
  }
  __device__ __forceinline__ void load(int start) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64 at = static_cast<int64>(of(start, i)) * kDim + Head::column();
      if (of(start, i) >= stored) continue;
      k[i] = load_vec(k_row + at);
      v[i] = load_vec(v_row + at);
    }
  }
};

// Softmax-weighted sum in the making: weights are 2^(score - top), total their sum.
struct SoftmaxSum {
  float top, total, value[8];

  __device__ __forceinline__ void clear() {
    top = -infinity();
    total = 0.0f;
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = 0.0f;
  }
  // Adds kCount scores (in units of log 2; -infinity adds nothing) with their vectors v.
  template <class T, int kCount>
  __device__ __forceinline__ void add(const float (&score)[kCount], const Vec16 (&v)[kCount]) {
    float higher = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) higher = fmaxf(higher, score[i]);
    if (higher == -infinity()) return;
    const float keep = exp2f(top - higher);
    total *= keep;
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] *= keep;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (score[i] == -infinity()) continue;  // v may be anything
      const float weight = exp2f(score[i] - higher);
      float x[8];
      unpack8<T>(v[i], x);
      total += weight;
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = fmaf(weight, x[e], value[e]);
    }
    top = higher;
  }
  // Merges the sums of the warp's slots, kLanes lanes apart; every slot gets the result.
  template <int kLanes>
  __device__ __forceinline__ void merge_slots() {
    const float higher = warp_max<kWarp / kLanes, kLanes>(top);
    const float keep = higher == -infinity() ? 0.0f : exp2f(top - higher);
    total = warp_sum<kWarp / kLanes, kLanes>(total * keep);
#pragma unroll
    for (int e = 0; e < 8; ++e) value[e] = warp_sum<kWarp / kLanes, kLanes>(value[e] * keep);
    top = higher;
  }
};

}  // namespace s1
