// Per-sample gradients of the scale and bias of a normalisation layer, from its input and its output's
// gradient alone.
#pragma once

#include <cstdint>

#include "../common.h"

namespace dp2vae {

struct AffineKernels {
  // Group norm of one record [channels, sites], strides in elements, one of which is 1:
  // weight[c] = sum over s of x_hat[c, s] b[c, s], bias[c] = sum over s of b[c, s].
  // `sums` holds 4 * channels doubles.
  void (*group_norm)(const float* x, const float* b, int64_t channels, int64_t sites,
                     const int64_t* x_strides, const int64_t* b_strides, int64_t groups, double eps,
                     double* sums, float* weight, float* bias);
  // Layer norm (or, without subtracting the mean, RMS norm) of one record [rows, features], rows contiguous:
  // weight[f] = sum over r of x_hat[r, f] b[r, f], bias[f] = sum over r of b[r, f].
  void (*layer_norm)(const float* x, const float* b, int64_t rows, int64_t features, int64_t x_row,
                     int64_t b_row, bool rms, double eps, float* weight, float* bias);
};

namespace portable {
extern const AffineKernels affine_kernels;
}
namespace avx2 {
extern const AffineKernels affine_kernels;
}
namespace avx512 {
extern const AffineKernels affine_kernels;
}

}  // namespace dp2vae
