// rms_norm_logits: logits = weight @ n and normed = n, with n = x / sqrt(mean(x^2) + eps) * norm_weight.
//
//   x [B, C] (rows x_stride apart), norm_weight [C], weight [V, C]: T. logits [B, V] float32, rows logits_stride apart.
//   normed [B, C] T, or null.
// Grid/block of the tile kernel: V/16 blocks of 4 warps that share the columns of 16 rows; all of a block's weights are
//   under way before it waits, and as many blocks are resident as keep memory busy.
// Memory: V*C weights once, bound by it: 319 MB for S1-mini's 155,776 rows, 2.1 MB for its fast head.
// Numerics: the logits come from the norm before it is rounded (see Staged); sums in float32, not rounded.
// Requires (tile): 16-bit T, C a multiple of 32, pointers aligned to 16 bytes. The plain kernel takes anything.
#include "device/project.cuh"

namespace s1 {

struct RmsNormLogitsArgs {
  const void* x;            // [B, C], rows x_stride apart
  const void* norm_weight;  // [C]
  const void* weight;       // [V, C]
  float* logits;            // [B, V], rows logits_stride apart
  void* normed;             // [B, C] or null
  int rows;                 // B
  int dim;                  // C
  int out_dim;              // V
  int group;                // vectors that shared memory holds at once, 1 ... 8
  int x_stride;
  int logits_stride;
  float eps;
};

template <class T>
__device__ __forceinline__ NormedInput<T> rms_norm_logits_input(const RmsNormLogitsArgs& a) {
  return {static_cast<const T*>(a.x), static_cast<const T*>(a.norm_weight), a.x_stride, a.rows, a.dim, a.group, a.eps};
}

// Block 0 writes `normed` for vector b, whose 1/rms is `scale`.
template <class T>
__device__ __forceinline__ void put_normed(const RmsNormLogitsArgs& a, int b, float scale) {
  if (!a.normed || blockIdx.x != 0) return;
  const T* x = static_cast<const T*>(a.x) + static_cast<int64>(b) * a.x_stride;
  T* out = static_cast<T*>(a.normed) + static_cast<int64>(b) * a.dim;
  for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
    out[k] = from_float<T>(to_float(x[k]) * scale * to_float(static_cast<const T*>(a.norm_weight)[k]));
}

__device__ __forceinline__ void put_logit(const RmsNormLogitsArgs& a, int b, int row, float y) {
  if (row < a.out_dim) a.logits[static_cast<int64>(b) * a.logits_stride + row] = y;
}

template <class T>
__device__ void rms_norm_logits_tile(const RmsNormLogitsArgs& a) {
  constexpr int kTiles = 2, kLoads = 8;
  const int first_row = static_cast<int>(blockIdx.x) * kTiles * kTileRows;
  const T* weight = static_cast<const T*>(a.weight);
  project_normed<T, kTiles, kLoads>(
      rms_norm_logits_input<T>(a),
      [&](ProjectTiles<T, kTiles, kLoads>& tiles) {
        tiles.place(0, weight, first_row, a.out_dim, a.dim);
        tiles.place(1, weight, first_row + kTileRows, a.out_dim, a.dim);
      },
      [&](int b0, int count, const float* squares) {
        for (int b = 0; b < count; ++b) put_normed<T>(a, b0 + b, norm_scale<kProjectWarps>(squares, b, a.dim, a.eps));
      },
      [&](int b, int r, const float (&y)[kTiles]) {
        put_logit(a, b, first_row + r, y[0]);
        put_logit(a, b, first_row + kTileRows + r, y[1]);
      });
}

// A warp an output row, 8 rows a block.
template <class T>
__device__ void rms_norm_logits_plain(const RmsNormLogitsArgs& a) {
  const int row = static_cast<int>(blockIdx.x) * kPlainWarps + warp_id();
  const T* weights[] = {static_cast<const T*>(a.weight)};
  project_normed_plain(
      rms_norm_logits_input<T>(a), weights, row, a.out_dim, [&](int b, float scale) { put_normed<T>(a, b, scale); },
      [&](int b, const float (&y)[1]) { put_logit(a, b, row, y[0]); });
}

S1_KERNEL_HALVES(rms_norm_logits_tile, RmsNormLogitsArgs, 128, 4, rms_norm_logits_tile)
S1_KERNEL(rms_norm_logits_plain, RmsNormLogitsArgs, 256, 2, rms_norm_logits_plain)

}  // namespace s1
