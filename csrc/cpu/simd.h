// fp32 vectors for one instruction set, and what is written on top of them once for all.
//
// simd_scalar.h, simd_avx2.h and simd_avx512.h give the same names: `Vec` of kLanes floats, load and store of float,
// bf16 and fp16 (all without alignment; stores round to nearest even), + - * / fma min max, comparisons as bit masks,
// sums over the lanes in a fixed order. These files hold all intrinsics. Included by for_each_isa.h only.
namespace s1 {
namespace S1_ISA {

constexpr unsigned kAllLanes = (1u << kLanes) - 1;  // greater() and equal() where they hold in every lane

S1_INLINE std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// e^x for x <= 88, relative error below 2e-7. Below -87.3 the result stays e^-87.3 (1.2e-38). NaN stays NaN.
S1_INLINE Vec exp(Vec x) {
  // x = n ln 2 + r, |r| <= ln(2)/2. Adding and subtracting 1.5 * 2^23 rounds to an integer; ln 2 in two parts keeps
  // r exact. The polynomial is the Taylor series, whose remainder at degree 7 is below half an ulp.
  const Vec clamped = max(splat(-87.3f), x), magic = splat(12582912.0f);
  const Vec n = fma(clamped, splat(1.44269504f), magic) - magic;
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), clamped));
  Vec p = splat(1.0f / 5040.0f);
  p = fma(p, r, splat(1.0f / 720.0f));
  p = fma(p, r, splat(1.0f / 120.0f));
  p = fma(p, r, splat(1.0f / 24.0f));
  p = fma(p, r, splat(1.0f / 6.0f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return p * exp2_integral(n);
}

S1_INLINE Vec silu(Vec x) { return x / (splat(1.0f) + exp(min(splat(88.0f), splat(0.0f) - x))); }

// sin(x)^2 between 0 and 1, its error below 3e-7 + 1e-7 |x|. NaN stays NaN.
S1_INLINE Vec sin_squared(Vec x) {
  // x = n pi + r, |r| <= pi/2: the square has the period pi. pi in parts keeps r exact; the polynomial is the Taylor
  // series, whose remainder at degree 11 is below 6e-8.
  const Vec magic = splat(12582912.0f);
  const Vec n = fma(x, splat(0.318309886f), magic) - magic;
  const Vec left = fma(n, splat(-6.27711415e-7f), fma(n, splat(-9.67025757e-4f), fma(n, splat(-3.140625f), x)));
  const Vec r = max(splat(-1.5708f), min(splat(1.5708f), left)), s = r * r;
  Vec p = splat(-1.0f / 39916800.0f);
  p = fma(p, s, splat(1.0f / 362880.0f));
  p = fma(p, s, splat(-1.0f / 5040.0f));
  p = fma(p, s, splat(1.0f / 120.0f));
  p = fma(p, s, splat(-1.0f / 6.0f));
  const Vec sine = fma(r * s, p, r);
  return sine * sine;
}

// The lanes from p when n elements are left there.
template <class T>
S1_INLINE Vec load_upto(const T* p, std::int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}
template <class T>
S1_INLINE void store_upto(T* p, Vec v, std::int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_first(p, v, static_cast<int>(n));
  }
}

// One value through the vector conversions, which all instruction sets round alike.
template <class T>
S1_INLINE float load_one(const T* p) {
  float lanes[kLanes];
  store(lanes, load_first(p, 1));
  return lanes[0];
}
template <class T>
S1_INLINE void store_one(T* p, float value) {
  store_first(p, splat(value), 1);
}

}  // namespace S1_ISA
}  // namespace s1
