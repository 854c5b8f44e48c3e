// swiglu: out = gate / (1 + e^-gate) * up, element by element.
//
//   gate, up, out [B, F]: T, contiguous.
// Grid/block: blocks of 256 threads; a thread owns 16 bytes.
// Memory: 3*B*F values, bound by it.
// Numerics: float32, one rounding.
// Requires: nothing; 16-byte accesses where the pointers allow them, else one element at a time.
#include "device/pack.cuh"

namespace s1 {

struct SwigluArgs {
  const void* gate;  // [B, F]
  const void* up;    // [B, F]
  void* out;         // [B, F]
  int rows;          // B
  int hidden;        // F
};

constexpr int kSwigluThreads = 256;

template <class T, int kWidth>
__device__ __forceinline__ void swiglu_elements(const SwigluArgs& a, int64 at) {
  float gate[kWidth], up[kWidth];
  load_floats<T, kWidth>(static_cast<const T*>(a.gate) + at, gate);
  load_floats<T, kWidth>(static_cast<const T*>(a.up) + at, up);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) up[e] *= gate[e] / (1.0f + expf(-gate[e]));
  store_floats<T, kWidth>(static_cast<T*>(a.out) + at, up);
}

template <class T>
__device__ void swiglu(const SwigluArgs& a) {
  launch_next();
  wait_for_inputs();
  const int64 size = static_cast<int64>(a.rows) * a.hidden;
  const int64 first = static_cast<int64>(blockIdx.x) * kSwigluThreads * kPack<T>;
  const int64 mine = first + static_cast<int>(threadIdx.x) * kPack<T>;
  if (all_aligned(0, a.gate, a.up, a.out) && first + kSwigluThreads * kPack<T> <= size) {
    swiglu_elements<T, kPack<T>>(a, mine);
  } else {
    for (int i = 0; i < kPack<T>; ++i) {
      const int64 at = first + i * kSwigluThreads + static_cast<int>(threadIdx.x);
      if (at < size) swiglu_elements<T, 1>(a, at);
    }
  }
}

S1_KERNEL(swiglu, SwigluArgs, 256, 1, swiglu)

}  // namespace s1
