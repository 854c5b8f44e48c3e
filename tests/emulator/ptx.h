// PTX instructions, as far as the kernels use them: translate.py makes each asm statement a list of calls of these.
//
// PTX(name) takes the operands in the order of the text, then the place. The name is the mnemonic without qualifiers of
// ordering, scope and cache (QUALIFIERS in translate.py), with underscores for dots and colons. %0 is the C++
// expression (an lvalue where it is a result), a literal is itself, a special register %%foo is reg_foo(), "_" is left
// out, [a + 16] is offset(a, 16). Loads and stores of any type and width are there. What nobody knows stops the build
// with an error that names the function and the instruction.
#pragma once

#include "cuda.h"

#define PTX(name) inline void name

namespace emulator {
namespace ptx {

inline unsigned reg_tid_x() { return threadIdx.x; }
inline unsigned reg_ctaid_x() { return blockIdx.x; }
inline unsigned reg_smid() { return blockIdx.x; }
inline unsigned reg_nctaid_x() { return gridDim.x; }
inline unsigned reg_laneid() { return (unsigned)lane(); }
inline unsigned long long reg_globaltimer() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// ---- memory. An address is a pointer, or a number in shared memory.
template <class A>
inline A offset(A a, int n) {
  if constexpr (std::is_pointer<A>::value)
    return (A)((uintptr_t)a + n);
  else
    return (A)(a + n);
}
inline uint64_t* word64(uint32_t at, Site site) { return (uint64_t*)from_shared(at, site); }

template <class E, class A>
inline E* element(bool shared, A at, size_t count, Site site) {
  void* p = shared ? from_shared(at, site) : (void*)(uintptr_t)at;
  if ((uintptr_t)p % (sizeof(E) * count)) fail(site, "an access to %zu bytes is not aligned: %p", sizeof(E) * count, p);
  return (E*)p;
}
// One element to or from a register of any type: bits where the sizes agree, else the number.
template <class D, class S>
inline D converted(S from) {
  if constexpr (sizeof(D) == sizeof(S))
    return of_bits<D>(bits_of(from));
  else
    return (D)from;
}
// Of elements E at the address. `polls`: others may write there meanwhile.
template <class E, class A, class... D>
__forceinline__ void load(bool shared, bool polls, Site site, A at, D&... to) {
  const E* p = element<E>(shared, at, sizeof...(D), site);
  if (polls) before_poll(p, site);
  ((to = converted<D>(*(const volatile E*)p++)), ...);
}
template <class E, class A, class... S>
__forceinline__ void store(bool shared, Site site, A at, const S&... from) {
  E* p = element<E>(shared, at, sizeof...(S), site);
  ((*(volatile E*)p++ = converted<E>(from)), ...);
  ++progress;
  forget_polls();
}

// ---- registers
template <class D, class S>
PTX(mov_u32)(D& d, S s, Site) {
  d = (D)s;
}
template <class D, class S>
PTX(mov_u64)(D& d, S s, Site) {
  d = (D)s;
}
template <class D, class X, class Y>
PTX(selp_u32)(D& d, X x, Y y, bool p, Site) {
  d = p ? (D)x : (D)y;
}
PTX(cvt_f32_f16)(float& y, uint16_t x, Site) { y = from_float16(x); }
PTX(cvt_rn_f16_f32)(uint16_t& y, float x, Site) { y = to_float16(x); }
PTX(cvt_rn_bf16_f32)(uint16_t& y, float x, Site) { y = to_bfloat16(x); }
PTX(cvt_rn_f16x2_f32)(uint32_t& y, float high, float low, Site) { y = to_float16(low) | to_float16(high) << 16; }
PTX(cvt_rn_bf16x2_f32)(uint32_t& y, float high, float low, Site) { y = to_bfloat16(low) | to_bfloat16(high) << 16; }
PTX(ex2_approx_ftz_f32)(float& y, float x, Site) { y = exp2f(x); }
PTX(lg2_approx_ftz_f32)(float& y, float x, Site) { y = log2f(x); }
PTX(rsqrt_approx_ftz_f32)(float& y, float x, Site) { y = rsqrtf(x); }
PTX(rcp_approx_ftz_f32)(float& y, float x, Site) { y = 1.0f / x; }

// Rounds to odd, so that a second rounding, to 16 bits, is as good as one.
inline float to_odd(double x) {
  const float y = (float)x;
  if ((double)y == x || x != x || isinf(y)) return y;
  const float towards_zero = fabs((double)y) > fabs(x) ? nextafterf(y, 0.0f) : y;
  return __uint_as_float(__float_as_uint(towards_zero) | 1u);
}
PTX(fma_rn_bf16x2)(uint32_t& d, uint32_t a, uint32_t b, uint32_t c, Site) {
  const auto half = [&](int shift) {
    const auto of = [&](uint32_t x) { return (double)from_bfloat16(x >> shift & 0xffff); };
    return (uint32_t)to_bfloat16(to_odd(of(a) * of(b) + of(c))) << shift;
  };
  d = half(0) | half(16);
}

// ---- nothing to order: one CPU thread runs all
PTX(griddepcontrol_wait)(Site) {}
PTX(griddepcontrol_launch_dependents)(Site) {}
PTX(fence_mbarrier_init)(Site) {}

// ---- barriers
PTX(barrier_sync)(int number, int count, Site site) { barrier(number, count, true, 0, site); }
PTX(barrier_arrive)(int number, int count, Site site) { barrier(number, count, false, 0, site); }

PTX(mbarrier_init_shared_b64)(uint32_t at, int arrivals, Site site) { mbarrier_init(word64(at, site), arrivals); }
PTX(mbarrier_arrive_shared_b64)(uint32_t at, Site site) { mbarrier_arrive(word64(at, site), 0, site); }
PTX(mbarrier_arrive_shared_b64)(uint32_t at, int times, Site site) {
  while (times-- > 0) mbarrier_arrive(word64(at, site), 0, site);
}
PTX(mbarrier_arrive_shared_b64)(unsigned long long& state, uint32_t at, Site site) {
  state = mbarrier_arrive(word64(at, site), 0, site);
}
PTX(mbarrier_arrive_expect_tx_shared_b64)(uint32_t at, int bytes, Site site) {
  mbarrier_arrive(word64(at, site), bytes, site);
}
PTX(mbarrier_test_wait_shared_b64)(bool& over, uint32_t at, unsigned long long state, Site site) {
  over = mbarrier_over(word64(at, site), (uint32_t)state, site);
}
PTX(mbarrier_try_wait_parity_shared_b64)(bool& over, uint32_t at, uint32_t parity, Site site) {
  over = mbarrier_over(word64(at, site), parity, site);
}

// ---- copies
PTX(createpolicy_fractional_L2_evict_first_b64)(unsigned long long& policy, float, Site) { policy = 0; }
PTX(createpolicy_fractional_L2_evict_last_L2_evict_first_b64)(unsigned long long& policy, float, Site) { policy = 0; }
PTX(cp_async_bulk_shared_global_mbarrier_complete_tx_bytes)(uint32_t to, const void* from, int bytes, uint32_t mbarrier,
                                                            Site site) {
  bulk_copy(from_shared(to, site), from, bytes, word64(mbarrier, site), site);
}
PTX(cp_async_shared_global)(uint32_t to, const void* from, int bytes, Site site) {
  async_copy(from_shared(to, site), from, bytes, site);
}
PTX(prefetch_global_L2)(const void* at, Site) { (void)*(const volatile char*)at; }
PTX(cp_async_commit_group)(Site) { ++current->group; }
PTX(cp_async_wait_group)(int n, Site) { do_async_copies(current->group > (uint32_t)n ? current->group - n : 0); }
PTX(cp_async_wait_all)(Site) { do_async_copies(~0u); }

// ---- matrices of a warp
// sum [16, 8] += a [16, 8 * halves] @ b [8 * halves, 8], in double, rounded once; a tensor core sums in another order.
template <float (*kOf)(uint32_t)>
__noinline__ void multiply(Meeting* m, int halves) {
  float a[16][16], b[16][8];
  double c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4 * 2;
    for (int i = 0; i < 2 * halves; ++i) {
      const int h = i / 2, e = i % 2;
      const auto half = [&](int fragment) { return kOf(m->fragment[fragment][l] >> 16 * e & 0xffff); };
      a[g][8 * h + t + e] = half(2 * h);
      a[g + 8][8 * h + t + e] = half(2 * h + 1);
      b[8 * h + t + e][g] = half(4 + h);
    }
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][t + i % 2] = m->sum[i][l];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 8 * halves; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] += (double)a[i][k] * b[k][j];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) m->sum[i][l] = (float)c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
template <float (*kOf)(uint32_t)>
inline void mma(float* const (&d)[4], const uint32_t (&fragment)[6], const float (&c)[4], int halves, Site site) {
  Meeting* m = join(~0u, kMatrix, site);
  const int l = lane();
  for (int i = 0; i < 6; ++i) m->fragment[i][l] = fragment[i];
  for (int i = 0; i < 4; ++i) m->sum[i][l] = c[i];
  if (complete(m)) multiply<kOf>(m, halves);
  meet(m, site);
  for (int i = 0; i < 4; ++i) *d[i] = m->sum[i][l];
  part(m);
}
PTX(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32)(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                         uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                         uint32_t b1, float c0, float c1, float c2, float c3,
                                                         Site site) {
  mma<from_bfloat16>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3}, 2, site);
}
PTX(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32)(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                       uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                                       float c0, float c1, float c2, float c3, Site site) {
  mma<from_float16>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, {c0, c1, c2, c3}, 2, site);
}
PTX(mma_sync_aligned_m16n8k8_row_col_f32_f16_f16_f32)(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                      uint32_t a1, uint32_t b0, float c0, float c1, float c2, float c3,
                                                      Site site) {
  mma<from_float16>({&d0, &d1, &d2, &d3}, {a0, a1, 0, 0, b0, 0}, {c0, c1, c2, c3}, 1, site);
}

// ldmatrix, stmatrix: lane 8m + r has the address of row r of matrix m.
inline const uint16_t* matrix_row(const Meeting* m, int row, Site site) {
  const auto at = (uint32_t)m->value[row];
  if (at % 16) fail(site, "a matrix' row is not aligned to 16 bytes");
  return (const uint16_t*)from_shared(at, site);
}
inline void load_matrices(uint32_t at, bool transposed, uint32_t* const (&to)[4], Site site) {
  Meeting* m = join(~0u, kMatrix, site);
  const int l = lane();
  m->value[l] = at;
  meet(m, site);
  for (int i = 0; i < 4; ++i) {
    const auto half = [&](int e) -> uint32_t {
      const int row = transposed ? l % 4 * 2 + e : l / 4, column = transposed ? l / 4 : l % 4 * 2 + e;
      return matrix_row(m, 8 * i + row, site)[column];
    };
    *to[i] = half(0) | half(1) << 16;
  }
  part(m);
}
PTX(ldmatrix_sync_aligned_m8n8_x4_shared_b16)(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t at,
                                              Site site) {
  load_matrices(at, false, {&a, &b, &c, &d}, site);
}
PTX(ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16)(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t at,
                                                    Site site) {
  load_matrices(at, true, {&a, &b, &c, &d}, site);
}
PTX(stmatrix_sync_aligned_m8n8_x4_shared_b16)(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d, Site site) {
  Meeting* m = join(~0u, kMatrix, site);
  const int l = lane();
  m->value[l] = at;
  meet(m, site);
  const uint32_t words[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) ((uint32_t*)matrix_row(m, 8 * i + l / 4, site))[l % 4] = words[i];
  part(m);
}

}  // namespace ptx
}  // namespace emulator
