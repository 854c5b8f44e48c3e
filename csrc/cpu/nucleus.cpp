// Weighted radix selection. The bits of a float, turned so that they order like the float, are looked at from the top:
// 11, 11 and 10 bits. At each level a histogram holds the number and the weight of the rows in each bin; bins are taken
// whole from the highest down as long as they fit, and only the first that does not fit goes to the next level. After
// the last level that bin holds equal logits, which are taken one by one.
//
// One pass over the listed rows and one over a bin of them. Sums are double: their order is of no account.
#include "cpu/nucleus.h"

#include <cstring>
#include <limits>

namespace s1 {
namespace {

constexpr int kBins = 2048;

struct Level {
  int shift;
  std::uint32_t mask;
};
constexpr Level kLevels[] = {{21, 0x7ff}, {10, 0x7ff}, {0, 0x3ff}};

std::uint32_t ordered_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Histogram {
  double weight[kBins];
  std::int32_t count[kBins];
};

}  // namespace

Nucleus find_nucleus(const float* logits, const float* weights, const RowPieces& listed, double mass,
                     std::int64_t limit, std::int32_t* spare) {
  Histogram histogram;
  RowPieces rows = listed;
  std::int32_t boundary_rows = 0;
  double taken_mass = 0.0;
  std::int64_t taken = 0;
  for (const Level& level : kLevels) {
    std::memset(&histogram, 0, sizeof histogram);
    float lowest = std::numeric_limits<float>::infinity();
    for (int p = 0; p < rows.pieces; ++p) {
      for (std::int32_t i = 0; i < rows.count[p]; ++i) {
        const std::int32_t row = rows.rows[p * rows.stride + i];
        const std::uint32_t bin = ordered_bits(logits[row]) >> level.shift & level.mask;
        histogram.weight[bin] += weights[row];
        histogram.count[bin] += 1;
        lowest = logits[row] < lowest ? logits[row] : lowest;
      }
    }
    std::int32_t boundary = static_cast<std::int32_t>(level.mask);
    for (; boundary >= 0; --boundary) {
      if (taken + histogram.count[boundary] > limit || taken_mass + histogram.weight[boundary] > mass) break;
      taken += histogram.count[boundary];
      taken_mass += histogram.weight[boundary];
    }
    if (boundary < 0) return {lowest, std::numeric_limits<std::int32_t>::max()};  // all of them fit
    std::int32_t kept = 0;
    for (int p = 0; p < rows.pieces; ++p) {
      for (std::int32_t i = 0; i < rows.count[p]; ++i) {
        const std::int32_t row = rows.rows[p * rows.stride + i];
        spare[kept] = row;  // always written, counted only if it is in the bin: no branch to mispredict
        kept += (ordered_bits(logits[row]) >> level.shift & level.mask) == static_cast<std::uint32_t>(boundary);
      }
    }
    boundary_rows = kept;
    rows = {spare, &boundary_rows, 0, 1};
  }
  std::int32_t ties = 0;
  while (ties < boundary_rows && taken + ties < limit && taken_mass + (ties + 1.0) * weights[spare[ties]] <= mass)
    ++ties;
  if (taken + ties == 0) ties = 1;
  return {logits[spare[0]], ties == 0 ? -1 : spare[ties - 1]};
}

}  // namespace s1
