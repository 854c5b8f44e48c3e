// qk_norm_rotary_append: q, k = rotary(norm(q)), rotary(norm(k)); k_cache[:, :, position] = k; v likewise; out = q.
//
//   qkv [B, (H+2G)*D] is q | k | v; cos_sin [P, D/2, 2]; k_cache, v_cache [R, G, S, D]; out [B, H, D]: T, contiguous.
//   position [B] int32. Row b belongs to cache b // (B/R).
// Grid/block: a warp a head of q, k or v, 4 warps a block.
// Memory: qkv once and as much written, 8 KB a row in S1-mini's slow layers: bound by latency.
// Numerics: norm and rotation in float32, one rounding; v is copied. A position outside the cache or the table makes
//   its row of `out` NaN and writes nothing to the caches.
// Requires: an even D. Any alignment.
#include "device/rotary.cuh"

namespace s1 {

struct QkNormRotaryAppendArgs {
  const void* qkv;            // [B, (H+2G)*D]
  const void* q_norm_weight;  // [D] or null
  const void* k_norm_weight;  // [D] or null
  const void* cos_sin;        // [P, D/2, 2]
  const int* position;        // [B]
  void* k_cache;              // [R, G, S, D]
  void* v_cache;              // [R, G, S, D]
  void* out;                  // [B, H, D]
  int rows;                   // B
  int caches;                 // R
  int heads;                  // H
  int kv_heads;               // G
  int head_dim;               // D
  int capacity;               // S
  int angles;                 // P
  float eps;
};

constexpr int kHeadsABlock = 4;

template <class T>
__device__ void qk_norm_rotary_append(const QkNormRotaryAppendArgs& a) {
  launch_next();
  wait_for_inputs();
  const int all_heads = a.heads + 2 * a.kv_heads;
  const int64 index = static_cast<int64>(blockIdx.x) * kHeadsABlock + warp_id();
  if (index >= static_cast<int64>(a.rows) * all_heads) return;
  const int b = static_cast<int>(index / all_heads), h = static_cast<int>(index % all_heads);
  const int dim = a.head_dim, position = a.position[b];
  const bool valid = position >= 0 && position < a.capacity && position < a.angles;
  const T* head = static_cast<const T*>(a.qkv) + index * dim;
  const T* cos_sin = static_cast<const T*>(a.cos_sin) + static_cast<int64>(valid ? position : 0) * dim;
  if (h < a.heads) {
    T* out = static_cast<T*>(a.out) + (static_cast<int64>(b) * a.heads + h) * dim;
    if (valid) {
      norm_rotate_head(out, head, static_cast<const T*>(a.q_norm_weight), cos_sin, dim, a.eps);
    } else {
      for (int i = lane_id(); i < dim; i += kWarp) out[i] = from_float<T>(not_a_number());
    }
    return;
  }
  if (!valid) return;
  const int g = (h - a.heads) % a.kv_heads, cache = b / (a.rows / a.caches);
  const int64 at = ((static_cast<int64>(cache) * a.kv_heads + g) * a.capacity + position) * dim;
  if (h < a.heads + a.kv_heads) {
    T* k = static_cast<T*>(a.k_cache) + at;
    norm_rotate_head(k, head, static_cast<const T*>(a.k_norm_weight), cos_sin, dim, a.eps);
  } else {
    T* v = static_cast<T*>(a.v_cache) + at;
    for (int i = lane_id(); i < dim; i += kWarp) v[i] = head[i];
  }
}

S1_KERNEL(qk_norm_rotary_append, QkNormRotaryAppendArgs, 128, 1, qk_norm_rotary_append)

}  // namespace s1
