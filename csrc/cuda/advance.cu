// advance: after a frame, the state that the next one starts from; s1kernels/backends/cuda/frame_graph.py keeps it.
//
// Grid/block: one block; a thread a row of the window.
#include "device/convert.cuh"

namespace s1 {

struct AdvanceArgs {
  int* tokens;         // [N+1], the last frame; receives `codes`
  const int* codes;    // [N+1], the new frame
  int* position;       // [1]
  int* window;         // [N+1, W], the frames that repetition control sees
  int* index;          // [1], frames in the window's count; -1: the frame after a prompt, which is not remembered
  int64* random;       // [2] seed, offset
  int codebooks;       // N
  int width;           // W
  int fill_first;      // the window fills from the left before it shifts (S1 line)
  int random_numbers;  // that the frame took from the offset
};

template <class T>
__device__ void advance(const AdvanceArgs& a) {
  launch_next();
  wait_for_inputs();
  const int r = threadIdx.x, index = *a.index;
  __syncthreads();
  if (r <= a.codebooks) {
    int* row = a.window + r * a.width;
    if (index < 0) {
      for (int i = 0; i < a.width; ++i) row[i] = 0;
    } else if (a.fill_first && index < a.width) {
      row[index] = a.codes[r];
    } else {
      for (int i = 0; i + 1 < a.width; ++i) row[i] = row[i + 1];
      row[a.width - 1] = a.codes[r];
    }
    a.tokens[r] = a.codes[r];
  }
  if (r != 0) return;
  *a.index = index + 1;
  *a.position += 1;
  a.random[1] += a.random_numbers;
}

S1_KERNEL(advance, AdvanceArgs, 64, 1, advance)

}  // namespace s1
