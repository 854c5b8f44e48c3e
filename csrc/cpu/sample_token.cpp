// sample_token: repetition penalty or repetition-aware sampling, top-k, top-p, temperature, and the choice.
//
// The kept rows are the longest prefix of the descending logits with cumulative probability <= top_p and rank < top_k;
// among them argmax of e^((logit - max) / max(temperature, 1e-5)) / noise, ties to the lowest row.
//   logits, noise [B, V] fp32 (noise ~ Exp(1)); ras_noise [B, V] or null; window [B, W]; ids [V] ascending or null: the
//   token of a row (the row itself if null); out [B] int32: a token, or -1 if a logit is NaN, or none is finite
// Without ras_noise the rows whose tokens occur in the window are penalised first: l < 0 ? l * penalty : l / penalty.
// With ras_noise there is no penalty; a semantic choice that occurs in the window is replaced by a second one from the
// same logits with ras_noise, temperature 1 and top_p 0.9.
// Who: up to kSoloVocabulary rows of the head, thread t does the rows b = t, t + threads, ... alone. Larger ones are
// done by all threads together, one b after the other, in pieces of kPiece rows of the head with barriers between the
// passes; only the end of the nucleus is found by thread 0 alone.
// Memory: logits and noise once; adjusted logits and weights (8 V bytes) stay in the second-level cache.
// Numerics: fp32 weights; sums of a piece are double, added in the order of pieces, whoever did them.
// Why no sort: rows lighter than (1 - top_p) * total / V cannot be in the nucleus, for together they weigh less than
// what is left out. What remains is some hundred rows of a peaked distribution; of a flat one find_nucleus() makes two
// passes.
#include "cpu/nucleus.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#ifndef S1_ISA

namespace s1 {
namespace {

constexpr int kPiece = 2048;
constexpr int kSoloVocabulary = 8192;

// What the threads share about one row of logits.
struct Scratch {
  struct Piece {
    float top;              // largest adjusted logit, NaN if one is NaN
    double total;           // sum of weights
    float best_score;       // of the rows kept
    std::int32_t best_row;  // -1: none kept
  };
  int pieces;
  float* adjusted;       // [pieces * kPiece] logits after the penalty, -inf behind V
  float* weight;         // [pieces * kPiece] e^(adjusted - max)
  std::int32_t* listed;  // [pieces, kPiece] rows that may be in the nucleus
  std::int32_t* spare;   // [pieces * kPiece + 1]
  std::int32_t* count;   // [pieces] how many are listed
  Piece* piece;          // [pieces]
  Nucleus* nucleus;      // [1]
};

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Lays the scratch of one row out from `base` on; returns its size.
std::size_t lay_out(char* base, int vocabulary, Scratch* s) {
  s->pieces = (vocabulary + kPiece - 1) / kPiece;
  const std::size_t pieces = static_cast<std::size_t>(s->pieces), rows = pieces * kPiece;
  std::size_t used = 0;
  const auto take = [&](std::size_t bytes) {
    char* p = base ? base + used : nullptr;
    used += aligned(bytes);
    return p;
  };
  s->adjusted = reinterpret_cast<float*>(take(rows * sizeof(float)));
  s->weight = reinterpret_cast<float*>(take(rows * sizeof(float)));
  s->listed = reinterpret_cast<std::int32_t*>(take(rows * sizeof(std::int32_t)));
  s->spare = reinterpret_cast<std::int32_t*>(take((rows + 1) * sizeof(std::int32_t)));
  s->count = reinterpret_cast<std::int32_t*>(take(pieces * sizeof(std::int32_t)));
  s->piece = reinterpret_cast<Scratch::Piece*>(take(pieces * sizeof(Scratch::Piece)));
  s->nucleus = reinterpret_cast<Nucleus*>(take(sizeof(Nucleus)));
  return used;
}

}  // namespace

std::size_t sample_token_scratch_bytes(int rows, int vocabulary) {
  Scratch unused;
  return lay_out(nullptr, vocabulary, &unused) * (vocabulary <= kSoloVocabulary ? rows : 1);
}

}  // namespace s1
#define S1_OP_FILE "cpu/sample_token.cpp"
#include "cpu/for_each_isa.h"
#else

namespace s1 {
namespace S1_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// One row b of the op, done by threads 0 .. threads-1; each of them has its own copy of this.
struct RowSampler {
  const SampleToken& a;
  Scratch s;
  const float* logits;         // [V]
  const std::int32_t* window;  // [W]
  int thread, threads;
  Range mine;    // of pieces
  float top;     // largest adjusted logit
  double total;  // sum of all weights

  void wait() const {
    if (threads > 1) a.barrier->wait();
  }

  // The row of a token, or -1.
  std::int64_t row_of(std::int32_t token) const {
    if (!a.ids) return token >= 0 && token < a.vocabulary ? token : -1;
    const std::int32_t* found = std::lower_bound(a.ids, a.ids + a.vocabulary, token);
    return found != a.ids + a.vocabulary && *found == token ? found - a.ids : -1;
  }

  // adjusted = logits with the penalty, and the largest of each piece. Adding 0 turns -0 into +0.
  void adjust() {
    const std::int64_t begin = mine.begin * kPiece, end = mine.end * kPiece;
    for (std::int64_t v = begin; v < end; v += kLanes) {
      const std::int64_t left = a.vocabulary - v;
      if (left < kLanes) store(s.adjusted + v, splat(-kInfinity));
      if (left > 0) store_upto(s.adjusted + v, load_upto(logits + v, left) + splat(0.0f), left);
    }
    if (!a.ras_noise) {
      for (int i = 0; i < a.window_length; ++i) {
        const std::int64_t row = row_of(window[i]);
        if (row < begin || row >= end) continue;
        const float l = logits[row];
        s.adjusted[row] = (l < 0 ? l * a.repetition_penalty : l / a.repetition_penalty) + 0.0f;
      }
    }
    for (std::int64_t p = mine.begin; p < mine.end; ++p) {
      unsigned ordered = kAllLanes;
      Vec largest = splat(-kInfinity);
      for (std::int64_t v = p * kPiece; v < (p + 1) * kPiece; v += kLanes) {
        const Vec l = load(s.adjusted + v);
        ordered &= equal(l, l);
        largest = max(largest, l);
      }
      s.piece[p].top = ordered == kAllLanes ? max_lane(largest) : std::numeric_limits<float>::quiet_NaN();
    }
  }

  // weight = e^(adjusted - top), and its sum over each piece. Eight vectors are added in fp32 before double takes over.
  void weigh() {
    constexpr int kRun = 8 * kLanes;
    for (std::int64_t p = mine.begin; p < mine.end; ++p) {
      double sum_of_piece = 0.0;
      for (std::int64_t run = p * kPiece; run < (p + 1) * kPiece; run += kRun) {
        Vec sum_of_run = splat(0.0f);
        for (std::int64_t v = run; v < run + kRun; v += kLanes) {
          const Vec w = exp(load(s.adjusted + v) - splat(top));
          store(s.weight + v, w);
          sum_of_run = sum_of_run + w;
        }
        sum_of_piece += sum(sum_of_run);
      }
      s.piece[p].total = sum_of_piece;
    }
  }

  // Lists the rows that may be in the nucleus: those not lighter than `lightest`.
  void list(float lightest) {
    for (std::int64_t p = mine.begin; p < mine.end; ++p) {
      std::int32_t* listed = s.listed + p * kPiece;
      const std::int64_t end = std::min<std::int64_t>(a.vocabulary, (p + 1) * kPiece);
      std::int32_t n = 0;
      for (std::int64_t v = p * kPiece; v < end; v += kLanes) {
        const unsigned light = greater(splat(lightest), load(s.weight + v));
        if (light == kAllLanes) continue;
        for (int i = 0; i < kLanes && v + i < end; ++i) {
          listed[n] = static_cast<std::int32_t>(v) + i;
          n += ~light >> i & 1u;
        }
      }
      s.count[p] = n;
    }
  }

  // The best row of each piece among those kept.
  void score(const Nucleus& nucleus, float temperature, const float* noise) {
    const std::int64_t last_tie = std::min<std::int64_t>(nucleus.last_tie, a.vocabulary - 1);
    for (std::int64_t p = mine.begin; p < mine.end; ++p) {
      float best = -1.0f;
      std::int64_t best_row = -1;
      const std::int64_t end = std::min<std::int64_t>(a.vocabulary, (p + 1) * kPiece);
      for (std::int64_t v = p * kPiece; v < end; v += kLanes) {
        const Vec l = load(s.adjusted + v);
        const std::int64_t ties = std::min<std::int64_t>(std::max<std::int64_t>(last_tie - v + 1, 0), kLanes);
        const unsigned kept = greater(l, splat(nucleus.value)) | (equal(l, splat(nucleus.value)) & ((1u << ties) - 1u));
        if (kept == 0) continue;
        const Vec scores = exp((l - splat(top)) / splat(temperature)) / load_upto(noise + v, a.vocabulary - v);
        if ((greater(scores, splat(best)) & kept) == 0) continue;
        float lanes[kLanes];
        store(lanes, scores);
        for (int i = 0; i < kLanes; ++i) {
          if ((kept >> i & 1u) && lanes[i] > best) {
            best = lanes[i];
            best_row = v + i;
          }
        }
      }
      s.piece[p].best_score = best;
      s.piece[p].best_row = static_cast<std::int32_t>(best_row);
    }
  }

  // The chosen row, the same in every thread; -1 if the noise is NaN everywhere.
  std::int64_t choose(float temperature, float top_p, const float* noise) {
    Nucleus nucleus{-kInfinity, std::numeric_limits<std::int32_t>::max()};
    const bool limited = a.top_k > 0 && a.top_k < a.vocabulary;
    if (top_p < 1.0f || limited) {
      const double left_out = top_p < 1.0f ? (1.0 - top_p) * total : 0.0;
      list(static_cast<float>(0.99 * std::min(left_out, total) / a.vocabulary));
      wait();
      if (thread == 0) {
        const double mass = top_p < 1.0f ? top_p * total : std::numeric_limits<double>::infinity();
        const RowPieces listed{s.listed, s.count, kPiece, s.pieces};
        *s.nucleus = find_nucleus(s.adjusted, s.weight, listed, mass, limited ? a.top_k : a.vocabulary, s.spare);
      }
      wait();
      nucleus = *s.nucleus;
    }
    score(nucleus, temperature > 1e-5f ? temperature : 1e-5f, noise);
    wait();
    float best = -1.0f;
    std::int64_t row = -1;
    for (int p = 0; p < s.pieces; ++p) {
      if (s.piece[p].best_score > best) {
        best = s.piece[p].best_score;
        row = s.piece[p].best_row;
      }
    }
    return row;
  }

  bool in_window(std::int32_t token) const {
    return std::find(window, window + a.window_length, token) != window + a.window_length;
  }

  // The chosen token or -1, the same in every thread.
  std::int32_t sample(std::int64_t b) {
    adjust();
    wait();
    top = -kInfinity;
    bool finite = true;
    for (int p = 0; p < s.pieces; ++p) {
      finite = finite && s.piece[p].top <= std::numeric_limits<float>::max();
      top = std::max(top, s.piece[p].top);
    }
    if (!finite || top == -kInfinity) {
      wait();  // the next b overwrites what the other threads are reading
      return -1;
    }
    weigh();
    wait();
    total = 0.0;
    for (int p = 0; p < s.pieces; ++p) total += s.piece[p].total;
    std::int64_t row = choose(a.temperature, a.top_p, a.noise + b * a.row_stride);
    if (row < 0) return -1;
    std::int32_t token = a.ids ? a.ids[row] : static_cast<std::int32_t>(row);
    if (a.ras_noise && token >= a.semantic_begin && token <= a.semantic_end && in_window(token)) {
      row = choose(1.0f, 0.9f, a.ras_noise + b * a.row_stride);
      token = row < 0 ? -1 : a.ids ? a.ids[row] : static_cast<std::int32_t>(row);
    }
    return token;
  }
};

void sample_token(const SampleToken& a, int thread, int threads) {
  const bool solo = a.vocabulary <= kSoloVocabulary;
  for (int b = solo ? thread : 0; b < a.rows; b += solo ? threads : 1) {
    Scratch s;
    const std::size_t bytes = lay_out(nullptr, a.vocabulary, &s);
    lay_out(static_cast<char*>(a.scratch) + (solo ? b * bytes : 0), a.vocabulary, &s);
    const int helper = solo ? 0 : thread, helpers = solo ? 1 : threads;
    RowSampler row{a,      s,       a.logits + b * a.row_stride,      a.window + b * a.window_stride,
                   helper, helpers, share(s.pieces, helper, helpers), 0.0f,
                   0.0};
    const std::int32_t token = row.sample(b);
    if (helper == 0) a.out[b * a.out_stride] = token;
  }
}

}  // namespace S1_ISA
}  // namespace s1
#endif
