// The persistent frame kernel's fast attention, by every block alike.
#pragma once

#include "frame_slow_attention.cuh"

namespace s1 {

template <class T>
struct FrameFastAttention : FrameSlowAttention<T> {
  using Base = FrameSlowAttention<T>;
  using Base::a;
  using Base::lane;
  using Base::s;
  using Base::thread;
  using Base::waiting;
  using Base::warp;

  // Fast attention, by every block alike, and its projection: a warp's columns are a query head, so that it needs no
  // other's. While the inputs are on their way, the first layer draws the noise of the code that will come of them.
  __device__ __forceinline__ void fast_output(const Phase& f) {
    if (f.layer == 0) draw_noise(f.position + f.vectors);
    const auto ask = [](Vec16(&)[1], int) {};
    this->template project_residual<1>(f, ask, [&](Vec16(&x)[1], int vectors) {
      if (vectors == 2) {
        x[0] = fast_attention<2, 1>(f);
      } else {
        x[0] = f.position < 8 ? fast_attention<1, 1>(f) : fast_attention<1, 2>(f);
      }
    });
    copy_kept(f);
  }

  // This lane's part of the result for this warp's query head, of up to kTiles * 8 positions. The warp takes the query
  // and the key and value that it shares with the next warp into s.heads. There and in s.cache, word j of a vector's
  // 16-byte piece i is word i % 4 of piece i / 4 * 4 + j, so that the result is an operand of the projection as it is;
  // and piece i lies where piece i ^ position % 8 ^ n would, where n is 0 for queries, 1 for keys, 2 for values: no
  // bank conflicts among eight positions that are read, nor among the three vectors that are written. Operand rows g
  // and g + 8 of all products belong to the vector and the columns that lane 4g has of the result. Scores: rows g have
  // the even pieces of the query, rows g + 8 the odd ones. Values: rows g have the high part of the weights, rows g + 8
  // the low part; half of the inner indices are for even words and half for odd ones, with zeros for those that are not
  // the row's.
  template <int kVectors, int kTiles>
  __device__ __forceinline__ Vec16 fast_attention(const Phase& f) {
    const float scale = rsqrtf(static_cast<float>(kFastDim)) * kLog2e;
    const uint32 lane = this->lane(), h = warp(), row = lane % 8, matrix = lane / 8, position = f.position;
    const uint32 vector = kVectors == 2 ? row / 4 : 0;
    const uint32 here = position + (kVectors == 2 ? this->part_vector() : 0);
    const uint32 heads = shared_address(s.heads[h]), kept = shared_address(s.cache[0][0][h / 2]);
    const uint32 query_at = heads + vector * sizeof(s.heads[0][0]) + (matrix ^ (position + vector) % 8) * 16;
    uint32 key_at[kTiles], value_at[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32 place = min(i * 8 + row, position + kVectors - 1);
      const bool fresh = place >= position;
      const uint32 key = fresh ? heads + (place - position) * sizeof(s.heads[0][0]) + sizeof(s.heads[0][0][0])
                               : kept + place * sizeof(s.cache[0][0]);
      key_at[i] = key + ((matrix % 2 * 2 + matrix / 2) ^ place % 8 ^ 1) * 16;
      value_at[i] = key + (fresh ? sizeof(s.heads[0][0][0]) : sizeof(s.cache[0])) + (matrix ^ place % 8 ^ 2) * 16;
    }
    Vec16 x[kVectors];
    const uint32 kind = min(matrix, 2u), head = kind == 0 ? h : 8 + 8 * kind + h / 2;  // the last eight lanes repeat
    const uint32 to = min(row / 2, 2u), piece = (row % 2 * 4 + matrix) ^ to;
    waiting.take4s(a.words + f.in + head * (kFastDim / 2) + row * 4, kFastQkvRows / 2, x);
    __syncwarp();
#pragma unroll
    for (int r = 0; r < kVectors; ++r)
      store_matrices(shared_address(s.heads[h][r][to]) + (piece ^ (position + r) % 8) * 16, x[r]);
    __syncwarp();
    const Vec16 query[2] = {load_matrices(query_at), load_matrices(query_at ^ 64)};
    Vec16 key[kTiles][2], value[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) key[i][j] = load_matrices(key_at[i] ^ (j * 64));
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) value[i][j] = load_transposed(value_at[i] ^ (j * 64));
    }
    float score[kTiles][2], top = -infinity();
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float even[4] = {}, odd[4] = {};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const Vec16 &q = query[j], &k = key[i][j];
        Mma<T>::add(even, q.word[0], q.word[1], q.word[2], q.word[3], k.word[0], k.word[1]);
        Mma<T>::add(odd, q.word[0], q.word[1], q.word[2], q.word[3], k.word[2], k.word[3]);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        score[i][e] = i * 8 + lane % 4 * 2 + e <= here ? even[e] + odd[2 + e] : -infinity();
        top = fmaxf(top, score[i][e]);
      }
    }
    top = warp_max<4>(top) * scale;
    const bool low = lane / 4 % 2 == 0;  // words
    const uint32 ones = pack<T>(1.0f, 1.0f);
    float sum[4][4] = {}, total[4] = {};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float p = exp2_of(fmaf(score[i][0], scale, -top)), q = exp2_of(fmaf(score[i][1], scale, -top));
      const uint32 high = pack<T>(p, q);
      const float2 taken = unpack<T>(high);
      const uint32 rest = pack<T>(p - taken.x, q - taken.y);
      const uint32 w[4] = {low ? high : 0, low ? rest : 0, low ? 0 : high, low ? 0 : rest};
      Mma<T>::add(total, w[0], w[1], w[2], w[3], ones, ones);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Vec16& v = value[i][j / 2];
        Mma<T>::add(sum[j], w[0], w[1], w[2], w[3], v.word[j % 2 * 2], v.word[j % 2 * 2 + 1]);
      }
    }
    const float inverse = inverse_of(total[0] + total[2]);
    Vec16 y;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      y.word[j] = pack<T>((sum[j][0] + sum[j][2]) * inverse, (sum[j][1] + sum[j][3]) * inverse);
    return y;
  }

  // Starts to copy the keys and values of the layer that comes next, when all warps are done with this one's: a word a
  // lane, keys by the first of the two warps that share them, values by the other. They were passed on in earlier
  // passes, to this warp too.
  __device__ __forceinline__ void copy_kept(const Phase& f) {
    const int head = warp() / 2, side = warp() % 2, lane = this->lane();
    const int piece = lane / 16 * 4 + lane % 4, word = lane / 4 % 4;
    const uint32* from = a.words + (f.past + (16 + 8 * side + head) * (kFastDim / 2) + lane);
#pragma unroll 1
    for (int place = 0; place < f.kept; ++place, from += kFastQkvRows / 2) {
      uint32* to = reinterpret_cast<uint32*>(s.cache[side][place][head]);
      copy_async4(to + (piece ^ place % 8 ^ (1 + side)) * 4 + word, from);
    }
  }

  // -log(noise) of a fast code's rows.
  __device__ __forceinline__ void draw_noise(int number) {
    const uint64 offset = static_cast<uint32>(a.fast_offset + (number - 2) * a.fast_step);
    const Gumbel noise{
        nullptr,
        nullptr,
        {static_cast<uint64>(a.rng[0]), static_cast<uint64>(a.rng[1]) + offset, static_cast<uint32>(a.fast_threads)},
        false};
#pragma unroll 1
    for (int row = thread; row < 1024; row += kWorkers * 32) s.gumbel[row] = noise(row);
  }
};

}  // namespace s1
