// What the projection kernels have in common: a block loads its rows of the weights, waits for its inputs, stages the
// vectors and hands out the sums.
#pragma once

#include "gemv.cuh"

namespace s1 {

constexpr int kProjectWarps = 4;  // of a tile kernel's block: more would cost registers that the next kernel needs
constexpr int kPlainWarps = 8;    // of a plain kernel's block, each with an output row

template <class T, int kTiles, int kLoads>
using ProjectTiles = Tiles<T, kProjectWarps, kTiles, kLoads>;

// Vectors to be normalised and projected.
template <class T>
struct NormedInput {
  const T* x;            // [rows, dim], rows x_stride apart
  const T* norm_weight;  // [dim]
  int64 x_stride;
  int rows, dim;
  int group;  // vectors that shared memory holds at once, 1 ... 8
  float eps;
};

// Projects rms_norm(x) with kTiles tiles of 8 rows. place(tiles) says which rows; put(b, r, y) takes what row r of
// every tile gives for vector b, y[0 ... kTiles-1]; staged(b0, count, squares) runs when `squares` of x[b0 ...] is
// known.
template <class T, int kTiles, int kLoads, class Place, class Stage, class Put>
__device__ __forceinline__ void project_normed(const NormedInput<T>& in, Place place, Stage staged, Put put) {
  using Share = ProjectTiles<T, kTiles, kLoads>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[Share::kPartials];
  __shared__ float squares[kProjectWarps * kMaxVectors];
  launch_next();
  Share tiles;
  tiles.buffer = reinterpret_cast<Vec16*>(shared);
  place(tiles);
  tiles.load(0);
  const Vec16 first_weights = first_norm_weights<T, kProjectWarps, kLoads>(in.norm_weight, in.dim);
  wait_for_inputs();
  for (int b0 = 0; b0 < in.rows; b0 += in.group) {
    const Staged<T> x{reinterpret_cast<T*>(shared + Share::kBufferBytes), min(in.group, in.rows - b0),
                      staged_stride(in.dim), true};
    if (b0 > 0) {
      __syncthreads();  // the last vectors are done with
      if (tiles.chunks() > 1) tiles.load(0);
    }
    stage_normed<T, kProjectWarps, kLoads>(x, in.x + b0 * in.x_stride, in.x_stride, in.norm_weight, first_weights,
                                           in.dim, in.eps, squares);
    tiles.multiply_all(x);
    tiles.store(partial, x.count);
    __syncthreads();
    staged(b0, x.count, squares);
    for (int i = threadIdx.x; i < x.count * kTileRows; i += blockDim.x) {
      const int b = i / kTileRows, r = i % kTileRows;
      const float scale = pending_scale<T, kProjectWarps>(squares, b, in.dim, in.eps);
      float y[kTiles];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) y[j] = tiles.total(partial, j, b, r) * scale;
      put(b0 + b, r, y);
    }
  }
}

// The same for any dtype, size and alignment: a warp takes row `row` of kWeights matrices [.., dim], if row < out_dim.
// put(b, y) runs in its first lane; normed(b, scale) in all threads, with 1/rms of vector b.
template <class T, int kWeights, class Normed, class Put>
__device__ __forceinline__ void project_normed_plain(const NormedInput<T>& in, const T* const (&weights)[kWeights],
                                                     int row, int out_dim, Normed normed, Put put) {
  __shared__ float scratch[kPlainWarps];
  launch_next();
  wait_for_inputs();
  for (int b0 = 0; b0 < in.rows; b0 += kPlainVectors) {
    const int count = min(kPlainVectors, in.rows - b0);
    const T* x = in.x + b0 * in.x_stride;
    float scale[kPlainVectors], sum[kWeights][kPlainVectors];
#pragma unroll
    for (int b = 0; b < kPlainVectors; ++b) {
      if (b >= count) continue;
      scale[b] = plain_norm_scale(x + b * in.x_stride, in.dim, in.eps, scratch);
      normed(b0 + b, scale[b]);
    }
    if (row >= out_dim) continue;
#pragma unroll
    for (int j = 0; j < kWeights; ++j)
      plain_dot(weights[j] + static_cast<int64>(row) * in.dim, x, in.x_stride, in.norm_weight, count, in.dim, sum[j]);
    if (lane_id() != 0) continue;
#pragma unroll
    for (int b = 0; b < kPlainVectors; ++b) {
      if (b >= count) continue;
      float y[kWeights];
#pragma unroll
      for (int j = 0; j < kWeights; ++j) y[j] = sum[j][b] * scale[b];
      put(b0 + b, y);
    }
  }
}

}  // namespace s1
