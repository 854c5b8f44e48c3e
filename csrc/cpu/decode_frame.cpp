// decode_frame: every thread runs the same program, the ops' slice functions with a barrier where a phase reads what
// other threads wrote.
//
//   slow:  embed | per layer: qkv | rotary, append, attention | wo | swiglu | w2 |   then head | sampling |
//   fast:  positions 0 (hidden state) and 1 (first code) as one pass of 2B rows, then one pass a codebook: layers as
//          above, head | sampling | next embedding row |        (| is a barrier)
// Rotary, append and attention need none between them: a thread does the same key/value heads in all three, unless
// there are more threads than those.
// Memory: every weight once a frame, the fast stack N-1 times (its 100 MB in S1-mini do not fit a cache): 2.1 GB, which
// bounds the frame. So no thread lets memory idle: each op prefetches the beginning of the thread's share of the next
// matrix, and a thread that waits at a barrier goes on with it.
// Numerics: those of the ops; the same bits as calling them one by one.
// A NaN among the logits makes the token or code -1; the frame then ends with code 0 in its place.
#include "cpu/decode_frame.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/check.h"
#include "cpu/thread_pool.h"

namespace s1 {
namespace {

// As much as a waiting thread fetches ahead: a part of the second-level cache (1 to 2 MB).
constexpr std::int64_t kAheadBytes = 256 * 1024;

struct Ahead {
  const void* at;
  std::int64_t bytes;
};

}  // namespace

struct Frame::Buffers {
  Buffers(const FrameConfig& c, int rows) : rows(rows) {
    const std::int64_t slow_rows = rows, fast_rows = 2 * rows;
    const auto resize = [&](std::vector<char>& buffer, std::int64_t slow_dim, std::int64_t fast_dim) {
      buffer.resize(static_cast<std::size_t>(std::max(slow_rows * slow_dim, fast_rows * fast_dim)) * size_of(c.dtype));
    };
    const auto q_dim = [](const StackConfig& s) { return static_cast<std::int64_t>(s.heads) * s.head_dim; };
    const auto qkv_dim = [](const StackConfig& s) { return (s.heads + 2LL * s.kv_heads) * s.head_dim; };
    resize(x, c.slow.dim, 0);
    resize(normed, c.slow.dim, 0);
    resize(projected, c.fast.dim, 0);
    resize(fast_x, 0, c.fast.dim);
    resize(qkv, qkv_dim(c.slow), qkv_dim(c.fast));
    resize(q, q_dim(c.slow), q_dim(c.fast));
    resize(attended, q_dim(c.slow), q_dim(c.fast));
    resize(gated, c.slow.intermediate, c.fast.intermediate);
    const std::int64_t fast_cache = static_cast<std::int64_t>(c.fast.kv_heads) * c.codebooks * c.fast.head_dim;
    resize(fast_k, c.fast.layers * fast_cache, 0);
    resize(fast_v, c.fast.layers * fast_cache, 0);
    fast_cache_bytes = rows * fast_cache * static_cast<std::int64_t>(size_of(c.dtype));
    sampling.resize(
        std::max(sample_token_scratch_bytes(rows, c.head_rows), sample_token_scratch_bytes(rows, c.fast_rows)));
    slow_length.resize(static_cast<std::size_t>(rows));
    for (int b = 0; b < rows; ++b) {
      for (int i = 0; i < 2; ++i) {
        pair_position.push_back(i);
        pair_length.push_back(i + 1);
      }
    }
    for (int c_ = 0; c_ <= c.codebooks; ++c_) constant.insert(constant.end(), static_cast<std::size_t>(rows), c_);
  }

  const int rows;
  std::vector<char> x, normed;                // [B, C]
  std::vector<char> projected;                // [B, Cf]
  std::vector<char> fast_x;                   // [2B, Cf]
  std::vector<char> qkv, q, attended, gated;  // of B slow or 2B fast rows
  std::vector<char> fast_k, fast_v;           // per fast layer [B, Gf, N, Df]
  std::int64_t fast_cache_bytes;              // of one layer
  std::vector<char> sampling;
  std::vector<std::int32_t> slow_length;                 // [B]
  std::vector<std::int32_t> pair_position, pair_length;  // [2B] 0, 1, 0, 1 ... and 1, 2, 1, 2 ...
  std::vector<std::int32_t> constant;                    // [N+1, B] c in row c: positions c and lengths c
};

// What one thread does.
class Frame::Run {
 public:
  Run(Frame& frame, const Kernels& ops, Barrier& barrier, int thread, int threads)
      : c_(frame.config_),
        w_(frame.weights_),
        frame_(frame),
        buffers_(*frame.buffers_),
        ops_(ops),
        barrier_(barrier),
        thread_(thread),
        threads_(threads) {}

  // x [B, C] receives the hidden state before the last norm.
  void slow(const std::int32_t* tokens, const std::int32_t* position, int rows, void* x, const float* logit_bias,
            float* logits, void* normed) {
    ops_.embed_frame({c_.dtype, tokens, w_.text_embedding, w_.codebook_embedding, x, rows, c_.codebooks,
                      c_.codebook_size, c_.slow.dim, c_.semantic_begin, c_.semantic_end, c_.scale_codebook_embeddings},
                     thread_, threads_);
    const Ahead head = part(w_.head, c_.head_rows, c_.slow.dim);
    wait(first_of(c_.slow, w_.slow, head));
    for (int i = 0; i < c_.slow.layers; ++i) {
      const Ahead after = i + 1 < c_.slow.layers ? qkv_part(c_.slow, w_.slow[i + 1]) : head;
      layer(c_.slow, w_.slow[i], x, rows, rows, w_.cos_sin, position, buffers_.slow_length.data(), frame_.k_caches_[i],
            frame_.v_caches_[i], frame_.capacity_, after);
    }
    const Ahead after = first_of(c_.fast, w_.fast, {nullptr, 0});
    ops_.rms_norm_logits({c_.dtype, x, w_.norm, w_.head, logit_bias, logits, normed, rows, c_.slow.dim, c_.head_rows,
                          c_.slow.dim, c_.head_rows, c_.norm_eps, after.at},
                         thread_, threads_);
    wait(after);
  }

  void frame(const FrameStep& s) {
    slow(s.tokens, s.position, s.rows, buffers_.x.data(), s.logit_bias, s.main_logits, buffers_.normed.data());
    ops_.sample_token({s.main_logits,
                       s.main_noise,
                       s.ras_noise,
                       s.main_window,
                       s.ids,
                       s.out,
                       s.rows,
                       c_.head_rows,
                       s.main_window_length,
                       c_.head_rows,
                       s.main_window_length,
                       c_.codebooks + 1,
                       s.temperature,
                       s.top_p,
                       s.repetition_penalty,
                       s.top_k,
                       c_.semantic_begin,
                       c_.semantic_end,
                       buffers_.sampling.data(),
                       &barrier_},
                      thread_, threads_);
    wait();
    first_code(s);
    if (c_.codebooks == 1) return;
    first_fast_rows(s);
    for (int code = 1; code < c_.codebooks; ++code) {
      fast_pass(s, code);
      if (code + 1 == c_.codebooks) return;
      for (int b = thread_; b < s.rows; b += threads_) copy_embedding(s, code, b, b);
      wait();
    }
  }

 private:
  // This thread's share of the rows of a weight [out_dim, in_dim].
  Ahead part(const void* weight, int out_dim, int in_dim) const {
    const Range rows = share(out_dim, thread_, threads_);
    const std::int64_t row_bytes = in_dim * static_cast<std::int64_t>(size_of(c_.dtype));
    return {static_cast<const char*>(weight) + rows.begin * row_bytes,
            std::min(kAheadBytes, (rows.end - rows.begin) * row_bytes)};
  }
  Ahead qkv_part(const StackConfig& s, const LayerWeights& w) const {
    return part(w.wqkv, (s.heads + 2 * s.kv_heads) * s.head_dim, s.dim);
  }
  // The keys of this thread's first key/value head, as far as row 0 looks back.
  Ahead key_part(const StackConfig& s, const void* k_cache, int caches, int capacity, int length) const {
    const std::int64_t first = share(static_cast<std::int64_t>(caches) * s.kv_heads, thread_, threads_).begin;
    const std::int64_t row_bytes = s.head_dim * static_cast<std::int64_t>(size_of(c_.dtype));
    return {static_cast<const char*>(k_cache) + first * capacity * row_bytes,
            std::min(kAheadBytes, length * row_bytes)};
  }
  Ahead first_of(const StackConfig& s, const std::vector<LayerWeights>& layers, Ahead otherwise) const {
    return layers.empty() ? otherwise : qkv_part(s, layers[0]);
  }
  void wait(Ahead ahead = {nullptr, 0}) { barrier_.wait(ahead.at, ahead.bytes); }

  void layer(const StackConfig& s, const LayerWeights& w, void* x, int rows, int caches, const void* cos_sin,
             const std::int32_t* position, const std::int32_t* length, void* k_cache, void* v_cache, int capacity,
             Ahead after) {
    const DType dtype = c_.dtype;
    const float eps = c_.norm_eps;
    const int q_dim = s.heads * s.head_dim, qkv_dim = (s.heads + 2 * s.kv_heads) * s.head_dim;
    const Ahead wo = part(w.wo, s.dim, q_dim), w1 = part(w.w1, s.intermediate, s.dim),
                w2 = part(w.w2, s.dim, s.intermediate), keys = key_part(s, k_cache, caches, capacity, length[0]);
    void *qkv = buffers_.qkv.data(), *q = buffers_.q.data(), *attended = buffers_.attended.data(),
         *gated = buffers_.gated.data();
    ops_.rms_norm_qkv({dtype, x, w.attention_norm, w.wqkv, w.qkv_bias, qkv, rows, s.dim, qkv_dim, eps, keys.at},
                      thread_, threads_);
    wait(keys);
    ops_.qk_norm_rotary_append({dtype, qkv, w.q_norm, w.k_norm, cos_sin, position, k_cache, v_cache, q, rows, caches,
                                s.heads, s.kv_heads, s.head_dim, capacity, eps},
                               thread_, threads_);
    if (threads_ > caches * s.kv_heads) wait(wo);
    ops_.attention_decode(
        {dtype, q, k_cache, v_cache, length, attended, rows, caches, s.heads, s.kv_heads, s.head_dim, capacity, wo.at},
        thread_, threads_);
    wait(wo);
    ops_.linear_residual({dtype, attended, w.wo, w.o_bias, x, x, rows, q_dim, s.dim, w1.at}, thread_, threads_);
    wait(w1);
    ops_.rms_norm_swiglu({dtype, x, w.ffn_norm, w.w1, w.w3, gated, rows, s.dim, s.intermediate, eps, w2.at}, thread_,
                         threads_);
    wait(w2);
    ops_.linear_residual({dtype, gated, w.w2, nullptr, x, x, rows, s.intermediate, s.dim, after.at}, thread_, threads_);
    wait(after);
  }

  std::int32_t* row_of_out(const FrameStep& s, int b) const {
    return s.out + static_cast<std::int64_t>(b) * (c_.codebooks + 1);
  }

  // out[:, 1] = the first code, which the main token determines. Row b is the same thread's in copy_embedding().
  void first_code(const FrameStep& s) {
    for (int b = thread_; b < s.rows; b += threads_) {
      std::int32_t* row = row_of_out(s, b);
      const std::int64_t code = static_cast<std::int64_t>(row[0]) - c_.semantic_begin;
      row[1] = static_cast<std::int32_t>(std::min<std::int64_t>(std::max<std::int64_t>(code, 0), c_.codebook_size - 1));
    }
  }

  std::size_t fast_row_bytes() const { return static_cast<std::size_t>(c_.fast.dim) * size_of(c_.dtype); }
  char* fast_row(int row) const { return buffers_.fast_x.data() + static_cast<std::size_t>(row) * fast_row_bytes(); }

  // Row `row` of the fast transformer's input is the embedding of code `code` of sequence b.
  void copy_embedding(const FrameStep& s, int code, int b, int row) {
    const std::int32_t index = std::max(row_of_out(s, b)[1 + code], 0);
    std::memcpy(fast_row(row), static_cast<const char*>(w_.fast_embedding) + index * fast_row_bytes(),
                fast_row_bytes());
  }

  // fast_x [2B, Cf]: row 2b the hidden state, row 2b+1 the first code's embedding.
  void first_fast_rows(const FrameStep& s) {
    const Ahead ahead = first_of(c_.fast, w_.fast, {nullptr, 0});
    const char* hidden = c_.norm_fast_input ? buffers_.normed.data() : buffers_.x.data();
    if (w_.project_weight) {
      ops_.linear_residual({c_.dtype, hidden, w_.project_weight, w_.project_bias, nullptr, buffers_.projected.data(),
                            s.rows, c_.slow.dim, c_.fast.dim, ahead.at},
                           thread_, threads_);
      wait(ahead);
      hidden = buffers_.projected.data();
    }
    for (int b = thread_; b < s.rows; b += threads_) {
      std::memcpy(fast_row(2 * b), hidden + static_cast<std::size_t>(b) * fast_row_bytes(), fast_row_bytes());
      copy_embedding(s, 0, b, 2 * b + 1);
    }
    wait(ahead);
  }

  // Codebook `code`: the fast layers, the head and the choice. The pass of code 1 has position 0 in it too.
  void fast_pass(const FrameStep& s, int code) {
    const int per_sequence = code == 1 ? 2 : 1, rows = s.rows * per_sequence;
    const std::int32_t* position = code == 1 ? buffers_.pair_position.data() : &buffers_.constant[code * buffers_.rows];
    const std::int32_t* length =
        code == 1 ? buffers_.pair_length.data() : &buffers_.constant[(code + 1) * buffers_.rows];
    const Ahead head = part(w_.fast_head, c_.fast_rows, c_.fast.dim);
    for (int i = 0; i < c_.fast.layers; ++i) {
      const Ahead after = i + 1 < c_.fast.layers ? qkv_part(c_.fast, w_.fast[i + 1]) : head;
      layer(c_.fast, w_.fast[i], buffers_.fast_x.data(), rows, s.rows, w_.fast_cos_sin, position, length,
            buffers_.fast_k.data() + i * buffers_.fast_cache_bytes,
            buffers_.fast_v.data() + i * buffers_.fast_cache_bytes, c_.codebooks, after);
    }
    const std::int64_t steps = c_.codebooks - 1, stride = steps * c_.fast_rows, skip = (code - 1LL) * c_.fast_rows;
    const Ahead after = first_of(c_.fast, w_.fast, {nullptr, 0});
    ops_.rms_norm_logits({c_.dtype, fast_row(per_sequence - 1), w_.fast_norm, w_.fast_head, nullptr,
                          s.fast_logits + skip, nullptr, s.rows, c_.fast.dim, c_.fast_rows,
                          static_cast<std::int64_t>(per_sequence) * c_.fast.dim, stride, c_.norm_eps, after.at},
                         thread_, threads_);
    wait(after);
    const std::int64_t window = s.fast_window_length;
    ops_.sample_token({s.fast_logits + skip,
                       s.fast_noise + skip,
                       nullptr,
                       s.fast_window + (code - 1) * window,
                       nullptr,
                       s.out + 1 + code,
                       s.rows,
                       c_.fast_rows,
                       s.fast_window_length,
                       stride,
                       steps * window,
                       c_.codebooks + 1,
                       s.temperature,
                       s.top_p,
                       s.repetition_penalty,
                       s.top_k,
                       0,
                       0,
                       buffers_.sampling.data(),
                       &barrier_},
                      thread_, threads_);
    wait(after);
  }

  const FrameConfig& c_;
  const FrameWeights& w_;
  Frame& frame_;
  Buffers& buffers_;
  const Kernels& ops_;
  Barrier& barrier_;
  const int thread_, threads_;
};

Frame::Frame(const FrameConfig& config, FrameWeights weights) : config_(config), weights_(std::move(weights)) {
  if (static_cast<int>(weights_.slow.size()) != config.slow.layers ||
      static_cast<int>(weights_.fast.size()) != config.fast.layers)
    throw std::invalid_argument("Frame: weights must have as many layers as the configuration");
}
Frame::~Frame() = default;

void Frame::set_caches(std::vector<void*> k_caches, std::vector<void*> v_caches, int rows, int capacity) {
  const std::size_t layers = weights_.slow.size();
  if (k_caches.size() != layers || v_caches.size() != layers)
    throw std::invalid_argument("Frame: k_caches and v_caches must have one entry per slow layer, " +
                                std::to_string(layers) + ", got " + std::to_string(k_caches.size()) + " and " +
                                std::to_string(v_caches.size()));
  k_caches_ = std::move(k_caches);
  v_caches_ = std::move(v_caches);
  cache_rows_ = rows;
  capacity_ = capacity;
}

void Frame::check(const std::int32_t* tokens, const std::int32_t* position, int rows) const {
  if (rows < 1 || rows != cache_rows_)
    throw std::invalid_argument("decode_frame: tokens must have as many rows as there are caches, " +
                                std::to_string(cache_rows_) + ", got " + std::to_string(rows));
  check_tokens("decode_frame", tokens, rows, config_.codebooks, config_.codebook_size, config_.text_rows,
               config_.semantic_begin, config_.semantic_end);
  check_range("decode_frame", "position", position, rows, 0, capacity_ - 1, "the capacity of the caches");
  check_range("decode_frame", "position", position, rows, 0, config_.rotary_rows - 1, "the rows of cos_sin");
}

void Frame::prepare(const std::int32_t* position, int rows) {
  if (!buffers_ || buffers_->rows != rows) buffers_ = std::make_unique<Buffers>(config_, rows);
  for (int b = 0; b < rows; ++b) buffers_->slow_length[b] = position[b] + 1;
}

void Frame::decode(const FrameStep& step, int threads) {
  check(step.tokens, step.position, step.rows);
  const bool fast_window = step.fast_window || step.fast_window_length == 0 || config_.codebooks == 1;
  if (step.main_window_length < 0 || step.fast_window_length < 0 ||
      (step.main_window_length > 0 && !step.main_window) || !fast_window)
    throw std::invalid_argument("decode_frame: main_window and fast_window must be given where their length is not 0");
  prepare(step.position, step.rows);
  const Kernels& ops = kernels(current_isa());
  parallel(threads, [&](int thread, Barrier& barrier) { Run(*this, ops, barrier, thread, threads).frame(step); });
}

void Frame::slow_step(const std::int32_t* tokens, const std::int32_t* position, int rows, float* logits, void* hidden,
                      void* normed, int threads) {
  check(tokens, position, rows);
  prepare(position, rows);
  const Kernels& ops = kernels(current_isa());
  parallel(threads, [&](int thread, Barrier& barrier) {
    Run(*this, ops, barrier, thread, threads).slow(tokens, position, rows, hidden, nullptr, logits, normed);
  });
}

}  // namespace s1
