// y[b][r] = sum_c weight[r][c] * x[b][c], the loop under every projection. Included by op files, once per ISA.
//
// Who: one thread does a range of rows r. Rows go four at a time, so that a vector of x serves four rows, and rows b up
// to four at a time, so that a converted weight serves four of them.
// Memory: the range's weights are read once, in address order; they come from memory and bound the op. x is staged as
// fp32 [B, padded C] and stays in the first-level cache.
// Numerics: every y[b][r] has one accumulator vector that takes the columns in order, then the lanes are summed. The
// order depends neither on the tile nor on the range.
// Why two prefetches in address order: one thread has 16 line-fill buffers, too few for this latency. Requests into the
// second-level cache (far) and from there into the first (near) keep more lines under way, and four rows at a time are
// too much for the hardware's own prefetcher. Two threads of a Sapphire Rapids Xeon read 14.6 GB/s without, 18.7 with
// near alone, 22.7 with both, and 22 to 25 in a plain read of memory. Prefetching at the same distance in every row
// instead of in address order, non-temporal hints and 2 MB pages brought nothing.
namespace s1 {
namespace S1_ISA {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kNearBytes = 10 * 1024;
constexpr std::int64_t kFarBytes = 32 * 1024;

// Addresses of a thread's weights in the order in which it will read them: [begin, begin + bytes), then `next`.
struct ReadAhead {
  const char* begin;
  std::int64_t bytes;
  const char* next;
  S1_INLINE const char* at(std::int64_t offset) const {
    return offset < bytes || next == nullptr ? begin + offset : next + (offset - bytes);
  }
};

// kRows rows of the weight times kBatch rows of x; sums[r * kBatch + b]. Reads ahead from `near_at` and `far_at` on as
// many lines as the rows have.
template <class T, int kRows, int kBatch>
void dot_tile(const T* S1_RESTRICT weight, std::int64_t cols, const float* S1_RESTRICT x, std::int64_t x_stride,
              const char* near_at, const char* far_at, float* S1_RESTRICT sums) {
  constexpr int kStep = static_cast<int>(kLine / sizeof(T));  // a cache line of every row
  Vec acc[kRows][kBatch];
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBatch; ++b) acc[r][b] = splat(0.0f);
  std::int64_t c = 0;
  for (; c + kStep <= cols; c += kStep) {
    for (int r = 0; r < kRows; ++r) {
      prefetch_near(near_at + r * kLine);
      prefetch_far(far_at + r * kLine);
    }
    near_at += kRows * kLine;
    far_at += kRows * kLine;
    for (int i = 0; i < kStep; i += kLanes) {
      Vec xs[kBatch];
      for (int b = 0; b < kBatch; ++b) xs[b] = load(x + b * x_stride + c + i);
      for (int r = 0; r < kRows; ++r) {
        const Vec w = load(weight + r * cols + c + i);
        for (int b = 0; b < kBatch; ++b) acc[r][b] = fma(w, xs[b], acc[r][b]);
      }
    }
  }
  for (; c < cols; c += kLanes) {
    for (int r = 0; r < kRows; ++r) {
      const Vec w = load_upto(weight + r * cols + c, cols - c);
      for (int b = 0; b < kBatch; ++b) acc[r][b] = fma(w, load(x + b * x_stride + c), acc[r][b]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int b = 0; b < kBatch; ++b) sums[r * kBatch + b] = sum(acc[r][b]);
}

// One block of kRows weight rows times all rows of x.
template <class T, int kRows, class Finish>
S1_INLINE void gemv_block(const T* weight, std::int64_t cols, std::int64_t row, const float* x, int batch,
                          const ReadAhead& ahead, const Finish& finish) {
  constexpr int kPart = kRegisters >= 32 || kRows == 1 ? kRows : kRows / 2;  // so that the sums of four rows b fit
  const std::int64_t x_stride = padded(cols);
  const T* rows = weight + row * cols;
  const std::int64_t offset = reinterpret_cast<const char*>(rows) - ahead.begin;
  const char* near_at = ahead.at(offset + kNearBytes);
  const char* far_at = ahead.at(offset + kFarBytes);
  float sums[kRows * 4];
  for (int b = 0; b < batch;) {
    const float* xb = x + b * x_stride;
    const int n = batch - b >= 4 ? 4 : batch - b >= 2 ? 2 : 1;
    if (n == 4) {
      const std::int64_t part_bytes = kPart * cols * static_cast<std::int64_t>(sizeof(T));
      for (int i = 0; i < kRows / kPart; ++i)
        dot_tile<T, kPart, 4>(rows + i * kPart * cols, cols, xb, x_stride, near_at + i * part_bytes,
                              far_at + i * part_bytes, sums + i * kPart * 4);
    } else if (n == 2) {
      dot_tile<T, kRows, 2>(rows, cols, xb, x_stride, near_at, far_at, sums);
    } else {
      dot_tile<T, kRows, 1>(rows, cols, xb, x_stride, near_at, far_at, sums);
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < n; ++i) finish(b + i, row + r, sums[r * n + i]);
    b += n;
  }
}

// finish(b, r, sum) for all rows b of x and the rows r in `range` of weight [*, cols].
template <class T, class Finish>
S1_INLINE void gemv(const T* weight, std::int64_t cols, Range range, const float* x, int batch, const void* next,
                    const Finish& finish) {
  const ReadAhead ahead{reinterpret_cast<const char*>(weight + range.begin * cols),
                        (range.end - range.begin) * cols * static_cast<std::int64_t>(sizeof(T)),
                        static_cast<const char*>(next)};
  std::int64_t row = range.begin;
  for (; row + 4 <= range.end; row += 4) gemv_block<T, 4>(weight, cols, row, x, batch, ahead, finish);
  for (; row < range.end; ++row) gemv_block<T, 1>(weight, cols, row, x, batch, ahead, finish);
}

// fp32 copy of the rows of x [batch, cols], padded with zeros; in the thread's scratch. `extra` floats behind it are
// the caller's.
template <class T>
S1_INLINE float* stage(const T* x, std::int64_t x_stride, int batch, std::int64_t cols, std::int64_t extra = 0) {
  float* staged = thread_scratch(static_cast<std::size_t>(batch * padded(cols) + extra));
  for (int b = 0; b < batch; ++b)
    for (std::int64_t c = 0; c < cols; c += kLanes)
      store(staged + b * padded(cols) + c, load_upto(x + b * x_stride + c, cols - c));
  return staged;
}

// The same for x * rsqrt(mean(x^2) + eps) * norm_weight. Every thread does this anew: a few microseconds less than a
// barrier and a row that the other threads have to fetch.
template <class T>
S1_INLINE float* stage_rms_norm(const T* x, std::int64_t x_stride, const T* norm_weight, int batch, std::int64_t cols,
                                float eps, std::int64_t extra = 0) {
  float* staged = stage(x, x_stride, batch, cols, extra);
  for (int b = 0; b < batch; ++b) {
    float* row = staged + b * padded(cols);
    Vec squares = splat(0.0f);
    for (std::int64_t c = 0; c < cols; c += kLanes) squares = fma(load(row + c), load(row + c), squares);
    const Vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(cols) + eps));
    for (std::int64_t c = 0; c < cols; c += kLanes)
      store(row + c, load(row + c) * scale * load_upto(norm_weight + c, cols - c));
  }
  return staged;
}

}  // namespace S1_ISA
}  // namespace s1
