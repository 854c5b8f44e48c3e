// rms_norm_logits: logits = weight @ n and normed = n, with n = x / sqrt(mean(x^2) + eps) * norm_weight.
//
//   x [B, C] (rows x_stride apart), norm_weight [C], weight [V, C]: T. logits [B, V] float32, rows logits_stride apart.
//   normed [B, C] T, or null.
// Grid/block: `tile`, for heads of a few thousand rows (the fast head, the rows that can be sampled): V/16 blocks of 4
//   warps that share the columns of 16 rows, all weights under way before the block waits. `stream`, for the whole
//   vocabulary: 2 blocks an SM, and each warp goes through tiles of 8 rows of its own, the next 4 KB under way while it
//   multiplies the last; no barrier between tiles.
// Memory: V*C weights once, bound by it: 319 MB for S1-mini's 155,776 rows, 2.1 MB for its fast head.
// Numerics: the logits come from the norm before it is rounded (see Staged); sums in float32, not rounded.
// Requires (tile, stream): 16-bit T, C a multiple of 32, pointers aligned to 16 bytes. `plain` takes anything.
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

constexpr int kStreamWarps = 8;

// A warp's way through the head: tiles `first`, first + step, ..., each in steps of 8 slices (4 KB).
template <class T>
struct HeadStream {
  static constexpr int kLoads = 8;
  const T* weight;
  int dim, rows, steps;  // steps in a tile
  Vec16 ahead[kLoads];

  __device__ __forceinline__ void load(int tile, int step) {
    const int row = min(tile * kTileRows + lane_id() / 4, rows - 1);
    const T* at = weight + static_cast<int64>(row) * dim + lane_id() % 4 * 8;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if ((step * kLoads + i) * kSlice < dim) ahead[i] = load_weight(at + (step * kLoads + i) * kSlice);
  }
};

template <class T>
__device__ void rms_norm_logits_stream(const RmsNormLogitsArgs& a) {
  using Head = HeadStream<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float squares[kStreamWarps * kMaxVectors];
  launch_next();
  const NormedInput<T> in = rms_norm_logits_input<T>(a);
  const int tiles = ceil_div(a.out_dim, kTileRows), stride = static_cast<int>(gridDim.x) * kStreamWarps;
  const int first = warp_id() * static_cast<int>(gridDim.x) + static_cast<int>(blockIdx.x);
  Head head{static_cast<const T*>(a.weight), a.dim, a.out_dim, ceil_div(a.dim, Head::kLoads * kSlice)};
  if (first < tiles) head.load(first, 0);
  const Vec16 first_weights = first_norm_weights<T, kStreamWarps, 1>(in.norm_weight, a.dim);
  wait_for_inputs();
  for (int b0 = 0; b0 < a.rows; b0 += a.group) {
    const Staged<T> x{reinterpret_cast<T*>(shared), min(a.group, a.rows - b0), staged_stride(a.dim), true};
    if (b0 > 0) {
      __syncthreads();  // the last vectors are done with
      if (first < tiles) head.load(first, 0);
    }
    stage_normed<T, kStreamWarps, 1>(x, in.x + b0 * in.x_stride, in.x_stride, in.norm_weight, first_weights, a.dim,
                                     a.eps, squares);
    __syncthreads();
    for (int b = 0; b < x.count; ++b) put_normed<T>(a, b0 + b, norm_scale<kStreamWarps>(squares, b, a.dim, a.eps));
    const int vector = lane_id() / 4, pair = lane_id() % 4 * 2;
    const float scale = vector < x.count ? pending_scale<T, kStreamWarps>(squares, vector, a.dim, a.eps) : 0.0f;
    for (int tile = first; tile < tiles; tile += stride) {
      float sum[2][4] = {};
      for (int step = 0; step < head.steps; ++step) {
        Vec16 w[Head::kLoads];
#pragma unroll
        for (int i = 0; i < Head::kLoads; ++i) w[i] = head.ahead[i];
        const bool last = step + 1 == head.steps;
        if (!last || tile + stride < tiles) head.load(last ? tile + stride : tile, last ? 0 : step + 1);
#pragma unroll
        for (int i = 0; i < Head::kLoads; ++i) {
          const int at = (step * Head::kLoads + i) * kSlice;
          if (at >= a.dim) break;
          add_slice<T>(sum, x, at, w[i]);
        }
      }
      if (vector >= x.count) continue;
      put_logit(a, b0 + vector, tile * kTileRows + pair, sum_of_chains(sum, 0) * scale);
      put_logit(a, b0 + vector, tile * kTileRows + pair + 1, sum_of_chains(sum, 1) * scale);
    }
  }
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
S1_KERNEL_HALVES(rms_norm_logits_stream, RmsNormLogitsArgs, 256, 2, rms_norm_logits_stream)
S1_KERNEL(rms_norm_logits_plain, RmsNormLogitsArgs, 256, 2, rms_norm_logits_plain)

}  // namespace s1
