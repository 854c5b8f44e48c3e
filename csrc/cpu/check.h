// Checks of values that would make a kernel read or write out of bounds. They throw std::invalid_argument, which
// Python sees as ValueError.
#pragma once

#include "cpu/ops.h"

namespace s1 {

void check_tokens(const char* op, const std::int32_t* tokens, int rows, int codebooks, int codebook_size, int text_rows,
                  std::int32_t semantic_begin, std::int32_t semantic_end);

// minimum <= values[b] <= maximum for all b; `limit` says what the maximum comes from.
void check_range(const char* op, const char* argument, const std::int32_t* values, int rows, int minimum, int maximum,
                 const char* limit);

}  // namespace s1
