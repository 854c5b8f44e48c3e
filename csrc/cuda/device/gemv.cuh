// Matrix-vector products y = W @ x for up to 8 vectors x at a time, the core of every projection.
//
// Two ways. `Tiles` is the fast one: 16-bit weights on tensor cores, 16-byte loads, all of a block's weights (or its
// first chunk) under way to shared memory before the block waits for its inputs. `plain_dot` takes any dtype, size and
// alignment.
//
// Mapping of Tiles: a tile is 8 rows of W. In a warp, lane 4g + t loads 16 bytes (8 columns) of the tile's row g, so a
// load covers a slice of 32 columns; the block's warps take slices in turn and add their sums up at the end. A lane
// reads only weights that it has copied itself, and a warp only columns of x that it has staged itself, so that the one
// barrier is that before the sums. The weights are the mma's 16 x 8 operand. The other one holds x: rows 0 to 7 are the
// high parts of 8 vectors (x rounded to T), rows 8 to 15 what that left (x - high, rounded to T), so that a normalised
// x keeps 16 bits or more. Why shared memory: held in registers, the weights left the next kernel's blocks no room on
// the SM, and programmatic dependent launch gained nothing (S1-mini's frame on an H200: 1.65 ms with it, 1.71 without).
// Numerics: products exact, sums in float32.
#pragma once

#include "mma.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace s1 {

constexpr int kTileRows = 8;    // rows of W in a tile
constexpr int kSlice = 32;      // columns that a warp's load covers
constexpr int kMaxVectors = 8;  // vectors x that one pass takes

// Vectors in shared memory, as the mma's operand: high parts [count, stride], then low parts if `split`.
template <class T>
struct Staged {
  T* at;       // shared memory
  int count;   // 1 ... kMaxVectors
  int stride;  // elements from a vector to the next
  bool split;

  __device__ __forceinline__ T* high(int vector) const { return at + vector * stride; }
  __device__ __forceinline__ T* low(int vector) const { return at + (count + vector) * stride; }

  // 16 bytes of operand row `vector`, high or low part, zero beyond the vectors that there are.
  __device__ __forceinline__ Vec16 load(bool lower, int vector, int column) const {
    if (vector >= count || (lower && !split)) return {};
    return load_vec((lower ? low(vector) : high(vector)) + column);
  }
};

// Eight vectors are read at once: a stride of an odd number of 64 bytes keeps them out of each other's banks.
__device__ __forceinline__ int staged_stride(int dim) { return dim % 64 == 0 ? dim + 32 : dim; }

// sum[chain] += a slice of 32 columns, from `column` on, of x times this lane's 8 of those columns of a tile's row. Two
// chains, so that an mma need not wait for the last one.
template <class T>
__device__ __forceinline__ void add_slice(float (&sum)[2][4], const Staged<T>& x, int column, const Vec16& w) {
  const int vector = lane_id() / 4, at = column + lane_id() % 4 * 8;
  const Vec16 a = x.load(false, vector, at), b = x.load(true, vector, at);
  Mma<T>::add(sum[0], a.word[0], b.word[0], a.word[1], b.word[1], w.word[0], w.word[1]);
  Mma<T>::add(sum[1], a.word[2], b.word[2], a.word[3], b.word[3], w.word[2], w.word[3]);
}

// This lane's result: vector lane / 4, tile row lane % 4 * 2 + c.
__device__ __forceinline__ float sum_of_chains(const float (&sum)[2][4], int c) {
  return (sum[0][c] + sum[1][c]) + (sum[0][2 + c] + sum[1][2 + c]);
}

// A block's share of W: kTiles tiles, kLoads slices of them at a time for each warp, in `buffer`.
template <class T, int kWarps, int kTiles, int kLoads>
struct Tiles {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kBufferBytes = kTiles * kLoads * kThreads * 16;
  static constexpr int kPartials = kWarps * kTiles * kMaxVectors * kTileRows;  // floats

  Vec16* buffer;         // shared memory, [kTiles, kLoads, kThreads]; a thread reads only what it has copied itself
  const T* row[kTiles];  // this lane's row of each tile
  int slices;            // in a row
  float sum[kTiles][2][4];

  __device__ __forceinline__ int slice(int chunk, int i) const { return (chunk * kLoads + i) * kWarps + warp_id(); }
  __device__ __forceinline__ int chunks() const { return ceil_div(slices, kLoads * kWarps); }
  __device__ __forceinline__ Vec16* at(int j, int i) const {
    return buffer + (j * kLoads + i) * kThreads + threadIdx.x;
  }

  // Tile j holds the rows first_row ... first_row + 7 of `weights`; past the last row it repeats that one.
  __device__ __forceinline__ void place(int j, const T* weights, int first_row, int rows, int dim) {
    slices = dim / kSlice;
    const int r = min(first_row + lane_id() / 4, rows - 1);
    row[j] = weights + static_cast<int64>(r) * dim + lane_id() % 4 * 8;
  }

  // Starts to copy a chunk.
  __device__ __forceinline__ void load(int chunk) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (slice(chunk, i) < slices)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) copy_async(at(j, i), row[j] + slice(chunk, i) * kSlice);
  }

  __device__ __forceinline__ void multiply(int chunk, const Staged<T>& x) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (slice(chunk, i) >= slices) break;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) add_slice<T>(sum[j], x, slice(chunk, i) * kSlice, *at(j, i));
    }
  }

  // All columns: this warp's sums. Chunk 0 is under way; with more chunks it has to be loaded again afterwards.
  __device__ __forceinline__ void multiply_all(const Staged<T>& x) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[j][0][c] = sum[j][1][c] = 0.0f;
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if (chunk > 0) load(chunk);
      copies_done();
      multiply(chunk, x);
    }
  }

  // Writes this warp's sums to partial [kWarps, kTiles, kMaxVectors, kTileRows].
  __device__ __forceinline__ void store(float* partial, int vectors) const {
    const int vector = lane_id() / 4, column = lane_id() % 4 * 2;
    if (vector >= vectors) return;
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      float* to = partial + ((warp_id() * kTiles + j) * kMaxVectors + vector) * kTileRows + column;
#pragma unroll
      for (int c = 0; c < 2; ++c) to[c] = sum_of_chains(sum[j], c);
    }
  }

  // The block's sum for one vector and one row of tile j, after store() and a barrier.
  static __device__ __forceinline__ float total(const float* partial, int j, int vector, int tile_row) {
    float x = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += partial[((w * kTiles + j) * kMaxVectors + vector) * kTileRows + tile_row];
    return x;
  }
};

// What a lane stages: its warp's slices in turn, eight at a time, four lanes a slice.
template <int kWarps>
struct StagedColumns {
  static constexpr int kStep = kWarps * 8;  // slices from one turn to the next
  static __device__ __forceinline__ int first() { return lane_id() / 4 * kWarps + warp_id(); }
  static __device__ __forceinline__ int column(int slice) { return slice * kSlice + lane_id() % 4 * 8; }
};

// Stages this warp's columns of x[b], b < staged.count, as they are.
template <class T, int kWarps>
__device__ __forceinline__ void stage(const Staged<T>& staged, const T* x, int dim) {
  using Columns = StagedColumns<kWarps>;
  for (int b = 0; b < staged.count; ++b)
    for (int s = Columns::first(); s < dim / kSlice; s += Columns::kStep)
      store_vec(staged.high(b) + Columns::column(s), load_vec(x + static_cast<int64>(b) * dim + Columns::column(s)));
  __syncwarp();
}

// What RMSNorm needs before the block waits: this lane's first eight norm weights.
template <class T, int kWarps>
__device__ __forceinline__ Vec16 first_norm_weights(const T* norm_weight, int dim) {
  using Columns = StagedColumns<kWarps>;
  if (Columns::first() >= dim / kSlice) return {};
  return load_weight(norm_weight + Columns::column(Columns::first()));
}

// The factor 1 / sqrt(mean(x^2) + eps) of vector b, from what stage_normed() left in `squares`.
template <int kWarps>
__device__ __forceinline__ float norm_scale(const float* squares, int b, int dim, float eps) {
  float x = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += squares[w * kMaxVectors + b];
  return rsqrtf(x / static_cast<float>(dim) + eps);
}

template <class T>
constexpr bool kScaleBeforeRounding = false;
template <>
constexpr bool kScaleBeforeRounding<float16> = true;

// Stages v * n * scale, eight columns, as high and low parts.
template <class T>
__device__ __forceinline__ void put_split(const Staged<T>& staged, int b, int column, const float (&v)[8],
                                          const float (&n)[8], float scale) {
  float high[8], low[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float y = v[e] * n[e] * scale;
    high[e] = rounded<T>(y);
    low[e] = y - high[e];
  }
  store_vec(staged.high(b) + column, pack8<T>(high));
  store_vec(staged.low(b) + column, pack8<T>(low));
}

// Stages this warp's columns of x[b] * norm_weight, split in two parts. The factor 1/rms is left out, since it can be
// applied to the sums: `squares` [kWarps, kMaxVectors] gets what norm_scale() makes it from, behind a barrier. float16
// might overflow without the factor, so there it is applied here, at the price of a barrier.
// The rows of x are `x_stride` elements apart.
template <class T, int kWarps>
__device__ __forceinline__ void stage_normed(const Staged<T>& staged, const T* x, int64 x_stride, const T* norm_weight,
                                             const Vec16& first_weights, int dim, float eps, float* squares) {
  using Columns = StagedColumns<kWarps>;
  const auto put = [&](int b, int s, const float (&v)[8], float scale) {
    float n[8];
    unpack8<T>(s < Columns::kStep ? first_weights : load_weight(norm_weight + Columns::column(s)), n);
    put_split(staged, b, Columns::column(s), v, n, scale);
  };
  float v[8];
  for (int b = 0; b < staged.count; ++b) {
    float square = 0.0f;
    for (int s = Columns::first(); s < dim / kSlice; s += Columns::kStep) {
      unpack8<T>(load_vec(x + b * x_stride + Columns::column(s)), v);
#pragma unroll
      for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
      if constexpr (!kScaleBeforeRounding<T>) put(b, s, v, 1.0f);
    }
    square = warp_sum(square);
    if (lane_id() == 0) squares[warp_id() * kMaxVectors + b] = square;
  }
  if constexpr (kScaleBeforeRounding<T>) {
    __syncthreads();
    for (int b = 0; b < staged.count; ++b) {
      const float scale = norm_scale<kWarps>(squares, b, dim, eps);
      for (int s = Columns::first(); s < dim / kSlice; s += Columns::kStep) {
        unpack8<T>(load_vec(x + b * x_stride + Columns::column(s)), v);
        put(b, s, v, scale);
      }
    }
  }
  __syncwarp();
}

// The factor that the sums of a normalised vector still need.
template <class T, int kWarps>
__device__ __forceinline__ float pending_scale(const float* squares, int b, int dim, float eps) {
  return kScaleBeforeRounding<T> ? 1.0f : norm_scale<kWarps>(squares, b, dim, eps);
}

// Any dtype, size and alignment: a warp's dot products of one row of W with kVectors vectors (fewer: `count`).
// With a norm weight the vectors are multiplied by it first.
constexpr int kPlainVectors = 4;
template <class T>
__device__ __forceinline__ void plain_dot(const T* weight_row, const T* x, int64 x_stride, const T* norm_weight,
                                          int count, int dim, float (&sum)[kPlainVectors]) {
#pragma unroll
  for (int b = 0; b < kPlainVectors; ++b) sum[b] = 0.0f;
  for (int k = lane_id(); k < dim; k += kWarp) {
    float w = to_float(weight_row[k]);
    if (norm_weight) w *= to_float(norm_weight[k]);
#pragma unroll
    for (int b = 0; b < kPlainVectors; ++b)
      if (b < count) sum[b] = fmaf(w, to_float(x[b * x_stride + k]), sum[b]);
  }
#pragma unroll
  for (int b = 0; b < kPlainVectors; ++b) sum[b] = warp_sum(sum[b]);
}

// 1 / sqrt(mean(x^2) + eps) of one vector, by the whole block; `scratch` holds a float per warp.
template <class T>
__device__ __forceinline__ float plain_norm_scale(const T* x, int dim, float eps, float* scratch) {
  float square = 0.0f;
  for (int k = threadIdx.x; k < dim; k += blockDim.x) square = fmaf(to_float(x[k]), to_float(x[k]), square);
  return rsqrtf(block_sum(square, scratch) / static_cast<float>(dim) + eps);
}

}  // namespace s1
