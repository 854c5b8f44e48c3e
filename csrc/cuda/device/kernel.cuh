// What every kernel file starts from: the S1_KERNEL macro, fixed-size integers, programmatic dependent launch.
//
// Device code includes nothing from outside csrc/cuda, so that nvcc and NVRTC compile the same file on every system.
// S1_DTYPES is a mask of the dtypes to compile: 1 float32, 2 bfloat16, 4 float16; NVRTC asks for the one in use.
// S1_RACECHECK is for compute-sanitizer: waits are patient, no lane relies on a __syncwarp for what another saw, lanes
// of a warp do not wait for different barriers at once, and a warp arrives at a barrier in one piece.
#pragma once

#ifndef S1_DTYPES
#define S1_DTYPES 7
#endif

#ifndef S1_RACECHECK
#define S1_RACECHECK 0
#endif

#ifdef __CUDA_ARCH__
#define S1_ARCH __CUDA_ARCH__
#else
#define S1_ARCH 0  // the host pass of nvcc
#endif

namespace s1 {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

// 16 bytes, loaded and stored as one.
struct __align__(16) Vec16 {
  uint32 word[4];
};

// Programmatic dependent launch (sm_90 and later; elsewhere, and without the launch attribute, these do nothing).
// wait() returns when all that earlier kernels of the stream wrote is visible. Before it a kernel may touch only what
// no kernel of the same frame writes: weights, and state of earlier frames.
// Every thread of every kernel that waits does so before its first dependent access, and every kernel waits, so that a
// kernel's end means the end of all before it.
__device__ __forceinline__ void wait_for_inputs() {
#if S1_ARCH >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start its own prologue as soon as all blocks of this one have called this.
__device__ __forceinline__ void launch_next() {
#if S1_ARCH >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace s1

// S1_KERNEL(name, Args, threads, blocks, body) defines the kernels name_float32, name_bfloat16 and name_float16. Each
// takes one Args by value and runs body<T>(args); `threads` and `blocks` are its __launch_bounds__. Within the
// compiled module a kernel also enters itself into the table that csrc/cuda/kernel_table.cpp keeps.
#ifdef __CUDACC_RTC__
#define S1_ENTER(name)
#else
namespace s1 {
struct KernelEntry {
  KernelEntry(const char* name, const void* symbol);
};
}  // namespace s1
#define S1_ENTER(name) static const s1::KernelEntry name##_entry(#name, reinterpret_cast<const void*>(&name));
#endif

#define S1_ENTRY(name, T, Args, threads, blocks, body)                                                   \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Args args) { body<T>(args); } \
  S1_ENTER(name)

#if S1_DTYPES & 1
#define S1_KERNEL_FLOAT32(name, Args, threads, blocks, body) \
  S1_ENTRY(name##_float32, float, Args, threads, blocks, body)
#else
#define S1_KERNEL_FLOAT32(name, Args, threads, blocks, body)
#endif
#if S1_DTYPES & 2
#define S1_KERNEL_BFLOAT16(name, Args, threads, blocks, body) \
  S1_ENTRY(name##_bfloat16, s1::bfloat16, Args, threads, blocks, body)
#else
#define S1_KERNEL_BFLOAT16(name, Args, threads, blocks, body)
#endif
#if S1_DTYPES & 4
#define S1_KERNEL_FLOAT16(name, Args, threads, blocks, body) \
  S1_ENTRY(name##_float16, s1::float16, Args, threads, blocks, body)
#else
#define S1_KERNEL_FLOAT16(name, Args, threads, blocks, body)
#endif

#define S1_KERNEL_HALVES(name, Args, threads, blocks, body) \
  S1_KERNEL_BFLOAT16(name, Args, threads, blocks, body)     \
  S1_KERNEL_FLOAT16(name, Args, threads, blocks, body)
#define S1_KERNEL(name, Args, threads, blocks, body)   \
  S1_KERNEL_FLOAT32(name, Args, threads, blocks, body) \
  S1_KERNEL_HALVES(name, Args, threads, blocks, body)
