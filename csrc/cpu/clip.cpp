// Clip factors of a batch, from norms and their error bounds: too little work for threads or vectors of our
// own.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../ops.h"

namespace dp2vae {
namespace {

using torch::headeronly::ScalarType;

// factor(bound) for every record, where `bound` is at least its norm; 0 where that is not finite.
template <class Factor>
Tensor factors(const Tensor& norm_sq, const Tensor& error, Factor factor) {
  STD_TORCH_CHECK(norm_sq.is_cpu() && error.is_cpu() && norm_sq.scalar_type() == ScalarType::Float &&
                      error.scalar_type() == ScalarType::Float && norm_sq.dim() == 2 && error.dim() == 2 &&
                      norm_sq.size(0) == error.size(0) && norm_sq.size(1) == error.size(1),
                  "expected norm_sq and error [L, N], float32");
  const int64_t layers = norm_sq.size(0), records = norm_sq.size(1);
  const auto *norms = static_cast<const float*>(norm_sq.const_data_ptr()),
             *errors = static_cast<const float*>(error.const_data_ptr());
  Tensor out = torch::stable::new_empty(norm_sq, {records});
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  // Rounding of the root, the division, the cast and the product with the gradient: as in ops/clip.py.
  const double down = 1 - static_cast<double>(layers + 6) * std::ldexp(1.0, -23);
  const int64_t step[] = {norm_sq.stride(0), norm_sq.stride(1), error.stride(0), error.stride(1)};
  std::vector<double> sums(records);
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t n = 0; n < records; ++n)
      sums[n] += static_cast<double>(norms[l * step[0] + n * step[1]]) + errors[l * step[2] + n * step[3]];
  for (int64_t n = 0; n < records; ++n)
    to[n] = std::isfinite(static_cast<float>(sums[n])) ? static_cast<float>(factor(std::sqrt(sums[n]), down))
                                                       : 0.0f;
  return out;
}

}  // namespace

Tensor clip_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm) {
  return factors(norm_sq, error, [&](double bound, double down) {
    const double factor = max_grad_norm * down / bound;
    return factor < 1 ? factor : 1.0;
  });
}

Tensor normalize_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm, double stability) {
  return factors(norm_sq, error,
                 [&](double bound, double down) { return max_grad_norm * down / (bound + stability); });
}

}  // namespace dp2vae
