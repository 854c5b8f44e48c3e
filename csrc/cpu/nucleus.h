// Where the nucleus of a distribution ends, without sorting it.
#pragma once

#include <cstdint>

namespace s1 {

// Row v is kept if logits[v] > value, or logits[v] == value and v <= last_tie.
struct Nucleus {
  float value;
  std::int32_t last_tie;
};

// A list of rows in pieces: piece p has count[p] rows at rows + p * stride, ascending over all pieces.
struct RowPieces {
  const std::int32_t* rows;
  const std::int32_t* count;
  std::int64_t stride;
  int pieces;
};

// In descending order of logits (ties: the lower row first) the longest prefix whose weights sum to `mass` at most and
// which has `limit` rows at most; the first row is always in it. Rows not listed must come after the prefix.
// logits [V] without NaN or -0; weights [V] non-decreasing in the logits; spare: room for one row more than listed.
Nucleus find_nucleus(const float* logits, const float* weights, const RowPieces& listed, double mass,
                     std::int64_t limit, std::int32_t* spare);

}  // namespace s1
