// persistent_frame: decode_frame in one launch, for one sequence of a model of S1-mini's proportions.
//
// What it computes is what s1kernels/backends/cuda/decode_frame.py computes with the ops' kernels; a list of phases
// (persistent_frame.py writes it) says in which order. Every block owns an equal share of the rows of every matrix.
// Grid/block: kBlocks blocks, one an SM, all resident at once (cooperative launch). One warp streams the block's share
//   of the weights, and of a long past, through a ring in shared memory, phase after phase, without ever waiting for
//   activations; 16 warps consume it, each a sixteenth of the columns, and take what they can into registers before
//   they wait. Activations go from block to block as words that are their own flags (device/exchange.cuh). What is
//   small is computed by all blocks alike instead of being passed on: norms, the frame's embedding, the fast stack's
//   attention, the fast codes' draws.
// Memory: every weight once a frame, the fast stack's N-1 times, of which L2 keeps a share; the past's keys and values
//   once. Bound by it. Packed weights (own_block() in device/frame_state.cuh) come from the half of L2 that is near.
// Numerics: as the ops': results are rounded to T where the ops' are, slow attention's part by part; a normalised x
//   keeps 16 bits or more (device/gemv.cuh). The same bits in every call: all sums have a fixed order.
// Requires: sm_90 to sm_11x (an sm_12x has too little shared memory), kBlocks SMs, 16-bit T, both stacks 1024 wide, all
//   of a block's shares whole; slow D 128 and H/G 2 with G*16 = kBlocks, fast D 64 and H/G 2 without norms, no biases,
//   no projection, no repetition-aware draws.
#include "device/frame_draws.cuh"

namespace s1 {

template <class T>
struct PersistentFrame : FrameDraws<T> {
  using Base = FrameDraws<T>;
  using Base::a;
  using Base::s;

  // The last warp, which has the least to do, starts to copy phases into their slots.
  __device__ __forceinline__ bool fetches() const { return this->warp() == kWorkers - 1; }
  __device__ __forceinline__ void fetch_phase(int p) {
    constexpr int kPieces = sizeof(Phase) / 8;
    if (p >= a.phase_count || this->lane() >= kPieces) return;
    copy_async8(reinterpret_cast<uint64*>(&s.phases[p % 8]) + this->lane(),
                reinterpret_cast<const uint64*>(a.phases + s.first_phase + p) + this->lane());
  }

  __device__ void run() {
    for (int i = threadIdx.x; i < min(a.codebooks, kPlaces) * kFastDim; i += kWorkers * 32)
      (&s.angles[0][0])[i] = static_cast<const T*>(a.fast_cos_sin)[i];
    if (fetches()) {
      for (int p = 0; p < 4; ++p) fetch_phase(p);
      copies_done();
    }
    wait_for_inputs();
    const int column = threadIdx.x * 4;
    if (column < kWidth) this->begin_vector(0, column, this->frame_embedding(column));
    sync_workers();
    for (int p = 0; p < a.phase_count; ++p) {
      const Phase& f = s.phases[p % 8];
      this->forget_thread();
      if (fetches()) {
        copies_done();  // of phase p + 3, which a barrier of this one or the next two shows to all
        fetch_phase(p + 4);
        if (a.times && this->lane() == 0 && this->block() == 0) a.times[p] = nanoseconds();
      }
      switch (f.kind) {
        case kQkv:
          this->template qkv<4>(f);
          break;
        case kAttend:
          this->attend(f);
          break;
        case kSlowOutput:
          this->slow_output(f);
          break;
        case kOutput:
          this->output(f);
          break;
        case kSwiglu:
          this->swiglu(f);
          break;
        case kFastQkv:
          this->template qkv<2>(f);
          break;
        case kFastOutput:
          this->fast_output(f);
          break;
        case kHead:
          this->head(f);
          break;
        default:
          this->fast_head(f);
      }
    }
    if (this->block() != 0) return;
    sync_workers();
    if (a.times && threadIdx.x == 0) a.times[a.phase_count] = nanoseconds();
    if (threadIdx.x <= a.codebooks && *static_cast<volatile int*>(a.abandoned) != 0) a.out[threadIdx.x] = -2;
    if (threadIdx.x == 0) {
      *a.turn += 1;
      a.tickets[0] = a.tickets[1] = 0;
    }
  }
};

struct PrepareFrameArgs {
  uint32* words;   // [count], all that the frame exchanges
  int* abandoned;  // [1]
  int count;       // a multiple of 4
};

// Before each frame: nothing has been said yet.
template <class T>
__device__ void prepare_frame(const PrepareFrameArgs& a) {
  launch_next();
  wait_for_inputs();
  const int first = (static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x)) * 4;
  for (int i = first; i < a.count; i += static_cast<int>(gridDim.x) * 1024)
    store_vec(a.words + i, Vec16{{kEmpty, kEmpty, kEmpty, kEmpty}});
  if (first == 0) *a.abandoned = 0;
}

template <class T>
__device__ void persistent_frame(const PersistentFrameArgs& a) {
#if S1_ARCH == 0 || (S1_ARCH >= 900 && S1_ARCH < 1200)
  extern __shared__ __align__(128) unsigned char shared[];
  static_assert(sizeof(Shared<T>) <= 231808, "what the host asks for");
  static_assert(sizeof(Phase) == 144, "as the host writes it");
  Shared<T>& s = *reinterpret_cast<Shared<T>*>(shared);
  if (threadIdx.x == 0) {
    number_block(a);
    for (int i = 0; i < kSlots; ++i) {
      barrier_init(s.full + i, 1);
      barrier_init(s.empty + i, kWorkers * kSayers);
    }
    s.position = *a.position;
    s.first_phase = FrameStream<T>::first_phase(a, s.position);
    s.turn = *a.turn;
    s.given_up = false;
    const int attending = PersistentFrame<T>::attending_warps(s.position) * 32;
    begin_barrier(kSampling, kSamplerThreads);
    begin_barrier(kAttending, attending);
    begin_barrier(kAttended, kWorkers * 32);
    barriers_visible();
  }
  __syncthreads();
  PersistentFrame<T>::begin_past(a, s);
  if (warp_id() == kWorkers) {
    if (lane_id() < kCopyLanes) FrameStream<T>::run(a, s);
    return;
  }
  PersistentFrame<T> frame{{{{{{a, s, {a.abandoned, &s.given_up}, static_cast<int>(threadIdx.x)}}}}}};
  frame.run();
#endif
}

S1_KERNEL_HALVES(measure_halves, HalvesArgs, 32, 1, measure_halves)
S1_KERNEL_HALVES(prepare_frame, PrepareFrameArgs, 256, 1, prepare_frame)
S1_KERNEL_HALVES(persistent_frame, PersistentFrameArgs, 544, 1, persistent_frame)

}  // namespace s1
