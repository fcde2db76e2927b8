// clip_factors and normalize_factors for CUDA tensors: all layers in one launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"

namespace dp2vae::cuda {
namespace {

using torch::headeronly::ScalarType;

Tensor factors(const char* op, const Tensor& norm_sq, const Tensor& error, const Clipping& clipping) {
  const Launch launch(op, norm_sq);
  STD_TORCH_CHECK(launch.has(error) && norm_sq.scalar_type() == ScalarType::Float &&
                      error.scalar_type() == ScalarType::Float && norm_sq.dim() == 2 && error.dim() == 2 &&
                      norm_sq.size(0) == error.size(0) && norm_sq.size(1) == error.size(1),
                  op, ": expected norm_sq and error [L, N], float32, on one device");
  const Norms norms{static_cast<const float*>(norm_sq.const_data_ptr()),
                    static_cast<const float*>(error.const_data_ptr()),
                    norm_sq.size(0),
                    norm_sq.size(1),
                    {norm_sq.stride(0), norm_sq.stride(1)},
                    {error.stride(0), error.stride(1)}};
  Tensor out = torch::stable::new_empty(norm_sq, {norms.records});
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  check(launch_clip_factors(launch.device, launch.stream, norms, clipping, to), op);
  return out;
}

Tensor clip_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm) {
  return factors("clip_factors", norm_sq, error, {max_grad_norm, 0, false});
}

Tensor normalize_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm, double stability) {
  return factors("normalize_factors", norm_sq, error, {max_grad_norm, stability, true});
}

}  // namespace
}  // namespace dp2vae::cuda

STABLE_TORCH_LIBRARY_IMPL(dp2vae_fast, CUDA, library) {
  library.impl("clip_factors", TORCH_BOX(&dp2vae::cuda::clip_factors));
  library.impl("normalize_factors", TORCH_BOX(&dp2vae::cuda::normalize_factors));
}
