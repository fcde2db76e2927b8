// From an op's arguments to the product they mean.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "product.h"

namespace dp2vae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

constexpr double kTiny = 1.17549435e-38;  // smallest normal float32

// Relative error bound of a sum whose terms pass through `depth` float32 roundings, with the margin of
// ops/norm.py.
inline double roundoff(double depth) {
  const double x = depth * std::ldexp(1.0, -24);
  return x < 1 ? 1.02 * x / (1 - x) : HUGE_VAL;
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Tensor new_floats(const Tensor& like, const Ints& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// Weight gradient of a linear layer: activations [N, T, D], backprops [N, T, P].
Product linear_product(const Tensor& activations, const Tensor& backprops);

// Of a convolution: activations [N, C_in, *in], backprops [N, C_out, *out], one to three spatial dimensions.
Product conv_product(const Tensor& activations, const Tensor& backprops, const Ints& weight_shape,
                     const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                     bool transposed);

// Raises unless `factors` has a contiguous float32 number for each record.
void check_factors(const Tensor& factors, int64_t records);

}  // namespace dp2vae
