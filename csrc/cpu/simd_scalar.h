// Vectors without intrinsics: eight lanes in an array, which compilers map to whatever the baseline has.
// The reference for the other instruction sets, and what machines other than x86-64 run.
namespace s1 {
namespace S1_ISA {

constexpr int kLanes = 8;
constexpr int kRegisters = 16;

struct Vec {
  float lane[kLanes];
};

S1_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
S1_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

S1_INLINE float widen(float v) { return v; }
S1_INLINE float widen(BF16 v) { return bits_to_float(static_cast<std::uint32_t>(v.bits) << 16); }
S1_INLINE float widen(FP16 v) {
  std::uint32_t sign = (v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the multiplication mends it, for subnormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

S1_INLINE void narrow(float* out, float v) { *out = v; }
S1_INLINE void narrow(BF16* out, float v) {
  std::uint32_t bits = float_to_bits(v);
  bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<std::uint16_t>(nan ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
S1_INLINE void narrow(FP16* out, float v) {
  std::uint32_t bits = float_to_bits(v), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu, half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 leaves the rounded bits at the bottom
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}

S1_INLINE Vec splat(float value) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = value;
  return r;
}

template <class T>
S1_INLINE Vec load(const T* p) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = widen(p[i]);
  return r;
}
template <class T>
S1_INLINE Vec load_first(const T* p, int n) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = i < n ? widen(p[i]) : 0.0f;
  return r;
}
template <class T>
S1_INLINE void store(T* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) narrow(p + i, v.lane[i]);
}
template <class T>
S1_INLINE void store_first(T* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) narrow(p + i, v.lane[i]);
}

#define S1_LANEWISE(expression)                                \
  {                                                            \
    Vec r;                                                     \
    for (int i = 0; i < kLanes; ++i) r.lane[i] = (expression); \
    return r;                                                  \
  }
S1_INLINE Vec operator+(Vec a, Vec b) S1_LANEWISE(a.lane[i] + b.lane[i]) S1_INLINE Vec operator-(Vec a, Vec b)
    S1_LANEWISE(a.lane[i] - b.lane[i]) S1_INLINE Vec operator*(Vec a, Vec b)
        S1_LANEWISE(a.lane[i] * b.lane[i]) S1_INLINE Vec operator/(Vec a, Vec b) S1_LANEWISE(a.lane[i] / b.lane[i])
    // The second operand where one is NaN, as x86 has it.
    S1_INLINE Vec max(Vec a, Vec b) S1_LANEWISE(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]) S1_INLINE Vec
    min(Vec a, Vec b) S1_LANEWISE(a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]) S1_INLINE Vec fma(Vec a, Vec b, Vec c)
        S1_LANEWISE(a.lane[i] * b.lane[i] + c.lane[i])
    // 2^n for integral n in [-126, 127]: 1.5 * 2^23 + 127 + n has the biased exponent in its lowest bits.
    S1_INLINE Vec exp2_integral(Vec n) S1_LANEWISE(bits_to_float(float_to_bits(n.lane[i] + 12583039.0f) << 23))
#undef S1_LANEWISE

    // Bit i: the relation holds in lane i.
    S1_INLINE unsigned greater(Vec a, Vec b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(a.lane[i] > b.lane[i]) << i;
  return mask;
}
S1_INLINE unsigned equal(Vec a, Vec b) {
  unsigned mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(a.lane[i] == b.lane[i]) << i;
  return mask;
}

S1_INLINE float sum(Vec v) {
  return ((v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6])) + ((v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]));
}
S1_INLINE float max_lane(Vec v) {
  float r = v.lane[0];
  for (int i = 1; i < kLanes; ++i) r = v.lane[i] > r ? v.lane[i] : r;
  return r;
}

}  // namespace S1_ISA
}  // namespace s1
