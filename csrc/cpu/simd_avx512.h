// Vectors of AVX-512 F, BW, VL and DQ. The same names as simd_scalar.h.
namespace s1 {
namespace S1_ISA {

constexpr int kLanes = 16;
constexpr int kRegisters = 32;

struct Vec {
  __m512 v;
};

S1_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
S1_INLINE Vec from_bf16(__m256i raw) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
S1_INLINE __m256i to_bf16(Vec v) {  // to nearest, ties to even; a NaN stays one
  __m512i bits = _mm512_castps_si512(v.v), top = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40)));
}
S1_INLINE __m256i to_fp16(Vec v) { return _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

S1_INLINE Vec splat(float value) { return {_mm512_set1_ps(value)}; }

S1_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
S1_INLINE Vec load(const BF16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
S1_INLINE Vec load(const FP16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
// The first n lanes from memory, zeros in the others; nothing behind them is read.
S1_INLINE Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
S1_INLINE Vec load_first(const BF16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
S1_INLINE Vec load_first(const FP16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}

S1_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
S1_INLINE void store(BF16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(v)); }
S1_INLINE void store(FP16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_fp16(v)); }
S1_INLINE void store_first(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v.v); }
S1_INLINE void store_first(BF16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(v)); }
S1_INLINE void store_first(FP16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_fp16(v)); }

S1_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
S1_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
S1_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
S1_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
S1_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
S1_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
S1_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
S1_INLINE Vec exp2_integral(Vec n) {
  __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}

S1_INLINE __m256 lower_half(Vec v) { return _mm512_castps512_ps256(v.v); }
S1_INLINE __m256 upper_half(Vec v) { return _mm512_maskz_extractf32x8_ps(0xff, v.v, 1); }

// Not by mask registers: GCC 12 spills one as 16 bits and takes 32 bits back.
S1_INLINE unsigned lanes_of(__m256 lower, __m256 upper) {
  return static_cast<unsigned>(_mm256_movemask_ps(lower)) | static_cast<unsigned>(_mm256_movemask_ps(upper)) << 8;
}
S1_INLINE unsigned greater(Vec a, Vec b) {
  return lanes_of(_mm256_cmp_ps(lower_half(a), lower_half(b), _CMP_GT_OQ),
                  _mm256_cmp_ps(upper_half(a), upper_half(b), _CMP_GT_OQ));
}
S1_INLINE unsigned equal(Vec a, Vec b) {
  return lanes_of(_mm256_cmp_ps(lower_half(a), lower_half(b), _CMP_EQ_OQ),
                  _mm256_cmp_ps(upper_half(a), upper_half(b), _CMP_EQ_OQ));
}

S1_INLINE float sum(Vec v) {
  const __m256 h = _mm256_add_ps(lower_half(v), upper_half(v));
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
S1_INLINE float max_lane(Vec v) {
  const __m256 h = _mm256_max_ps(lower_half(v), upper_half(v));
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

}  // namespace S1_ISA
}  // namespace s1
