// Matrix-vector products y = W @ x for up to 8 vectors x at a time, the core of every projection.
//
// Two ways. `Tiles` is the fast one: 16-bit weights on tensor cores, 16-byte loads, all of a block's weights (or its
// first chunk) under way to shared memory before the block waits for its inputs. `plain_dot` takes any dtype, size and
// alignment.
//
// Mapping of Tiles: a tile is 8 rows of W. A warp has neighbouring slices of 32 columns of them, and copies them row by
// row, 512 bytes in one load. It then reads them as the mma wants them, slice by slice: lane 4g + t has 16 bytes (8
// columns) of the tile's row g. The warps add their sums up at the end. A warp reads only weights that it has copied
// itself, and only columns of x that it has staged itself, so that the one barrier is that before the sums. The weights
// are the mma's 16 x 8 operand. The other one holds x: rows 0 to 7 are the high parts of 8 vectors (x rounded to T),
// rows 8 to 15 what that left (x - high, rounded to T), so that a normalised x keeps 16 bits or more. Why shared
// memory: held in registers, the weights left the next kernel's blocks no room on the SM, and programmatic dependent
// launch gained nothing (S1-mini's frame on an H200: 1.65 ms with it, 1.71 without). Numerics: products exact, sums in
// float32.
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

// Which slices are a warp's: of every chunk of kWarps * kLoads slices, kLoads in a row.
template <int kWarps, int kLoads>
__device__ __forceinline__ int slice_of_warp(int chunk, int i) {
  return (chunk * kWarps + warp_id()) * kLoads + i;
}

// A block's share of W: kTiles tiles, kLoads slices of them at a time for each warp, in `buffer`.
template <class T, int kWarps, int kTiles, int kLoads>
struct Tiles {
  static constexpr int kUnits = kLoads * 4;  // of 16 bytes, in a warp's part of a row
  static constexpr int kBufferBytes = kTiles * kWarps * kTileRows * kUnits * 16;
  static constexpr int kPartials = kWarps * kTiles * kMaxVectors * kTileRows;  // floats

  Vec16* buffer;           // shared memory, [kTiles, kWarps, kTileRows, kUnits]
  const T* first[kTiles];  // row 0 of each tile
  int last[kTiles];        // the tile's last row that there is
  int slices;              // in a row
  float sum[kTiles][2][4];

  __device__ __forceinline__ int slice(int chunk, int i) const { return slice_of_warp<kWarps, kLoads>(chunk, i); }
  __device__ __forceinline__ int chunks() const { return ceil_div(slices, kLoads * kWarps); }
  // Odd rows have the halves of 128 bytes swapped: eight lanes read 64 bytes of two rows, which lie in the same banks.
  __device__ __forceinline__ Vec16* at(int j, int row, int unit) const {
    return buffer + ((j * kWarps + warp_id()) * kTileRows + row) * kUnits + (unit ^ row % 2 * 4);
  }

  // Tile j holds the rows first_row ... first_row + 7 of `weights`; past the last row it repeats that one.
  __device__ __forceinline__ void place(int j, const T* weights, int first_row, int rows, int dim) {
    slices = dim / kSlice;
    const int row = min(first_row, rows - 1);
    first[j] = weights + static_cast<int64>(row) * dim;
    last[j] = rows - 1 - row;
  }

  // Starts to copy a chunk.
  __device__ __forceinline__ void load(int chunk) {
    constexpr int kWide = kUnits < kWarp ? kUnits : kWarp, kParts = kUnits / kWide;  // lanes along a row; loads of it
    const int dim = slices * kSlice, unit = lane_id() % kWide, column = slice(chunk, 0) * kSlice + unit * 8;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = i / kParts * (kWarp / kWide) + lane_id() / kWide, further = i % kParts * kWide;
      if (column + further * 8 < dim)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          copy_async(at(j, row, unit) + further, first[j] + (min(row, last[j]) * dim + column) + further * 8);
    }
  }

  __device__ __forceinline__ void multiply(int chunk, const Staged<T>& x) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (slice(chunk, i) >= slices) break;
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        add_slice<T>(sum[j], x, slice(chunk, i) * kSlice, *at(j, lane_id() / 4, i * 4 + lane_id() % 4));
    }
  }

  // All columns: this warp's sums. Chunk 0 is under way; with more chunks it has to be loaded again afterwards.
  __device__ __forceinline__ void multiply_all(const Staged<T>& x) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[j][0][c] = sum[j][1][c] = 0.0f;
    for (int chunk = 0; chunk < chunks(); ++chunk) {
      if (chunk > 0) {
        __syncwarp();  // the last chunk is done with
        load(chunk);
      }
      copies_done();
      __syncwarp();
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

// The first of the eight columns that a lane stages in its turn'th turn: its warp's slices one after another, eight at
// a time, four lanes a slice. Not below `dim`: there are no more.
template <int kWarps, int kLoads>
__device__ __forceinline__ int staged_column(int turn) {
  const int i = turn * 8 + lane_id() / 4;
  return slice_of_warp<kWarps, kLoads>(i / kLoads, i % kLoads) * kSlice + lane_id() % 4 * 8;
}

// Stages this warp's columns of x[b], b < staged.count, as they are.
template <class T, int kWarps, int kLoads>
__device__ __forceinline__ void stage(const Staged<T>& staged, const T* x, int dim) {
  for (int b = 0; b < staged.count; ++b)
    for (int turn = 0, at; (at = staged_column<kWarps, kLoads>(turn)) < dim; ++turn)
      store_vec(staged.high(b) + at, load_vec(x + static_cast<int64>(b) * dim + at));
  __syncwarp();
}

// What RMSNorm needs before the block waits: the norm weights of this lane's first turn.
template <class T, int kWarps, int kLoads>
__device__ __forceinline__ Vec16 first_norm_weights(const T* norm_weight, int dim) {
  const int at = staged_column<kWarps, kLoads>(0);
  return at < dim ? load_weight(norm_weight + at) : Vec16{};
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
template <class T, int kWarps, int kLoads>
__device__ __forceinline__ void stage_normed(const Staged<T>& staged, const T* x, int64 x_stride, const T* norm_weight,
                                             const Vec16& first_weights, int dim, float eps, float* squares) {
  const auto put = [&](int b, int turn, int at, const float (&v)[8], float scale) {
    float n[8];
    unpack8<T>(turn == 0 ? first_weights : load_weight(norm_weight + at), n);
    put_split(staged, b, at, v, n, scale);
  };
  float v[8];
  for (int b = 0; b < staged.count; ++b) {
    float square = 0.0f;
    for (int turn = 0, at; (at = staged_column<kWarps, kLoads>(turn)) < dim; ++turn) {
      unpack8<T>(load_vec(x + b * x_stride + at), v);
#pragma unroll
      for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
      if constexpr (!kScaleBeforeRounding<T>) put(b, turn, at, v, 1.0f);
    }
    square = warp_sum(square);
    if (lane_id() == 0) squares[warp_id() * kMaxVectors + b] = square;
  }
  if constexpr (kScaleBeforeRounding<T>) {
    __syncthreads();
    for (int b = 0; b < staged.count; ++b) {
      const float scale = norm_scale<kWarps>(squares, b, dim, eps);
      for (int turn = 0, at; (at = staged_column<kWarps, kLoads>(turn)) < dim; ++turn) {
        unpack8<T>(load_vec(x + b * x_stride + at), v);
        put(b, turn, at, v, scale);
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
