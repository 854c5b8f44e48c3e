// Sums and maxima over a warp or a block, always in the same order, so that a result does not change from call to call.
#pragma once

#include "kernel.cuh"

namespace s1 {

constexpr int kWarp = 32;
constexpr uint32 kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

// Over `kLanes` neighbouring lanes (a power of two), `kStride` apart; every lane gets the result.
template <int kLanes = kWarp, int kStride = 1>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes * kStride / 2; offset >= kStride; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}
template <int kLanes = kWarp, int kStride = 1>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kLanes * kStride / 2; offset >= kStride; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// Over the block; every thread gets the result. `scratch` holds a float per warp. All threads call it.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();  // an earlier use of scratch has ended
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = 0.0f;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) x += scratch[w];
  return x;
}

}  // namespace s1
