// Compiles one op file for every instruction set, without per-file compiler flags.
//
//   #include "cpu/ops.h"
//   #ifndef S1_ISA
//   #define S1_OP_FILE "cpu/some_op.cpp"
//   #include "cpu/for_each_isa.h"   // includes this file again, once per instruction set
//   #else
//   namespace s1 { namespace S1_ISA { ... void some_op(...) } }
//   #endif
//
// In the inner passes S1_ISA is scalar, avx2 or avx512: a namespace name, with the vectors of cpu/simd.h in it. Every
// system header has to be included before the first pass: its functions must not be compiled for AVX.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/compiler.h"
#include "cpu/ops.h"

#define S1_ISA scalar
#include "cpu/simd_scalar.h"
#include "cpu/simd.h"
#include S1_OP_FILE
#undef S1_ISA

#if S1_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define S1_ISA avx2
#include "cpu/simd_avx2.h"
#include "cpu/simd.h"
#include S1_OP_FILE
#undef S1_ISA
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define S1_ISA avx512
#include "cpu/simd_avx512.h"
#include "cpu/simd.h"
#include S1_OP_FILE
#undef S1_ISA
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

#endif  // S1_X86
