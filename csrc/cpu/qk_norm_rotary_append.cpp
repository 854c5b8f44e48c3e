// qk_norm_rotary_append: from the projections of one token to its query and its entry in the cache.
//
// q, k: RMSNorm over D if weights are given, then pairs (a, b) = (2i, 2i+1) become (a*c - b*s, b*c + a*s) with
// (c, s) = cos_sin[position]; k and v are written at k_cache[r, g, position], q to out.
//   qkv [B, (H+2G)*D] as q | k | v, head-major; q_norm_weight, k_norm_weight [D] or null; cos_sin [P, D/2, 2];
//   position [B] int32; k_cache, v_cache [R, G, S, D]; out [B, H, D]. Row b belongs to cache b / (B/R).
// Who: thread t does a range of the R*G key/value heads with their query heads.
// Memory: 2 * B * (H+2G) * D elements; nothing beside the projections.
// Numerics: fp32 from qkv to the one rounding of q and k; v is copied.
// Requires: positions within the cache and the rotary table; rows of one cache have distinct positions.
#include "cpu/ops.h"
#ifndef S1_ISA
#define S1_OP_FILE "cpu/qk_norm_rotary_append.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

// out [D] = rotate(rms_norm(head [D])). `values` and `angles` are scratch of padded(D) floats; angles holds cos_sin's
// row.
template <class T>
void norm_and_rotate(const T* head, const T* norm_weight, const float* angles, float eps, int dim, float* values,
                     T* out) {
  Vec squares = splat(0.0f);
  for (int d = 0; d < dim; d += kLanes) {
    const Vec v = load_upto(head + d, dim - d);
    squares = fma(v, v, squares);
    store(values + d, v);
  }
  if (norm_weight) {
    const Vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + eps));
    for (int d = 0; d < dim; d += kLanes)
      store(values + d, load(values + d) * scale * load_upto(norm_weight + d, dim - d));
  }
  for (int d = 0; d < dim; d += 2) {
    const float a = values[d], b = values[d + 1], c = angles[d], s = angles[d + 1];
    values[d] = a * c - b * s;
    values[d + 1] = b * c + a * s;
  }
  for (int d = 0; d < dim; d += kLanes) store_upto(out + d, load(values + d), dim - d);
}

template <class T>
void qk_norm_rotary_append_as(const QkNormRotaryAppend& a, int thread, int threads) {
  const std::int64_t dim = a.head_dim, row_dim = (a.heads + 2 * a.kv_heads) * dim;
  const int group = a.heads / a.kv_heads, rows_per_cache = a.rows / a.caches;
  const T* k_norm_weight = static_cast<const T*>(a.k_norm_weight);
  const T* q_norm_weight = static_cast<const T*>(a.q_norm_weight);
  float* values = thread_scratch(static_cast<std::size_t>(2 * padded(dim)));
  float* angles = values + padded(dim);
  const Range heads = share(static_cast<std::int64_t>(a.caches) * a.kv_heads, thread, threads);
  for (std::int64_t head = heads.begin; head < heads.end; ++head) {
    const std::int64_t cache = head / a.kv_heads, g = head % a.kv_heads;
    for (std::int64_t b = cache * rows_per_cache; b < (cache + 1) * rows_per_cache; ++b) {
      const T* cos_sin = static_cast<const T*>(a.cos_sin) + a.position[b] * dim;
      for (std::int64_t d = 0; d < dim; d += kLanes) store(angles + d, load_upto(cos_sin + d, dim - d));
      const T* row = static_cast<const T*>(a.qkv) + b * row_dim;
      for (std::int64_t h = g * group; h < (g + 1) * group; ++h) {
        T* q = static_cast<T*>(a.out) + (b * a.heads + h) * dim;
        norm_and_rotate(row + h * dim, q_norm_weight, angles, a.eps, a.head_dim, values, q);
      }
      const std::int64_t entry = (head * a.capacity + a.position[b]) * dim;
      const T* k = row + (a.heads + g) * dim;
      norm_and_rotate(k, k_norm_weight, angles, a.eps, a.head_dim, values, static_cast<T*>(a.k_cache) + entry);
      std::memcpy(static_cast<T*>(a.v_cache) + entry, k + a.kv_heads * dim, static_cast<std::size_t>(dim) * sizeof(T));
    }
  }
}

void qk_norm_rotary_append(const QkNormRotaryAppend& a, int thread, int threads) {
  if (a.dtype == DType::float32) return qk_norm_rotary_append_as<float>(a, thread, threads);
  if (a.dtype == DType::bfloat16) return qk_norm_rotary_append_as<BF16>(a, thread, threads);
  qk_norm_rotary_append_as<FP16>(a, thread, threads);
}

}  // namespace S1_ISA
}  // namespace s1
#endif
