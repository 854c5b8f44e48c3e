// The interleaved rotary embedding and the RMSNorm of a head, a pair of neighbouring elements at a time.
#pragma once

#include "convert.cuh"
#include "reduce.cuh"

namespace s1 {

// (a, b) turned by the angle of cosine c and sine s.
__device__ __forceinline__ float2 rotated(float2 pair, float2 cos_sin) {
  return {pair.x * cos_sin.x - pair.y * cos_sin.y, pair.y * cos_sin.x + pair.x * cos_sin.y};
}

template <class T>
__device__ __forceinline__ float2 load_pair(const T* at) {
  return {to_float(at[0]), to_float(at[1])};
}

// What a head of `dim` elements is multiplied by, beside its weight: 1 / sqrt(mean(x^2) + eps). By one warp.
template <class T>
__device__ __forceinline__ float head_norm_scale(const T* head, int dim, float eps) {
  float square = 0.0f;
  for (int i = lane_id(); i < dim; i += kWarp) square = fmaf(to_float(head[i]), to_float(head[i]), square);
  return rsqrtf(warp_sum(square) / static_cast<float>(dim) + eps);
}

// out = rotary(norm(head)), by one warp; without a weight there is no norm.
template <class T>
__device__ __forceinline__ void norm_rotate_head(T* out, const T* head, const T* weight, const T* cos_sin, int dim,
                                                 float eps) {
  const float scale = weight ? head_norm_scale(head, dim, eps) : 1.0f;
  for (int i = 2 * lane_id(); i < dim; i += 2 * kWarp) {
    float2 pair = load_pair(head + i);
    if (weight) {
      const float2 w = load_pair(weight + i);
      pair = {pair.x * scale * w.x, pair.y * scale * w.y};
    }
    const float2 turned = rotated(pair, load_pair(cos_sin + i));
    out[i] = from_float<T>(turned.x);
    out[i + 1] = from_float<T>(turned.y);
  }
}

}  // namespace s1
