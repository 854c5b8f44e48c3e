// Which instruction set runs: detection, the tables of slice functions, and the choice.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/compiler.h"
#include "cpu/ops.h"

#if S1_X86 && defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace s1 {

#define S1_DECLARE_OPS(isa)                                                                         \
  namespace isa {                                                                                   \
  void embed_frame(const EmbedFrame&, int, int);                                                    \
  void rms_norm_qkv(const RmsNormQkv&, int, int);                                                   \
  void qk_norm_rotary_append(const QkNormRotaryAppend&, int, int);                                  \
  void attention_decode(const AttentionDecode&, int, int);                                          \
  void linear_residual(const LinearResidual&, int, int);                                            \
  void rms_norm_swiglu(const RmsNormSwiglu&, int, int);                                             \
  void rms_norm_logits(const RmsNormLogits&, int, int);                                             \
  void rms_norm(const RmsNorm&, int, int);                                                          \
  void swiglu(const Swiglu&, int, int);                                                             \
  void snake(const Snake&, int, int);                                                               \
  void sample_token(const SampleToken&, int, int);                                                  \
  const Kernels table = {embed_frame,     rms_norm_qkv,    qk_norm_rotary_append, attention_decode, \
                         linear_residual, rms_norm_swiglu, rms_norm_logits,       rms_norm,         \
                         swiglu,          snake,           sample_token};                           \
  }
S1_DECLARE_OPS(scalar)
#if S1_X86
S1_DECLARE_OPS(avx2)
S1_DECLARE_OPS(avx512)
#endif
#undef S1_DECLARE_OPS

namespace {

#if S1_X86
#if defined(_MSC_VER) && !defined(__clang__)
bool bit(int word, int index) { return (word >> index & 1) != 0; }
bool has_avx2() {
  int leaf1[4], leaf7[4];
  __cpuidex(leaf1, 1, 0);
  __cpuidex(leaf7, 7, 0);
  const bool fma = bit(leaf1[2], 12), osxsave = bit(leaf1[2], 27), f16c = bit(leaf1[2], 29), avx2 = bit(leaf7[1], 5);
  return fma && f16c && avx2 && osxsave && (_xgetbv(0) & 0x6) == 0x6;
}
bool has_avx512() {
  int leaf7[4];
  __cpuidex(leaf7, 7, 0);
  const bool f = bit(leaf7[1], 16), dq = bit(leaf7[1], 17), bw = bit(leaf7[1], 30), vl = bit(leaf7[1], 31);
  return has_avx2() && f && dq && bw && vl && (_xgetbv(0) & 0xe6) == 0xe6;
}
#else
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#endif

Isa find(const std::string& name) {
  std::string known;
  for (Isa isa : available_isas()) {
    if (name == name_of(isa)) return isa;
    known += known.empty() ? name_of(isa) : std::string(", ") + name_of(isa);
  }
  throw std::invalid_argument("set_isa: name must be one of " + known + " on this machine, got '" + name + "'");
}

Isa choose() {
  const char* wanted = std::getenv("S1KERNELS_ISA");
  return wanted && *wanted ? find(wanted) : available_isas().back();
}

std::atomic<Isa>& choice() {
  static std::atomic<Isa> isa{choose()};
  return isa;
}

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::scalar};
#if S1_X86
  if (has_avx2()) isas.push_back(Isa::avx2);
  if (has_avx512()) isas.push_back(Isa::avx512);
#endif
  return isas;
}

const char* name_of(Isa isa) { return isa == Isa::scalar ? "scalar" : isa == Isa::avx2 ? "avx2" : "avx512"; }

Isa current_isa() { return choice().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { choice().store(find(name), std::memory_order_relaxed); }

const Kernels& kernels(Isa isa) {
#if S1_X86
  if (isa == Isa::avx512) return avx512::table;
  if (isa == Isa::avx2) return avx2::table;
#else
  static_cast<void>(isa);
#endif
  return scalar::table;
}

float* thread_scratch(std::size_t floats) {
  constexpr std::size_t kLine = 64;
  thread_local std::vector<float> buffer;
  if (buffer.size() < floats + kLine / sizeof(float)) buffer.resize(floats + kLine / sizeof(float));
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(buffer.data());
  return buffer.data() + (kLine - address % kLine) % kLine / sizeof(float);
}

}  // namespace s1
