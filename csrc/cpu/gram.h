// Squared norms of products (product.h) that are never formed, by Gram matrices:
//
//   |G[n]|^2 = sum over t, t' of B[t, t'] * sum over taps of X[pixel(t, tap), pixel(t', tap)]
//
// with B the Gram matrix of the plain operand over its rows and X that of the spread one over its channels.
// Channel products are made once a pair of pixels and only added up over taps. With a stride s a tap reads
// pixels of one phase, those congruent to (d tap - p) mod s, so that X is made phase by phase. Both matrices
// are symmetric: a pair t < t' counts twice, and of either the part above the diagonal (and a little below
// it) is all that is made. A few numbers that would have a vector of their own are rows only, which is what
// they cost least as; in their columns the matrices get what is in their rows.
//
// Positions and the pixels of a phase are numbered along rows of one common length, so that a tap is a
// difference of numbers; where a number means no position, or the tap leaves the input, the tap's mask is
// zero.
#pragma once

#include <cstdint>

#include "product.h"

namespace dp2vae {

struct GramTap {
  int64_t offset;     // from the number of a position to that of the pixel that it reads
  const float* mask;  // 1 or 0 for every number
};

struct GramPhase {
  int64_t start[3];  // of its pixels, which are `stride` apart
  int64_t size[3];
  const GramTap* taps;
  int64_t tap_count;
  const int32_t* active;        // the taps that read a pixel at a number, number by number
  const int32_t* active_begin;  // of each number in `active`, and its end
  const int32_t* source;  // where the pixel of a number lies in a channel, for all of `size`; null where
                          // numbers have gaps
};

struct GramPlan {
  int64_t row[2];   // distance of numbers of neighbouring rows of a plane, of neighbouring planes
  int64_t numbers;  // of positions and pixels, at most
  int64_t step;     // floats of a row of B or X: an odd number of vectors, as rows that lie a power of two
                    // apart meet in few lines of the first cache
  int64_t slack;    // floats before and behind X that a masked read may touch
  bool one_to_one;  // one tap that reads pixel t at position t: no matrix is held
  const GramPhase* phases;
  int64_t phase_count;
  const int32_t* at;  // number * step, for as many numbers as there are rows or channels

  // What `gram` works in, zero before the first record.
  DP2VAE_INLINE int64_t operand_floats(int64_t channels) const { return channels * step + slack; }
  DP2VAE_INLINE int64_t matrix_floats() const { return (one_to_one ? 16 : numbers) * step + 2 * slack; }
};

struct GramScratch {
  float *plain, *spread, *b, *x;
  // Diagonals: of B; of X for the phase at hand; of X, added up over taps.
  float *positions, *pixels;
  double* windows;
};

// What of a record: |G|^2 and (sum over t of |plain_t| |window_t|)^2 of every group, added up, and the sums
// of squares of both operands, windows counted as often as they are read.
struct GramNorm {
  double norm_sq, reach, plain_sq, spread_sq;
};

struct GramKernels {
  int64_t lanes;
  GramNorm (*gram)(const Product& p, const GramPlan& plan, int64_t n, const GramScratch& scratch);
};

namespace portable {
extern const GramKernels gram_kernels;
}
namespace avx2 {
extern const GramKernels gram_kernels;
}
namespace avx512 {
extern const GramKernels gram_kernels;
}

}  // namespace dp2vae
