// linear_residual: out = weight @ x + bias + residual.
//
//   x [B, J], weight [C, J], bias [C] or null, residual [B, C] or null, out [B, C], which may be residual; all T.
// Grid/block of the tile kernels: C/8 blocks of 4 warps; a block owns 8 rows of the weight for all vectors. 8, 16 or 24
//   slices a warp at a time: the least that holds a whole row, so that all weights are under way before the block
//   waits (J = 1024, 2048, 3072 in S1-mini). Longer rows come in chunks.
// Memory: C*J weights once, bound by it: 4.2 MB for S1-mini's slow wo, 6.3 MB for w2.
// Numerics: x is exact in T; sums in float32; bias and residual are added before the one rounding.
// Requires (tile): 16-bit T, J a multiple of 32, pointers aligned to 16 bytes. The plain kernel takes anything.
#include "device/project.cuh"

namespace s1 {

struct LinearResidualArgs {
  const void* x;         // [B, J]
  const void* weight;    // [C, J]
  const void* bias;      // [C] or null
  const void* residual;  // [B, C] or null
  void* out;             // [B, C]
  int rows;              // B
  int dim;               // J
  int out_dim;           // C
  int group;             // vectors that shared memory holds at once, 1 ... 8
};

template <class T>
__device__ __forceinline__ void linear_residual_put(const LinearResidualArgs& a, int b, int row, float y) {
  const int64 at = static_cast<int64>(b) * a.out_dim + row;
  if (a.bias) y += to_float(static_cast<const T*>(a.bias)[row]);
  if (a.residual) y += to_float(static_cast<const T*>(a.residual)[at]);
  static_cast<T*>(a.out)[at] = from_float<T>(y);
}

template <class T, int kLoads>
__device__ __forceinline__ void linear_residual_tile(const LinearResidualArgs& a) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[ProjectTiles<T, 1, kLoads>::kPartials];
  launch_next();
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
  ProjectTiles<T, 1, kLoads> tiles;
  tiles.buffer = reinterpret_cast<Vec16*>(shared);
  tiles.place(0, static_cast<const T*>(a.weight), first_row, a.out_dim, a.dim);
  tiles.load(0);
  wait_for_inputs();
  for (int b0 = 0; b0 < a.rows; b0 += a.group) {
    const Staged<T> x{reinterpret_cast<T*>(shared + tiles.kBufferBytes), min(a.group, a.rows - b0),
                      staged_stride(a.dim), false};
    if (b0 > 0) {
      __syncthreads();  // the last vectors are done with
      if (tiles.chunks() > 1) tiles.load(0);
    }
    stage<T, kProjectWarps, kLoads>(x, static_cast<const T*>(a.x) + static_cast<int64>(b0) * a.dim, a.dim);
    tiles.multiply_all(x);
    tiles.store(partial, x.count);
    __syncthreads();
    for (int i = threadIdx.x; i < x.count * kTileRows; i += blockDim.x) {
      const int b = i / kTileRows, r = i % kTileRows;
      if (first_row + r < a.out_dim) linear_residual_put<T>(a, b0 + b, first_row + r, tiles.total(partial, 0, b, r));
    }
  }
}
template <class T>
__device__ void linear_residual_tile8(const LinearResidualArgs& a) {
  linear_residual_tile<T, 8>(a);
}
template <class T>
__device__ void linear_residual_tile16(const LinearResidualArgs& a) {
  linear_residual_tile<T, 16>(a);
}
template <class T>
__device__ void linear_residual_tile24(const LinearResidualArgs& a) {
  linear_residual_tile<T, 24>(a);
}

// A warp an output row, 8 rows a block.
template <class T>
__device__ void linear_residual_plain(const LinearResidualArgs& a) {
  launch_next();
  wait_for_inputs();
  const int row = static_cast<int>(blockIdx.x) * kPlainWarps + warp_id();
  if (row >= a.out_dim) return;
  for (int b0 = 0; b0 < a.rows; b0 += kPlainVectors) {
    const int count = min(kPlainVectors, a.rows - b0);
    float sum[kPlainVectors];
    plain_dot<T>(static_cast<const T*>(a.weight) + static_cast<int64>(row) * a.dim,
                 static_cast<const T*>(a.x) + static_cast<int64>(b0) * a.dim, a.dim, nullptr, count, a.dim, sum);
    if (lane_id() != 0) continue;
#pragma unroll
    for (int b = 0; b < kPlainVectors; ++b)
      if (b < count) linear_residual_put<T>(a, b0 + b, row, sum[b]);
  }
}

S1_KERNEL_HALVES(linear_residual_tile8, LinearResidualArgs, 128, 4, linear_residual_tile8)
S1_KERNEL_HALVES(linear_residual_tile16, LinearResidualArgs, 128, 4, linear_residual_tile16)
S1_KERNEL_HALVES(linear_residual_tile24, LinearResidualArgs, 128, 3, linear_residual_tile24)
S1_KERNEL(linear_residual_plain, LinearResidualArgs, 256, 2, linear_residual_plain)

}  // namespace s1
