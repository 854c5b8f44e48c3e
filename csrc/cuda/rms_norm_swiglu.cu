// rms_norm_swiglu: out = silu(w1 @ n) * (w3 @ n) with n = x / sqrt(mean(x^2) + eps) * norm_weight.
//
//   x [B, C], norm_weight [C], w1 and w3 [F, C], out [B, F]; all T, contiguous.
// Grid/block of the tile kernel: F/8 blocks of 4 warps; a block owns 8 rows of w1 and the same 8 of w3, so that gate
//   and up meet in it, and computes the norm itself.
// Memory: 2*F*C weights once, bound by it: 12.6 MB in S1-mini.
// Numerics: neither the norm nor the projections are rounded (see Staged); sums in float32; one rounding.
// Requires (tile): 16-bit T, C a multiple of 32, pointers aligned to 16 bytes. The plain kernel takes anything.
#include "device/project.cuh"

namespace s1 {

struct RmsNormSwigluArgs {
  const void* x;            // [B, C]
  const void* norm_weight;  // [C]
  const void* w1;           // [F, C]
  const void* w3;           // [F, C]
  void* out;                // [B, F]
  int rows;                 // B
  int dim;                  // C
  int out_dim;              // F
  int group;                // vectors that shared memory holds at once, 1 ... 8
  float eps;
};

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

template <class T>
__device__ __forceinline__ NormedInput<T> rms_norm_swiglu_input(const RmsNormSwigluArgs& a) {
  return {static_cast<const T*>(a.x), static_cast<const T*>(a.norm_weight), a.dim, a.rows, a.dim, a.group, a.eps};
}

template <class T>
__device__ __forceinline__ void rms_norm_swiglu_put(const RmsNormSwigluArgs& a, int b, int row, const float (&y)[2]) {
  if (row < a.out_dim)
    static_cast<T*>(a.out)[static_cast<int64>(b) * a.out_dim + row] = from_float<T>(swiglu(y[0], y[1]));
}

template <class T>
__device__ void rms_norm_swiglu_tile(const RmsNormSwigluArgs& a) {
  constexpr int kTiles = 2, kLoads = 8;
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows;
  project_normed<T, kTiles, kLoads>(
      rms_norm_swiglu_input<T>(a),
      [&](ProjectTiles<T, kTiles, kLoads>& tiles) {
        tiles.place(0, static_cast<const T*>(a.w1), first_row, a.out_dim, a.dim);
        tiles.place(1, static_cast<const T*>(a.w3), first_row, a.out_dim, a.dim);
      },
      [](int, int, const float*) {},
      [&](int b, int r, const float (&y)[kTiles]) { rms_norm_swiglu_put<T>(a, b, first_row + r, y); });
}

// A warp an output row, 8 rows a block.
template <class T>
__device__ void rms_norm_swiglu_plain(const RmsNormSwigluArgs& a) {
  const int row = static_cast<int>(blockIdx.x) * kPlainWarps + warp_id();
  const T* weights[] = {static_cast<const T*>(a.w1), static_cast<const T*>(a.w3)};
  project_normed_plain(
      rms_norm_swiglu_input<T>(a), weights, row, a.out_dim, [](int, float) {},
      [&](int b, const float (&y)[2]) { rms_norm_swiglu_put<T>(a, b, row, y); });
}

S1_KERNEL_HALVES(rms_norm_swiglu_tile, RmsNormSwigluArgs, 128, 4, rms_norm_swiglu_tile)
S1_KERNEL(rms_norm_swiglu_plain, RmsNormSwigluArgs, 256, 2, rms_norm_swiglu_plain)

}  // namespace s1
