// decode_frame: the kernels that a frame has beside the ops' own; s1kernels/backends/cuda/decode_frame.py puts them in
// order.
//
// attention_output: attention of the fast stack and its projection in one launch: out = weight @ attention(qkv) + bias
//   + residual, for one sequence's T = 1 or 2 new positions, first ... first+T-1, of at most 16.
//   qkv [T, (H+2G)*D], k_cache and v_cache [G, S, D], weight [C, H*D], bias [C] or null, residual and out [T, C]: T.
//   Grid/block: C/8 blocks of 8 warps. Every block computes all of the attention, a warp a key/value head at a time:
//   ten
//     positions are 20 KB from L2, less than a launch costs. Block 0 writes the new k and v to the cache.
//   Memory: C*H*D weights once. Numerics: q, k and the attention's result are rounded to T like the results of
//     qk_norm_rotary_append and attention_decode; otherwise as linear_residual.
//   Requires: 16-bit T, D 64 or 128, H/G 1, 2 or 4, H*D a multiple of 32, pointers aligned to 16 bytes.
// advance: after a frame: the state that the next one starts from.
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

// Attention of key/value head g, one warp: x[r] gets the results of its query heads.
template <class T, int kDim, int kGroup>
__device__ __forceinline__ void fast_attention(const AttentionOutputArgs& a, int g, const Staged<T>& x) {
  using Head = HeadLanes<kDim>;
  constexpr int kSteps = kFastPositions / Head::kSlots;
  const int column = Head::column(), length = a.first + a.rows, row_size = (a.heads + 2 * a.kv_heads) * kDim;
  const T* qkv = static_cast<const T*>(a.qkv);
  T* k_row = static_cast<T*>(a.k_cache) + static_cast<int64>(g) * a.capacity * kDim;
  T* v_row = static_cast<T*>(a.v_cache) + static_cast<int64>(g) * a.capacity * kDim;
  const T* cos_sin = static_cast<const T*>(a.cos_sin) + column;
  Vec16 k[kSteps], v[kSteps], q_norm{}, k_norm{};
  if (a.q_norm_weight) q_norm = load_weight(static_cast<const T*>(a.q_norm_weight) + column);
  if (a.k_norm_weight) k_norm = load_weight(static_cast<const T*>(a.k_norm_weight) + column);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int p = i * Head::kSlots + Head::slot();
    k[i] = v[i] = {};
    if (p < a.first) {
      k[i] = load_vec(k_row + p * kDim + column);
      v[i] = load_vec(v_row + p * kDim + column);
    } else if (p < length) {
      const T* row = qkv + (p - a.first) * row_size + column;
      k[i] = load_vec(row + (a.heads + g) * kDim);
      v[i] = load_vec(row + (a.heads + a.kv_heads + g) * kDim);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int p = i * Head::kSlots + Head::slot();
    if ((i + 1) * Head::kSlots <= a.first || i * Head::kSlots >= length) continue;  // the same in the whole warp
    const bool fresh = p >= a.first && p < length;
    const Vec16 angles = fresh ? load_weight(cos_sin + p * kDim) : Vec16{};
    const Vec16 rotated = norm_rotary<T, kDim>(k[i], a.k_norm_weight != nullptr, k_norm, angles, a.eps);
    if (!fresh) continue;
    k[i] = rotated;
    if (blockIdx.x == 0) {
      store_vec(k_row + p * kDim + column, k[i]);
      store_vec(v_row + p * kDim + column, v[i]);
    }
  }
  const float scale = rsqrtf(static_cast<float>(kDim)) * kLog2e;
  for (int r = 0; r < a.rows; ++r) {
    const Vec16 angles = load_weight(cos_sin + (a.first + r) * kDim);
#pragma unroll
    for (int h = 0; h < kGroup; ++h) {
      const int head = g * kGroup + h;
      float q[8], value[8];
      unpack8<T>(norm_rotary<T, kDim>(load_vec(qkv + r * row_size + head * kDim + column), a.q_norm_weight != nullptr,
                                      q_norm, angles, a.eps),
                 q);
#pragma unroll
      for (int e = 0; e < 8; ++e) q[e] *= scale;
      SoftmaxSum sum;
      sum.clear();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int p = i * Head::kSlots + Head::slot();
        if (i * Head::kSlots > a.first + r) break;
        const float score = head_dot<T, kDim>(q, k[i]);
        unpack8<T>(v[i], value);
        sum.add(p <= a.first + r ? score : -infinity(), value);
      }
      sum.merge_slots<Head::kLanes>();
#pragma unroll
      for (int e = 0; e < 8; ++e) value[e] = sum.value[e] / sum.total;
      if (Head::slot() == 0) store_vec(x.high(r) + head * kDim + column, pack8<T>(value));
    }
  }
}

template <class T, int kDim, int kGroup>
__device__ __forceinline__ void attention_output(const AttentionOutputArgs& a) {
  using Share = ProjectTiles<T, 1, 4>;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[Share::kPartials];
  launch_next();
  const int first_row = static_cast<int>(blockIdx.x) * kTileRows, dim = a.heads * kDim;
  Share tiles;
  tiles.place(0, static_cast<const T*>(a.weight), first_row, a.out_dim, dim);
  tiles.load(0);
  wait_for_inputs();
  const Staged<T> x{reinterpret_cast<T*>(shared), a.rows, staged_stride(dim), false};
  for (int g = warp_id(); g < a.kv_heads; g += kProjectWarps) fast_attention<T, kDim, kGroup>(a, g, x);
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

S1_ATTENTION_OUTPUT(64, 1, 2)
S1_ATTENTION_OUTPUT(64, 2, 2)
S1_ATTENTION_OUTPUT(64, 4, 1)
S1_ATTENTION_OUTPUT(128, 1, 1)
S1_ATTENTION_OUTPUT(128, 2, 1)
S1_ATTENTION_OUTPUT(128, 4, 1)

struct AdvanceArgs {
  int* tokens;         // [N+1], the last frame; receives `codes`
  const int* codes;    // [N+1], the new frame
  int* position;       // [1]
  int* window;         // [N+1, W], the frames that repetition control sees
  int* index;          // [1], frames in the window's count; -1: the frame after a prompt, which is not remembered
  int64* random;       // [2] seed, offset
  int codebooks;       // N
  int width;           // W
  int fill_first;      // the window fills from the left before it shifts (S1 line)
  int random_numbers;  // that the frame took from the offset
};

// One block; a thread a row of the window.
template <class T>
__device__ void advance(const AdvanceArgs& a) {
  launch_next();
  wait_for_inputs();
  const int r = threadIdx.x, index = *a.index;
  __syncthreads();
  if (r <= a.codebooks) {
    int* row = a.window + r * a.width;
    if (index < 0) {
      for (int i = 0; i < a.width; ++i) row[i] = 0;
    } else if (a.fill_first && index < a.width) {
      row[index] = a.codes[r];
    } else {
      for (int i = 0; i + 1 < a.width; ++i) row[i] = row[i + 1];
      row[a.width - 1] = a.codes[r];
    }
    a.tokens[r] = a.codes[r];
  }
  if (r != 0) return;
  *a.index = index + 1;
  *a.position += 1;
  a.random[1] += a.random_numbers;
}

S1_KERNEL(advance, AdvanceArgs, 64, 1, advance)

}  // namespace s1
