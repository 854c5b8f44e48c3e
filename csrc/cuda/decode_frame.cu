// decode_frame: the kernel that a frame has beside the ops' own; s1kernels/backends/cuda/decode_frame.py puts them in
// order.
//
// attention_output: attention of the fast stack and its projection in one launch: out = weight @ attention(qkv) + bias
//   + residual, for one sequence's T = 1 or 2 new positions, first ... first+T-1, of at most 16.
//   qkv [T, (H+2G)*D], k_cache and v_cache [G, S, D], weight [C, H*D], bias [C] or null, residual and out [T, C]: T.
//   Grid/block: C/8 blocks of 8 warps. Every block computes all of the attention, a warp a key/value head at a time:
//     ten positions are 20 KB from L2, less than a launch costs. Block 0 writes the new k and v to the cache. What
//     earlier passes wrote there is read before the block waits: the draw between two passes lets no later kernel start
//     before all earlier ones have ended (see sample_token.cu).
//   Memory: C*H*D weights once. Numerics: q, k and the attention's result are rounded to T like the results of
//     qk_norm_rotary_append and attention_decode; otherwise as linear_residual.
//   Requires: 16-bit T, D 64 or 128, H/G 1, 2 or 4, H*D a multiple of 32, pointers aligned to 16 bytes.
#include "device/attention.cuh"
#include "device/project.cuh"

namespace s1 {

struct AttentionOutputArgs {
  const void* qkv;            // [T, (H+2G)*D]
  void* k_cache;              // [G, S, D]
  void* v_cache;              // [G, S, D]
  const void* q_norm_weight;  // [D] or null
  const void* k_norm_weight;  // [D] or null
  const void* cos_sin;        // [P, D/2, 2]
  const void* weight;         // [C, H*D]
  const void* bias;           // [C] or null
  const void* residual;       // [T, C]
  void* out;                  // [T, C]
  int rows;                   // T
  int first;                  // position of row 0
  int heads;                  // H
  int kv_heads;               // G
  int capacity;               // S
  int out_dim;                // C
  float eps;
};

constexpr int kFastPositions = 16;
constexpr int kAttentionOutputWarps = 8;

// One key/value head and its query heads, by one warp: all positions at once, a few lanes each.
template <class T, int kDim, int kGroup>
struct FastAttention {
  using Head = HeadLanes<kDim>;
  static constexpr int kSteps = kFastPositions / Head::kSlots;
  static constexpr int kRows = 2;  // T at most

  const AttentionOutputArgs& a;
  int g;
  T* k_row;
  T* v_row;
  Vec16 k[kSteps], v[kSteps], q_norm, k_norm;

  __device__ __forceinline__ FastAttention(const AttentionOutputArgs& a, int g) : a(a) {
    place(g);
    q_norm = a.q_norm_weight ? load_weight(static_cast<const T*>(a.q_norm_weight) + Head::column()) : Vec16{};
    k_norm = a.k_norm_weight ? load_weight(static_cast<const T*>(a.k_norm_weight) + Head::column()) : Vec16{};
  }

  // Turns to another key/value head.
  __device__ __forceinline__ void place(int head) {
    g = head;
    k_row = static_cast<T*>(a.k_cache) + static_cast<int64>(g) * a.capacity * kDim + Head::column();
    v_row = static_cast<T*>(a.v_cache) + static_cast<int64>(g) * a.capacity * kDim + Head::column();
  }

  static __device__ __forceinline__ int position(int step) { return step * Head::kSlots + Head::slot(); }
  __device__ __forceinline__ Vec16 angles(int p) const {
    return load_weight(static_cast<const T*>(a.cos_sin) + p * kDim + Head::column());
  }

  // What earlier passes left in the cache.
  __device__ __forceinline__ void load_cached() {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      k[i] = v[i] = {};
      if (position(i) >= a.first) continue;
      k[i] = load_vec(k_row + position(i) * kDim);
      v[i] = load_vec(v_row + position(i) * kDim);
    }
  }

  // The results of the query heads for the new rows, into x[0 ... T-1].
  __device__ __forceinline__ void run(const Staged<T>& x) {
    const int length = a.first + a.rows, row_size = (a.heads + 2 * a.kv_heads) * kDim;
    const T* qkv = static_cast<const T*>(a.qkv) + Head::column();
    Vec16 q[kRows][kGroup];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int p = position(i);
      if (p < a.first || p >= length) continue;
      k[i] = load_vec(qkv + (p - a.first) * row_size + (a.heads + g) * kDim);
      v[i] = load_vec(qkv + (p - a.first) * row_size + (a.heads + a.kv_heads + g) * kDim);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int h = 0; h < kGroup; ++h)
        q[r][h] = r < a.rows ? load_vec(qkv + r * row_size + (g * kGroup + h) * kDim) : Vec16{};
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if ((i + 1) * Head::kSlots <= a.first || i * Head::kSlots >= length) continue;  // the same in the whole warp
      const int p = position(i);
      const bool fresh = p >= a.first && p < length;
      const Vec16 rotated =
          norm_rotary<T, kDim>(k[i], a.k_norm_weight != nullptr, k_norm, fresh ? angles(p) : Vec16{}, a.eps);
      if (!fresh) continue;
      k[i] = rotated;
      if (blockIdx.x != 0) continue;
      store_vec(k_row + p * kDim, k[i]);
      store_vec(v_row + p * kDim, v[i]);
    }
    const float scale = rsqrtf(static_cast<float>(kDim)) * kLog2e;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= a.rows) break;
      const Vec16 here = angles(a.first + r);
#pragma unroll
      for (int h = 0; h < kGroup; ++h) {
        float query[8], score[kSteps], value[8];
        unpack8<T>(norm_rotary<T, kDim>(q[r][h], a.q_norm_weight != nullptr, q_norm, here, a.eps), query);
#pragma unroll
        for (int e = 0; e < 8; ++e) query[e] *= scale;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          score[i] = -infinity();
          if (i * Head::kSlots > a.first + r) continue;  // the same in the whole warp
          const float s = head_dot<T, kDim>(query, k[i]);
          if (position(i) <= a.first + r) score[i] = s;
        }
        SoftmaxSum sum;
        sum.clear();
        sum.template add<T>(score, v);
        sum.merge_slots<Head::kLanes>();
#pragma unroll
        for (int e = 0; e < 8; ++e) value[e] = sum.value[e] / sum.total;
        if (Head::slot() == 0) store_vec(x.high(r) + (g * kGroup + h) * kDim + Head::column(), pack8<T>(value));
      }
    }
  }
};

template <class T, int kDim, int kGroup>
__device__ __forceinline__ void attention_output(const AttentionOutputArgs& a) {
  using Share = Tiles<T, kAttentionOutputWarps, 1, 4>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[Share::kPartials];
  launch_next();
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows, dim = a.heads * kDim;
  Share tiles;
  tiles.buffer = reinterpret_cast<Vec16*>(shared);
  tiles.place(0, static_cast<const T*>(a.weight), first_row, a.out_dim, dim);
  tiles.load(0);
  const Staged<T> x{reinterpret_cast<T*>(shared + Share::kBufferBytes), a.rows, staged_stride(dim), false};
  FastAttention<T, kDim, kGroup> attention(a, warp_id() < a.kv_heads ? warp_id() : 0);
  attention.load_cached();
  wait_for_inputs();
  for (int g = warp_id(); g < a.kv_heads; g += kAttentionOutputWarps) {
    if (g != attention.g) {
      attention.place(g);
      attention.load_cached();
    }
    attention.run(x);
  }
  __syncthreads();
  tiles.multiply_all(x);
  tiles.store(partial, x.count);
  __syncthreads();
  for (int i = threadIdx.x; i < x.count * kTileRows; i += blockDim.x) {
    const int b = i / kTileRows, row = first_row + i % kTileRows;
    if (row >= a.out_dim) continue;
    const int64 at = static_cast<int64>(b) * a.out_dim + row;
    float y = tiles.total(partial, 0, b, i % kTileRows) + to_float(static_cast<const T*>(a.residual)[at]);
    if (a.bias) y += to_float(static_cast<const T*>(a.bias)[row]);
    static_cast<T*>(a.out)[at] = from_float<T>(y);
  }
}

#define S1_ATTENTION_OUTPUT(dim, group, blocks)                                          \
  template <class T>                                                                     \
  __device__ void attention_output_d##dim##_g##group(const AttentionOutputArgs& a) {     \
    attention_output<T, dim, group>(a);                                                  \
  }                                                                                      \
  S1_KERNEL_HALVES(attention_output_d##dim##_g##group, AttentionOutputArgs, 256, blocks, \
                   attention_output_d##dim##_g##group)

S1_ATTENTION_OUTPUT(64, 1, 1)
S1_ATTENTION_OUTPUT(64, 2, 1)
S1_ATTENTION_OUTPUT(64, 4, 1)
S1_ATTENTION_OUTPUT(128, 1, 1)
S1_ATTENTION_OUTPUT(128, 2, 1)
S1_ATTENTION_OUTPUT(128, 4, 1)

}  // namespace s1
