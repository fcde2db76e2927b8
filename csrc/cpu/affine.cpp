// Scale and bias of normalisation layers: records dealt to threads.
#include "affine.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../ops.h"
#include "isa.h"

namespace dp2vae {
namespace {

using torch::headeronly::ScalarType;

const AffineKernels& affine_kernels_in_use() { return DP2VAE_IN_USE(affine_kernels); }

void check_pair(const Tensor& x, const Tensor& b) {
  STD_TORCH_CHECK(x.is_cpu() && b.is_cpu() && x.scalar_type() == ScalarType::Float &&
                      b.scalar_type() == ScalarType::Float && x.dim() == 3 && b.dim() == 3 &&
                      x.size(0) == b.size(0) && x.size(1) == b.size(1) && x.size(2) == b.size(2),
                  "expected activations and backprops of one shape, float32, with three axes");
}

const float* floats(const Tensor& t, int64_t n) {
  return static_cast<const float*>(t.const_data_ptr()) + n * t.stride(0);
}

}  // namespace

std::tuple<Tensor, Tensor> group_norm_grad_sample(const Tensor& activations, const Tensor& backprops,
                                                  int64_t groups, double eps) {
  check_pair(activations, backprops);
  const int64_t records = activations.size(0), channels = activations.size(1), sites = activations.size(2);
  STD_TORCH_CHECK(groups >= 1 && channels % groups == 0, "groups is ", groups, " for ", channels,
                  " channels");
  Tensor weight = torch::stable::new_empty(activations, {records, channels});
  Tensor bias = torch::stable::new_empty(activations, {records, channels});
  auto *to_weight = static_cast<float*>(weight.mutable_data_ptr()),
       *to_bias = static_cast<float*>(bias.mutable_data_ptr());
  const int64_t x_strides[] = {activations.stride(1), activations.stride(2)};
  const int64_t b_strides[] = {backprops.stride(1), backprops.stride(2)};
  const auto kernel = affine_kernels_in_use().group_norm;
  torch::stable::parallel_for(0, records, 1, [&](int64_t first, int64_t end) {
    std::vector<double> sums(4 * channels);
    for (int64_t n = first; n < end; ++n)
      kernel(floats(activations, n), floats(backprops, n), channels, sites, x_strides, b_strides, groups, eps,
             sums.data(), to_weight + n * channels, to_bias + n * channels);
  });
  return {weight, bias};
}

std::tuple<Tensor, Tensor> layer_norm_grad_sample(const Tensor& activations, const Tensor& backprops,
                                                  bool rms, double eps) {
  check_pair(activations, backprops);
  const int64_t records = activations.size(0), rows = activations.size(1), features = activations.size(2);
  STD_TORCH_CHECK(activations.stride(2) == 1 && backprops.stride(2) == 1, "expected contiguous features");
  Tensor weight = torch::stable::new_empty(activations, {records, features});
  Tensor bias = torch::stable::new_empty(activations, {records, features});
  auto *to_weight = static_cast<float*>(weight.mutable_data_ptr()),
       *to_bias = static_cast<float*>(bias.mutable_data_ptr());
  const auto kernel = affine_kernels_in_use().layer_norm;
  torch::stable::parallel_for(0, records, 1, [&](int64_t first, int64_t end) {
    for (int64_t n = first; n < end; ++n)
      kernel(floats(activations, n), floats(backprops, n), rows, features, activations.stride(1),
             backprops.stride(1), rms, eps, to_weight + n * features, to_bias + n * features);
  });
  return {weight, bias};
}

}  // namespace dp2vae
