// The persistent frame kernel's stream of weights, and the phases that multiply them.
#pragma once

#include "frame_state.cuh"

namespace s1 {

template <class T>
struct FrameProjections {
  const PersistentFrameArgs& a;
  Shared<T>& s;
  RingCursor<kSlots> ring;
  Waiting waiting;
  int pass;      // exchanges of the main draw so far
  int position;  // of the frame
  uint32 turn;   // number of the frame

  // The warp that streams the weights: one lane, so that units come in order and no slot is a turn ahead of another.
  static __device__ void stream(const PersistentFrameArgs& a, Shared<T>& s) {
    int issued = 0;
    RingCursor<kSlots> at{0, 1}, done{0, 0};
    Phase next = a.phases[0];
    for (int p = 0; p < a.phase_count; ++p) {
      const Phase f = next;
      if (p + 1 < a.phase_count) next = a.phases[p + 1];
      if (f.row_a == 0) continue;
      const int units = pairs_here(f) * f.slices, first = static_cast<int>(blockIdx.x) * f.pairs;
      for (int u = 0; u < units; ++u) {
        barrier_wait(s.empty + at.slot, at.parity);
        if (issued++ >= kAtOnce) {
          barrier_wait(s.full + done.slot, done.parity);
          done.advance(1);
        }
        copy_unit(s, f, first + u / f.slices, u % f.slices, at.slot);
        at.advance(1);
      }
    }
  }

  static __device__ __forceinline__ void copy_unit(Shared<T>& s, const Phase& f, int pair, int slice, int slot) {
    const int64 from = static_cast<int64>(pair) * f.stride + slice * (kUnitBytes / 2);
    const unsigned char* row_a = reinterpret_cast<const unsigned char*>(f.row_a) + from;
    const unsigned char* row_b = reinterpret_cast<const unsigned char*>(f.row_b) + from;
    if (f.kind != kSwiglu && 2 * pair + 1 >= f.rows) row_b = row_a;  // the last row is alone
    unsigned char* to = s.ring + slot * kUnitBytes;
    uint64* full = s.full + slot;
    barrier_expect(full, kUnitBytes);
    if (row_b == row_a + kUnitBytes / 2) {
      bulk_copy(to, row_a, kUnitBytes, full);
    } else {
      bulk_copy(to, row_a, kUnitBytes / 2, full);
      bulk_copy(to + kUnitBytes / 2, row_b, kUnitBytes / 2, full);
    }
  }

  // 1/rms of a vector, after stage_normed() and a barrier.
  __device__ __forceinline__ float norm_scale(int half, int vector) const {
    const float* q = s.squares[half][vector];
    return rsqrtf((q[0] + q[1] + q[2] + q[3]) * (1.0f / kWidth) + a.eps);
  }

  // Eight elements of the input of a phase that begins a stack.
  __device__ __forceinline__ Vec16 source(const Phase& f, int vector, int column) {
    if (f.source == kCodes) {
      if (f.vectors == 2 && vector == 0) return load_vec(s.hidden + column / 2);
      return load_vec(static_cast<const T*>(a.fast_embedding) + static_cast<int64>(s.code) * kWidth + column);
    }
    const int main = a.tokens[0];
    float sum[8], x[8];
    if (main < 0 || main >= a.text_rows) return pack8_of_nan();
    unpack8<T>(load_vec(static_cast<const T*>(a.text_embedding) + static_cast<int64>(main) * kWidth + column), sum);
    if (main >= a.semantic_begin && main <= a.semantic_end) {
      for (int i = 0; i < a.codebooks; ++i) {
        const int code = a.tokens[1 + i];
        if (code < 0 || code >= a.codebook_size) return pack8_of_nan();
        const int64 row = static_cast<int64>(i) * a.codebook_size + code;
        unpack8<T>(load_vec(static_cast<const T*>(a.codebook_embedding) + row * kWidth + column), x);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += x[e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] *= a.scale;
    }
    return pack8<T>(sum);
  }
  static __device__ __forceinline__ Vec16 pack8_of_nan() {
    float x[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = not_a_number();
    return pack8<T>(x);
  }

  // Stages x * norm_weight of a phase's vectors in float32: elements 0 to 3 of every eight first, then 4 to 7. Four
  // warps a vector.
  __device__ __forceinline__ void stage_normed(const Phase& f, int half) {
    const int vector = threadIdx.x / 128, column = threadIdx.x % 128 * 8;
    if (vector >= f.vectors) return;
    const Vec16 weights = load_weight(reinterpret_cast<const T*>(f.norm_weight) + column);
    Vec16 x;
    if (f.source == kWords) {
      x = waiting.take4(a.words + f.in + vector * (kWidth / 2) + column / 2);
    } else {
      x = source(f, vector, column);
      const int mine = column - static_cast<int>(blockIdx.x) * kOwnRows;
      if (mine == 0) {
        float v[8];
        unpack8<T>(x, v);
#pragma unroll
        for (int e = 0; e < 8; ++e) s.own[vector][e] = v[e];
      }
    }
    if (f.kind == kHead) store_vec(s.hidden + column / 2, x);
    float v[8], n[8], square = 0.0f;
    unpack8<T>(x, v);
    unpack8<T>(weights, n);
#pragma unroll
    for (int e = 0; e < 8; ++e) square = fmaf(v[e], v[e], square);
    float4* to = reinterpret_cast<float4*>(s.stage[half]) + vector * (kWidth / 4) + column / 8;
    to[0] = {v[0] * n[0], v[1] * n[1], v[2] * n[2], v[3] * n[3]};
    to[kWidth / 8] = {v[4] * n[4], v[5] * n[5], v[6] * n[6], v[7] * n[7]};
    square = warp_sum(square);
    if (lane_id() == 0) s.squares[half][vector][warp_id() % 4] = square;
  }

  // Stages the words of a phase's vectors as they are, `words` of them each.
  __device__ __forceinline__ void stage_words(const Phase& f, int half, int words) {
    for (int i = threadIdx.x; i < f.vectors * words / 4; i += kWorkers * 32)
      store_vec(s.stage[half] + i * 16, waiting.take4(a.words + f.in + i * 4));
  }

  // This lane's columns of a vector of 1024: eight at k*256 + lane*8, k < 4. As stage_normed() left it, or T [1024].
  struct Columns {
    float x[4][8];

    __device__ __forceinline__ void load(const unsigned char* stage, bool normed) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int i = k * 32 + lane_id();
        if (normed) {
          const float4 low = reinterpret_cast<const float4*>(stage)[i];
          const float4 high = reinterpret_cast<const float4*>(stage)[kWidth / 8 + i];
          x[k][0] = low.x, x[k][1] = low.y, x[k][2] = low.z, x[k][3] = low.w;
          x[k][4] = high.x, x[k][5] = high.y, x[k][6] = high.z, x[k][7] = high.w;
        } else {
          unpack8<T>(load_vec(stage + i * 16), x[k]);
        }
      }
    }
  };

  // The two rows of a unit times a vector, in all lanes.
  static __device__ __forceinline__ float2 multiply(const unsigned char* unit, const Columns& c) {
    const Vec16* rows = reinterpret_cast<const Vec16*>(unit);
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float w[8];
        unpack8<T>(rows[r * 128 + k * 32 + lane_id()], w);
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          even[r] = fmaf(w[e], c.x[k][e], even[r]);
          odd[r] = fmaf(w[e + 1], c.x[k][e + 1], odd[r]);
        }
      }
    // Both sums in one butterfly: after the first step, half the warp works on each.
    const float a_sum = even[0] + odd[0], b_sum = even[1] + odd[1];
    const bool upper = lane_id() & 16;
    const float passed = __shfl_xor_sync(kAllLanes, upper ? a_sum : b_sum, 16);
    float mine = (upper ? b_sum : a_sum) + passed;
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) mine += __shfl_xor_sync(kAllLanes, mine, offset);
    const float other = __shfl_xor_sync(kAllLanes, mine, 16);
    return upper ? float2{other, mine} : float2{mine, other};
  }

  // All of this block's units of a phase: put(unit, vector, sums) in all lanes of the warp that had the unit.
  // `stage_bytes` is from a vector's stage to the next's.
  template <bool kNormed, class Put>
  __device__ __forceinline__ void units(const Phase& f, const unsigned char* stage, int stage_bytes, Put put) {
    const int count = pairs_here(f) * f.slices, vectors = f.vectors, slices = f.slices;
    RingCursor<kSlots> at = ring.ahead(warp_id());
    Columns c;
    if (kNormed && vectors == 1) {  // the same columns for all units
      c.load(stage, kNormed);
      for (int u = warp_id(); u < count; u += kWorkers) {
        barrier_wait(s.full + at.slot, at.parity);
        const float2 y = multiply(s.ring + at.slot * kUnitBytes, c);
        __syncwarp();
        if (lane_id() == 0) barrier_arrive(s.empty + at.slot);
        put(u, 0, y);
        at.advance(kWorkers);
      }
    } else {
#pragma unroll 1
      for (int u = warp_id(); u < count; u += kWorkers) {
        barrier_wait(s.full + at.slot, at.parity);
#pragma unroll 1
        for (int v = 0; v < vectors; ++v) {
          c.load(stage + v * stage_bytes + (slices == 1 ? 0 : u % slices * 2048), kNormed);
          put(u, v, multiply(s.ring + at.slot * kUnitBytes, c));
        }
        __syncwarp();
        if (lane_id() == 0) barrier_arrive(s.empty + at.slot);
        at.advance(kWorkers);
      }
    }
    ring.advance(count);
  }

  __device__ __forceinline__ void qkv(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int n = pairs_here(f), words = f.rows / 2;
    units<true>(f, s.stage[half], kWidth * 4, [&](int u, int v, float2 y) {
      const float scale = norm_scale(half, v);
      if (lane_id() == 0)
        put_word(a.words + f.out + v * words + static_cast<int>(blockIdx.x) * n + u, pack<T>(y.x * scale, y.y * scale));
    });
  }

  __device__ __forceinline__ void swiglu_phase(const Phase& f, int half) {
    stage_normed(f, half);
    sync_workers();
    const int n = f.pairs;
    units<true>(f, s.stage[half], kWidth * 4, [&](int u, int v, float2 y) {
      const float scale = norm_scale(half, v), gate = y.x * scale;
      if (lane_id() == 0) s.sums[half][v][u] = gate / (1.0f + expf(-gate)) * (y.y * scale);
    });
    sync_workers();
    const int v = threadIdx.x / 32, i = lane_id();
    if (v < f.vectors && i < n / 2)
      put_word(a.words + f.out + (v * kBlocks + static_cast<int>(blockIdx.x)) * (n / 2) + i,
               pack<T>(s.sums[half][v][2 * i], s.sums[half][v][2 * i + 1]));
  }

  // Projection of staged vectors back into the residual stream.
  __device__ __forceinline__ void project(const Phase& f, int half, const unsigned char* stage, int stage_bytes) {
    units<false>(f, stage, stage_bytes, [&](int u, int v, float2 y) {
      if (lane_id() != 0) return;
      s.sums[half][v][2 * u] = y.x;
      s.sums[half][v][2 * u + 1] = y.y;
    });
    sync_workers();
    const int v = threadIdx.x / 32, pair = lane_id();
    if (v >= f.vectors || pair >= f.pairs) return;
    float y[2] = {0.0f, 0.0f};
    for (int k = 0; k < f.slices; ++k) {
      y[0] += s.sums[half][v][2 * (pair * f.slices + k)];
      y[1] += s.sums[half][v][2 * (pair * f.slices + k) + 1];
    }
    float* own = s.own[v] + 2 * pair;
    own[0] = rounded<T>(own[0] + y[0]);
    own[1] = rounded<T>(own[1] + y[1]);
    put_word(a.words + f.out + v * (kWidth / 2) + static_cast<int>(blockIdx.x) * f.pairs + pair,
             pack<T>(own[0], own[1]));
  }

  __device__ __forceinline__ void output(const Phase& f, int half) {
    stage_words(f, half, f.slices * (kWidth / 2));
    sync_workers();
    project(f, half, s.stage[half], f.slices * kWidth * 2);
  }
};

}  // namespace s1
