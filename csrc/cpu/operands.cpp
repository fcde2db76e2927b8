#include "operands.h"

#include <algorithm>

namespace dp2vae {
namespace {

Operand operand(const Tensor& t, const char* name, int64_t channel_axis) {
  const bool bf16 = t.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(t.is_cpu() && (bf16 || t.scalar_type() == ScalarType::Float), name,
                  ": expected a float32 or bfloat16 CPU tensor");
  Operand o{t.const_data_ptr(), bf16, t.stride(0), t.stride(channel_axis), {0, 0, 0}};
  return o;
}

// The kernels write a sum where there is a term.
void check_not_empty(const Tensor& activations, const Tensor& backprops) {
  for (int64_t d = 1; d < activations.dim(); ++d)
    STD_TORCH_CHECK(activations.size(d) > 0 && backprops.size(d) > 0,
                    "activations and backprops of a record are empty");
}

}  // namespace

Product linear_product(const Tensor& activations, const Tensor& backprops) {
  STD_TORCH_CHECK(activations.dim() == 3 && backprops.dim() == 3 &&
                      activations.size(0) == backprops.size(0) && activations.size(1) == backprops.size(1),
                  "expected activations [N, T, D] and backprops [N, T, P]");
  check_not_empty(activations, backprops);
  Product p{};
  p.records = activations.size(0);
  p.groups = 1;
  p.rows = backprops.size(2);
  p.channels = activations.size(2);
  for (int d = 0; d < 3; ++d) p.grid[d] = p.kernel[d] = p.stride[d] = p.dilation[d] = p.size[d] = 1;
  p.grid[2] = p.size[2] = activations.size(1);
  p.plain = operand(backprops, "backprops", 2);
  p.spread = operand(activations, "activations", 2);
  p.plain.axis[2] = backprops.stride(1);
  p.spread.axis[2] = activations.stride(1);
  return p;
}

Product conv_product(const Tensor& activations, const Tensor& backprops, const Ints& weight_shape,
                     const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                     bool transposed) {
  const int64_t dims = static_cast<int64_t>(weight_shape.size()) - 2;
  const auto given = [&](const Ints& values) { return static_cast<int64_t>(values.size()) == dims; };
  STD_TORCH_CHECK(
      1 <= dims && dims <= 3 && activations.dim() == dims + 2 && backprops.dim() == dims + 2 &&
          activations.size(0) == backprops.size(0) && given(stride) && given(padding) && given(dilation),
      "expected activations [N, C_in, *], backprops [N, C_out, *] of one to three spatial dimensions, and "
      "stride, padding, dilation for each");
  check_not_empty(activations, backprops);
  const Tensor &plain = transposed ? activations : backprops, &spread = transposed ? backprops : activations;
  STD_TORCH_CHECK(groups >= 1 && weight_shape[0] % groups == 0 && plain.size(1) == weight_shape[0] &&
                      spread.size(1) == weight_shape[1] * groups,
                  "weight_shape and groups do not fit the channels of activations and backprops");
  Product p{};
  p.records = plain.size(0);
  p.groups = groups;
  p.rows = weight_shape[0] / groups;
  p.channels = weight_shape[1];
  p.plain = operand(plain, transposed ? "activations" : "backprops", 1);
  p.spread = operand(spread, transposed ? "backprops" : "activations", 1);
  for (int d = 0; d < 3; ++d) p.grid[d] = p.kernel[d] = p.stride[d] = p.dilation[d] = p.size[d] = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = 3 - dims + i;  // the last axis is the innermost, whatever their number
    p.grid[d] = plain.size(2 + i);
    p.size[d] = spread.size(2 + i);
    p.kernel[d] = weight_shape[2 + i];
    p.stride[d] = stride[i];
    p.padding[d] = padding[i];
    p.dilation[d] = dilation[i];
    STD_TORCH_CHECK(p.kernel[d] >= 1 && p.stride[d] >= 1 && p.padding[d] >= 0 && p.dilation[d] >= 1,
                    "kernel, stride and dilation are at least 1, padding at least 0");
    const int64_t beyond = p.size[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1 -
                           p.stride[d] * (p.grid[d] - 1);  // what the last position leaves unread
    const int64_t next = transposed ? std::max(p.stride[d], p.dilation[d]) : p.stride[d];
    STD_TORCH_CHECK(0 <= beyond && beyond < next, "the taps of ", p.grid[d],
                    " positions do not end with an axis of ", p.size[d],
                    " and its padding: activations and backprops are not of one convolution");
    p.plain.axis[d] = plain.stride(2 + i);
    p.spread.axis[d] = spread.stride(2 + i);
  }
  return p;
}

void check_factors(const Tensor& factors, int64_t records) {
  STD_TORCH_CHECK(factors.is_cpu() && factors.scalar_type() == ScalarType::Float && factors.is_contiguous() &&
                      factors.dim() == 1 && factors.numel() == records,
                  "factors: expected ", records, " contiguous float32 numbers");
}

}  // namespace dp2vae
