// The factor of one record, from its squared norms and their error bounds: the arithmetic of CPU and GPU
// alike.
#pragma once

#include <cstdint>

#include "common.h"

namespace dp2vae {

// [layers, records], any strides.
struct Norms {
  const float *norm_sq, *error;
  int64_t layers, records;
  int64_t norm_sq_stride[2], error_stride[2];
};

struct Clipping {
  double max_grad_norm, stability;
  bool normalizes;  // short gradients are lengthened too
};

namespace DP2VAE_ISA {

// `sum` is that of a record's squared norms and errors over all layers. Rounding of the root, the division,
// the cast and the product with the gradient: as in ops/clip.py.
DP2VAE_INLINE float clip_factor(const Clipping& clipping, int64_t layers, double sum) {
  const float narrow = static_cast<float>(sum);
  if (!(narrow - narrow == 0)) return 0;  // not finite
  const double down = 1 - static_cast<double>(layers + 6) * 0x1p-23;
  const double factor = clipping.max_grad_norm * down / (root(sum) + clipping.stability);
  // NaN is in no range: of a negative sum, or of a bound that is none. Below the normal range the cast would
  // round by more, and up; above it there is no factor.
  if (!(factor >= 0x1p-126)) return 0;
  if (!clipping.normalizes) return static_cast<float>(factor < 1 ? factor : 1.0);
  return factor <= 0x1.fffffep127 ? static_cast<float>(factor) : 0.0f;
}

// The factor of record n.
DP2VAE_INLINE float clip_factor(const Norms& norms, const Clipping& clipping, int64_t n) {
  const float* norm_sq = norms.norm_sq + n * norms.norm_sq_stride[1];
  const float* error = norms.error + n * norms.error_stride[1];
  double sum = 0;
  for (int64_t l = 0; l < norms.layers; ++l)
    sum += static_cast<double>(norm_sq[l * norms.norm_sq_stride[0]]) + error[l * norms.error_stride[0]];
  return clip_factor(clipping, norms.layers, sum);
}

}  // namespace DP2VAE_ISA
}  // namespace dp2vae
