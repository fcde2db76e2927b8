// Clip factors of a batch, from norms and their error bounds: too little work for threads or vectors of our
// own.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../clip_factors.h"
#include "../ops.h"

namespace dp2vae {
namespace {

using torch::headeronly::ScalarType;

Tensor factors(const Tensor& norm_sq, const Tensor& error, const Clipping& clipping) {
  STD_TORCH_CHECK(norm_sq.is_cpu() && error.is_cpu() && norm_sq.scalar_type() == ScalarType::Float &&
                      error.scalar_type() == ScalarType::Float && norm_sq.dim() == 2 && error.dim() == 2 &&
                      norm_sq.size(0) == error.size(0) && norm_sq.size(1) == error.size(1),
                  "expected norm_sq and error [L, N], float32");
  const int64_t layers = norm_sq.size(0), records = norm_sq.size(1);
  const auto *norms = static_cast<const float*>(norm_sq.const_data_ptr()),
             *errors = static_cast<const float*>(error.const_data_ptr());
  Tensor out = torch::stable::new_empty(norm_sq, {records});
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t step[] = {norm_sq.stride(0), norm_sq.stride(1), error.stride(0), error.stride(1)};
  std::vector<double> sums(records);
  for (int64_t l = 0; l < layers; ++l)
    for (int64_t n = 0; n < records; ++n)
      sums[n] += static_cast<double>(norms[l * step[0] + n * step[1]]) + errors[l * step[2] + n * step[3]];
  for (int64_t n = 0; n < records; ++n) to[n] = DP2VAE_ISA::clip_factor(clipping, layers, sums[n]);
  return out;
}

}  // namespace

Tensor clip_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm) {
  return factors(norm_sq, error, {max_grad_norm, 0, false});
}

Tensor normalize_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm, double stability) {
  return factors(norm_sq, error, {max_grad_norm, stability, true});
}

}  // namespace dp2vae
