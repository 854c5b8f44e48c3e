// attention_decode: out = softmax(q @ k.T / sqrt(D)) @ v over the first `length` positions of the cache.
//
//   q [B, H, D], k_cache and v_cache [R, G, S, D], out [B, H, D]: T. Row b reads cache b // (B/R); query head h reads
//   key/value head h // (H/G).
// With `append` it does the work of qk_norm_rotary_append too, in the same launch: q is then the joint projection
//   [B, (H+2G)*D], and k and v of the last position go into the cache on the way (B = R).
// Grid/block: (splits, G, B) blocks of 8 warps; a block has one key/value head and the query heads that share it, and
//   a part of the positions: as many parts as give each block 16 positions (32 at D = 64), at most `splits`. A warp
//   reads 2 (4) positions with one 16-byte load a lane. The last block of a head to finish merges the parts.
//   Length lives on the device, so that a replayed graph follows it.
// Memory: 2*G*D values a position, 4 KB in S1-mini's slow layers. With `append` the keys and values of earlier frames
//   are under way before the block waits for the projection; no kernel of this frame writes them.
// Numerics: scores, softmax and sums in float32, one rounding; a position's share of the sums does not depend on who
//   finishes first. Appended q and k are rounded to T like the results of qk_norm_rotary_append.
// Requires (split): 16-bit T, D 64 or 128, H/G 1, 2, 4 or 8, pointers aligned to 16 bytes. `plain` takes any D up to
// 256.
#include "device/attention.cuh"

namespace s1 {

struct AttentionDecodeArgs {
  const void* q;              // [B, H, D], or [B, (H+2G)*D] with append
  void* k_cache;              // [R, G, S, D]
  void* v_cache;              // [R, G, S, D]
  const int* length;          // [B]; `ahead` is added to it
  void* out;                  // [B, H, D]
  float* partial;             // [B, G, splits, H/G, D + 2]: weighted sum, total, top
  int* arrived;               // [B, G], zero before and after
  const void* q_norm_weight;  // [D] or null
  const void* k_norm_weight;  // [D] or null
  const void* cos_sin;        // [P, D/2, 2]
  int rows;                   // B
  int caches;                 // R
  int heads;                  // H
  int kv_heads;               // G
  int head_dim;               // D
  int capacity;               // S
  int splits;                 // at most kMostSplits
  int ahead;                  // 1 if `length` holds positions, 0 if it holds lengths
  int append;
  float eps;
};

constexpr int kAttentionWarps = 8;
constexpr int kMostSplits = 64;

// k of the new position, normalised and rotated, and v: into the cache, and into the registers of the lanes that will
// want them. One warp of one block has it among its positions.
template <class T, int kDim>
__device__ __forceinline__ void append_position(const AttentionDecodeArgs& a, const T* qkv, int g, int position,
                                                int start, const Vec16& norm, const Vec16& angles,
                                                Positions<T, kDim, kAttentionWarps, 2>& p) {
  using Head = HeadLanes<kDim>;
  const int column = Head::column();
#pragma unroll
  for (int i = 0; i < p.kLoads; ++i) {
    const int first = p.of(start, i) - Head::slot();
    if (position < first || position >= first + Head::kSlots) continue;  // the same in the whole warp
    const Vec16 k = norm_rotary<T, kDim>(load_vec(qkv + (a.heads + g) * kDim + column), a.k_norm_weight != nullptr,
                                         norm, angles, a.eps);
    const Vec16 v = load_vec(qkv + (a.heads + a.kv_heads + g) * kDim + column);
    if (first + Head::slot() != position) continue;
    p.k[i] = k;
    p.v[i] = v;
    store_vec(p.k_row + static_cast<int64>(position) * kDim + column, k);
    store_vec(p.v_row + static_cast<int64>(position) * kDim + column, v);
  }
}

template <class T, int kDim, int kGroup>
__device__ __forceinline__ void attention_decode_split(const AttentionDecodeArgs& a) {
  using Head = HeadLanes<kDim>;
  using Part = Positions<T, kDim, kAttentionWarps, 2>;
  constexpr int kItem = kDim + 2;
  __shared__ float merged[kAttentionWarps][kGroup][kItem];
  __shared__ float parts[kMostSplits][kGroup][2];  // total and top
  __shared__ bool last_block;
  launch_next();
  const int g = blockIdx.y, b = blockIdx.z, split = blockIdx.x, column = Head::column();
  if (!a.append) wait_for_inputs();
  const int length = a.length[b] + a.ahead;
  const bool valid = length >= 1 && length <= a.capacity;
  const int chunk = ceil_div(ceil_div(length, a.splits), Part::kStep) * Part::kStep;
  const int begin = split * chunk;
  const int used = valid ? ceil_div(length, chunk) : 1;
  if (split >= used) {
    if (a.append) wait_for_inputs();
    return;
  }
  const int64 cache = (static_cast<int64>(b / (a.rows / a.caches)) * a.kv_heads + g) * a.capacity * kDim;
  Part p;
  p.k_row = static_cast<T*>(a.k_cache) + cache;
  p.v_row = static_cast<T*>(a.v_cache) + cache;
  p.end = valid ? min(begin + chunk, length) : 0;
  p.stored = min(p.end, length - a.append);
  p.load(begin);
  Vec16 q_norm{}, k_norm{}, angles{};
  if (a.append && valid) {
    if (a.q_norm_weight) q_norm = load_weight(static_cast<const T*>(a.q_norm_weight) + column);
    if (a.k_norm_weight) k_norm = load_weight(static_cast<const T*>(a.k_norm_weight) + column);
    angles = load_weight(static_cast<const T*>(a.cos_sin) + static_cast<int64>(length - 1) * kDim + column);
  }
  if (a.append) wait_for_inputs();
  const int64 q_stride = a.append ? static_cast<int64>(a.heads + 2 * a.kv_heads) * kDim : a.heads * kDim;
  const T* q_row = static_cast<const T*>(a.q) + b * q_stride;
  float q[kGroup][8];
  const float scale = rsqrtf(static_cast<float>(kDim)) * kLog2e;
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    Vec16 raw = load_vec(q_row + (g * kGroup + h) * kDim + column);
    if (a.append) raw = norm_rotary<T, kDim>(raw, a.q_norm_weight != nullptr, q_norm, angles, a.eps);
    unpack8<T>(raw, q[h]);
#pragma unroll
    for (int e = 0; e < 8; ++e) q[h][e] *= scale;
  }
  SoftmaxSum sums[kGroup];
#pragma unroll
  for (int h = 0; h < kGroup; ++h) sums[h].clear();
  for (int start = begin; start < p.end; start += Part::kBlock) {
    if (a.append) append_position(a, q_row, g, length - 1, start, k_norm, angles, p);
    float score[kGroup][Part::kLoads];
#pragma unroll
    for (int h = 0; h < kGroup; ++h)
#pragma unroll
      for (int i = 0; i < Part::kLoads; ++i) {
        const float s = head_dot<T, kDim>(q[h], p.k[i]);
        score[h][i] = p.of(start, i) < p.end ? s : -infinity();
      }
    Vec16 v[Part::kLoads];
#pragma unroll
    for (int i = 0; i < Part::kLoads; ++i) v[i] = p.v[i];
    p.load(start + Part::kBlock);
#pragma unroll
    for (int h = 0; h < kGroup; ++h) sums[h].template add<T>(score[h], v);
  }
#pragma unroll
  for (int h = 0; h < kGroup; ++h) {
    sums[h].template merge_slots<Head::kLanes>();
    if (Head::slot() != 0) continue;
#pragma unroll
    for (int e = 0; e < 8; ++e) merged[warp_id()][h][column + e] = sums[h].value[e];
    if (column == 0) {
      merged[warp_id()][h][kDim] = sums[h].total;
      merged[warp_id()][h][kDim + 1] = sums[h].top;
    }
  }
  __syncthreads();
  // One thread an element of a query head: first over the warps, then, in the last block, over the parts.
  const int64 item = (static_cast<int64>(b) * a.kv_heads + g) * a.splits * kGroup * kItem;
  T* out = static_cast<T*>(a.out) + (static_cast<int64>(b) * a.heads + g * kGroup) * kDim;
  for (int i = threadIdx.x; i < kGroup * kDim; i += blockDim.x) {
    const int h = i / kDim, d = i % kDim;
    float top = -infinity(), total = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) top = fmaxf(top, merged[w][h][kDim + 1]);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float weight = exp2f(merged[w][h][kDim + 1] - top);
      total = fmaf(weight, merged[w][h][kDim], total);
      value = fmaf(weight, merged[w][h][d], value);
    }
    if (used == 1) {
      out[i] = from_float<T>(valid ? value / total : not_a_number());
      continue;
    }
    float* to = a.partial + item + (split * kGroup + h) * kItem;
    to[d] = value;
    if (d == 0) {
      to[kDim] = total;
      to[kDim + 1] = top;
    }
  }
  if (used == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // orders the whole block's writes: the barrier has made them this thread's
    last_block = atomicAdd(a.arrived + b * a.kv_heads + g, 1) == used - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last_block) return;
  for (int i = threadIdx.x; i < used * kGroup * 2; i += blockDim.x)
    (&parts[0][0][0])[i] = __ldcg(a.partial + item + i / 2 * kItem + kDim + i % 2);
  __syncthreads();
  for (int i = threadIdx.x; i < kGroup * kDim; i += blockDim.x) {
    const int h = i / kDim;
    const float* from = a.partial + item + h * kItem + i % kDim;
    float top = -infinity(), total = 0.0f, value = 0.0f;
    for (int s = 0; s < used; ++s) top = fmaxf(top, parts[s][h][1]);
#pragma unroll 8
    for (int s = 0; s < used; ++s) {
      const float weight = exp2f(parts[s][h][1] - top);
      total = fmaf(weight, parts[s][h][0], total);
      value = fmaf(weight, __ldcg(from + s * kGroup * kItem), value);
    }
    out[i] = from_float<T>(value / total);
  }
  if (threadIdx.x == 0) a.arrived[b * a.kv_heads + g] = 0;
}

// Any dtype, alignment and D <= 256: a block of 8 warps a query head, (H, B) blocks; lane i has elements i, i + 32, ...
template <class T>
__device__ void attention_decode_plain(const AttentionDecodeArgs& a) {
  constexpr int kMost = 8;
  __shared__ float merged[kAttentionWarps][kMost * kWarp + 2];
  launch_next();
  wait_for_inputs();
  const int h = blockIdx.x, b = blockIdx.y, D = a.head_dim, length = a.length[b] + a.ahead;
  T* out = static_cast<T*>(a.out) + (static_cast<int64>(b) * a.heads + h) * D;
  if (length < 1 || length > a.capacity) {
    for (int d = threadIdx.x; d < D; d += blockDim.x) out[d] = from_float<T>(not_a_number());
    return;
  }
  const T* q_row = static_cast<const T*>(a.q) + (static_cast<int64>(b) * a.heads + h) * D;
  const int64 cache = static_cast<int64>(b / (a.rows / a.caches)) * a.kv_heads + h / (a.heads / a.kv_heads);
  const T* k_row = static_cast<const T*>(a.k_cache) + cache * a.capacity * D;
  const T* v_row = static_cast<const T*>(a.v_cache) + cache * a.capacity * D;
  float q[kMost], value[kMost] = {}, top = -infinity(), total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    const int d = lane_id() + i * kWarp;
    q[i] = d < D ? to_float(q_row[d]) * (rsqrtf(static_cast<float>(D)) * kLog2e) : 0.0f;
  }
  for (int p = warp_id(); p < length; p += kAttentionWarps) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = lane_id() + i * kWarp;
      if (d < D) score = fmaf(q[i], to_float(k_row[static_cast<int64>(p) * D + d]), score);
    }
    score = warp_sum(score);
    const float higher = fmaxf(top, score), keep = exp2f(top - higher), weight = exp2f(score - higher);
    total = fmaf(total, keep, weight);
    top = higher;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int d = lane_id() + i * kWarp;
      if (d < D) value[i] = fmaf(weight, to_float(v_row[static_cast<int64>(p) * D + d]), value[i] * keep);
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) merged[warp_id()][lane_id() + i * kWarp] = value[i];
  if (lane_id() == 0) {
    merged[warp_id()][kMost * kWarp] = total;
    merged[warp_id()][kMost * kWarp + 1] = top;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += blockDim.x) {
    float highest = -infinity(), all = 0.0f, y = 0.0f;
    for (int w = 0; w < kAttentionWarps; ++w) highest = fmaxf(highest, merged[w][kMost * kWarp + 1]);
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float weight = exp2f(merged[w][kMost * kWarp + 1] - highest);
      all = fmaf(weight, merged[w][kMost * kWarp], all);
      y = fmaf(weight, merged[w][d], y);
    }
    out[d] = from_float<T>(y / all);
  }
}

#define S1_ATTENTION(dim, group, blocks)                                                 \
  template <class T>                                                                     \
  __device__ void attention_decode_d##dim##_g##group(const AttentionDecodeArgs& a) {     \
    attention_decode_split<T, dim, group>(a);                                            \
  }                                                                                      \
  S1_KERNEL_HALVES(attention_decode_d##dim##_g##group, AttentionDecodeArgs, 256, blocks, \
                   attention_decode_d##dim##_g##group)

S1_ATTENTION(64, 1, 2)
S1_ATTENTION(64, 2, 2)
S1_ATTENTION(64, 4, 1)
S1_ATTENTION(64, 8, 1)
S1_ATTENTION(128, 1, 2)
S1_ATTENTION(128, 2, 2)
S1_ATTENTION(128, 4, 1)
S1_ATTENTION(128, 8, 1)
S1_KERNEL(attention_decode_plain, AttentionDecodeArgs, 256, 2, attention_decode_plain)

}  // namespace s1
