#include "cpu/check.h"

#include <stdexcept>

namespace s1 {

void check_tokens(const char* op, const std::int32_t* tokens, int rows, int codebooks, int codebook_size, int text_rows,
                  std::int32_t semantic_begin, std::int32_t semantic_end) {
  const auto refuse = [&](int row, int column, const char* what, std::int32_t value, int end) {
    throw std::invalid_argument(std::string(op) + ": tokens[" + std::to_string(row) + ", " + std::to_string(column) +
                                "] must be a " + what + " in [0, " + std::to_string(end) + "), got " +
                                std::to_string(value) + "; check the prompt");
  };
  for (int b = 0; b < rows; ++b) {
    const std::int32_t* row = tokens + static_cast<std::int64_t>(b) * (codebooks + 1);
    if (row[0] < 0 || row[0] >= text_rows) refuse(b, 0, "token", row[0], text_rows);
    if (row[0] < semantic_begin || row[0] > semantic_end) continue;
    for (int i = 1; i <= codebooks; ++i)
      if (row[i] < 0 || row[i] >= codebook_size) refuse(b, i, "code", row[i], codebook_size);
  }
}

void check_range(const char* op, const char* argument, const std::int32_t* values, int rows, int minimum, int maximum,
                 const char* limit) {
  for (int b = 0; b < rows; ++b) {
    if (values[b] >= minimum && values[b] <= maximum) continue;
    throw std::invalid_argument(std::string(op) + ": " + argument + "[" + std::to_string(b) + "] must be in [" +
                                std::to_string(minimum) + ", " + std::to_string(maximum) + "] (" + limit + "), got " +
                                std::to_string(values[b]) + "; reserve room in the cache first");
  }
}

}  // namespace s1
