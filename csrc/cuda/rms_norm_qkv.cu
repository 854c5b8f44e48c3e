// rms_norm_qkv: out = weight @ (x / sqrt(mean(x^2) + eps) * norm_weight) + bias.
//
//   x [B, C], norm_weight [C], weight [O, C] with O = (H+2G)*D, bias [O] or null, out [B, O]; all T, contiguous.
// Grid/block of the tile kernel: O/16 blocks of 4 warps; a block owns 16 rows of the weight for all vectors and
//   computes the norm itself, so that nothing has to be passed from block to block.
// Memory: O*C weights once, bound by it: 8.4 MB in S1-mini's slow stack. x (2 KB) comes from L2 in every block.
// Numerics: the norm is not rounded (see Staged); sums in float32; one rounding.
// Requires (tile): 16-bit T, C a multiple of 32, pointers aligned to 16 bytes. The plain kernel takes anything.
#include "device/project.cuh"

namespace s1 {

struct RmsNormQkvArgs {
  const void* x;            // [B, C]
  const void* norm_weight;  // [C]
  const void* weight;       // [O, C]
  const void* bias;         // [O] or null
  void* out;                // [B, O]
  int rows;                 // B
  int dim;                  // C
  int out_dim;              // O
  int group;                // vectors that shared memory holds at once, 1 ... 8
  float eps;
};

template <class T>
__device__ __forceinline__ NormedInput<T> rms_norm_qkv_input(const RmsNormQkvArgs& a) {
  return {static_cast<const T*>(a.x), static_cast<const T*>(a.norm_weight), a.dim, a.rows, a.dim, a.group, a.eps};
}

template <class T>
__device__ __forceinline__ void rms_norm_qkv_put(const RmsNormQkvArgs& a, int b, int row, float y) {
  if (row >= a.out_dim) return;
  if (a.bias) y += to_float(static_cast<const T*>(a.bias)[row]);
  static_cast<T*>(a.out)[static_cast<int64>(b) * a.out_dim + row] = from_float<T>(y);
}

template <class T>
__device__ void rms_norm_qkv_tile(const RmsNormQkvArgs& a) {
  constexpr int kTiles = 2, kLoads = 8;
  const int first_row = static_cast<int>(blockIdx.x) * kTiles * kTileRows;
  const T* weight = static_cast<const T*>(a.weight);
  project_normed<T, kTiles, kLoads>(
      rms_norm_qkv_input<T>(a),
      [&](ProjectTiles<T, kTiles, kLoads>& tiles) {
        tiles.place(0, weight, first_row, a.out_dim, a.dim);
        tiles.place(1, weight, first_row + kTileRows, a.out_dim, a.dim);
      },
      [](int, int, const float*) {},
      [&](int b, int r, const float (&y)[kTiles]) {
        rms_norm_qkv_put<T>(a, b, first_row + r, y[0]);
        rms_norm_qkv_put<T>(a, b, first_row + kTileRows + r, y[1]);
      });
}

// A warp an output row, 8 rows a block.
template <class T>
__device__ void rms_norm_qkv_plain(const RmsNormQkvArgs& a) {
  const int row = static_cast<int>(blockIdx.x) * kPlainWarps + warp_id();
  const T* weights[] = {static_cast<const T*>(a.weight)};
  project_normed_plain(
      rms_norm_qkv_input<T>(a), weights, row, a.out_dim, [](int, float) {},
      [&](int b, const float (&y)[1]) { rms_norm_qkv_put<T>(a, b, row, y[0]); });
}

S1_KERNEL_HALVES(rms_norm_qkv_tile, RmsNormQkvArgs, 128, 4, rms_norm_qkv_tile)
S1_KERNEL(rms_norm_qkv_plain, RmsNormQkvArgs, 256, 2, rms_norm_qkv_plain)

}  // namespace s1
