// Gradients of linear layers and convolutions, formed record by record: kept, squared or added up.
#include "product.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "buffers.h"
#include "isa.h"
#include "operands.h"
#include "packing.h"

namespace dp2vae {
namespace {

constexpr int64_t kBlockFloats = int64_t{1} << 18;  // of packed operands at a time

// A squared norm as computed by the kernels, and its error bound.
void set_norm(double squares, int64_t n, float* norm_sq, float* error) {
  *norm_sq = static_cast<float>(squares);
  *error = static_cast<float>(squares * roundoff(kSquaresDepth) + n * kTiny);
}

// Forms every record's product, in `kept` or else in memory of its own, and takes its norm.
void form_all(const Product& p, float* kept, float* norm_sq, float* error) {
  if (p.records == 0) return;
  const ProductKernels& k = product_kernels_in_use();
  const Packing packing(p, k);
  const Layout& l = packing.layout;
  torch::stable::parallel_for(0, p.records, 1, [&](int64_t first, int64_t end) {
    Buffer plain(l.plain_floats(p)), spread(l.spread_floats(p)), own(kept ? 0 : p.numbers());
    spread.zero();
    for (int64_t n = first; n < end; ++n) {
      float* out = kept ? kept + n * p.numbers() : own.data();
      k.pack(p, l, n, 0, 1, plain.data(), spread.data());
      k.form(p, l, plain.data(), spread.data(), out);
      set_norm(k.squares(out, p.numbers()), p.numbers(), norm_sq + n, error + n);
    }
  });
}

// out = sum over records of factors[n] times the product of record n.
void weigh_all(const Product& p, const float* factors, float* out) {
  const ProductKernels& k = product_kernels_in_use();
  const Packing packing(p, k);
  const Layout& l = packing.layout;
  const int64_t each = l.plain_floats(p) + l.spread_floats(p);
  const int64_t block = std::clamp<int64_t>(kBlockFloats / each, 1, std::min(p.records, kRecordsPerPart));
  Buffer plain(block * l.plain_floats(p)), spread(block * l.spread_floats(p)), total(l.total_floats(p));
  spread.zero();
  std::vector<double> wide(p.records > kRecordsPerPart ? l.total_floats(p) : 0);
  for (int64_t part = 0; part < p.records; part += kRecordsPerPart) {
    const int64_t stop = std::min(p.records, part + kRecordsPerPart);
    total.zero();
    for (int64_t from = part; from < stop; from += block) {
      const int64_t count = std::min(block, stop - from);
      torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t end) {
        for (int64_t r = first; r < end; ++r)
          if (factors[from + r] != 0) k.pack(p, l, from + r, r, block, plain.data(), spread.data());
      });
      torch::stable::parallel_for(0, l.tiles(p), 1, [&](int64_t first, int64_t end) {
        k.weigh(p, l, block, count, plain.data(), spread.data(), factors + from, first, end, total.data());
      });
    }
    for (size_t i = 0; i < wide.size(); ++i) wide[i] += total.data()[i];
  }
  for (size_t i = 0; i < wide.size(); ++i) total.data()[i] = static_cast<float>(wide[i]);
  k.unpack(p, l, total.data(), out);
}

// `sizes` are those of a gradient, [A, B, *kernel]; it is kept as [A, *kernel, B].
std::tuple<Tensor, Tensor, Tensor> kept(const Product& p, const Tensor& like, const Ints& weight_shape) {
  Ints sizes{p.records}, strides{p.numbers()};
  sizes.insert(sizes.end(), weight_shape.begin(), weight_shape.end());
  strides.resize(sizes.size());
  strides[1] = p.numbers() / weight_shape[0];
  strides[2] = 1;
  for (size_t d = sizes.size(), step = weight_shape[1]; d-- > 3; step *= sizes[d]) strides[d] = step;
  Tensor values = new_block(sizes, strides);
  Tensor norm_sq = new_floats(like, {p.records}), error = new_floats(like, {p.records});
  form_all(p, floats(values), floats(norm_sq), floats(error));
  return {values, norm_sq, error};
}

std::tuple<Tensor, Tensor> direct_norm_sq(const Product& p, const Tensor& like) {
  Tensor norm_sq = new_floats(like, {p.records}), error = new_floats(like, {p.records});
  form_all(p, nullptr, floats(norm_sq), floats(error));
  return {norm_sq, error};
}

Tensor weighted_sum(const Product& p, const Tensor& factors, const std::vector<int64_t>& sizes) {
  check_factors(factors, p.records);
  Tensor out = new_floats(factors, sizes);
  if (p.records == 0)
    torch::stable::zero_(out);
  else
    weigh_all(p, static_cast<const float*>(factors.const_data_ptr()), floats(out));
  return out;
}

}  // namespace

const ProductKernels& product_kernels_in_use() { return DP2VAE_IN_USE(product_kernels); }

std::tuple<Tensor, Tensor, Tensor> linear_kept(const Tensor& activations, const Tensor& backprops) {
  const Product p = linear_product(activations, backprops);
  return kept(p, activations, {p.rows, p.channels});
}

std::tuple<Tensor, Tensor> linear_direct_norm_sq(const Tensor& activations, const Tensor& backprops) {
  return direct_norm_sq(linear_product(activations, backprops), activations);
}

Tensor linear_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors) {
  const Product p = linear_product(activations, backprops);
  return weighted_sum(p, factors, {p.rows, p.channels});
}

std::tuple<Tensor, Tensor, Tensor> conv_kept(const Tensor& activations, const Tensor& backprops,
                                             Ints weight_shape, Ints stride, Ints padding, Ints dilation,
                                             int64_t groups, bool transposed) {
  const Product p =
      conv_product(activations, backprops, weight_shape, stride, padding, dilation, groups, transposed);
  return kept(p, activations, weight_shape);
}

std::tuple<Tensor, Tensor> conv_direct_norm_sq(const Tensor& activations, const Tensor& backprops,
                                               Ints weight_shape, Ints stride, Ints padding, Ints dilation,
                                               int64_t groups, bool transposed) {
  return direct_norm_sq(
      conv_product(activations, backprops, weight_shape, stride, padding, dilation, groups, transposed),
      activations);
}

Tensor conv_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors,
                         Ints weight_shape, Ints stride, Ints padding, Ints dilation, int64_t groups,
                         bool transposed) {
  return weighted_sum(
      conv_product(activations, backprops, weight_shape, stride, padding, dilation, groups, transposed),
      factors, weight_shape);
}

Tensor kept_weighted_sum(const Tensor& values, const Tensor& factors) {
  STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.is_contiguous() &&
                      values.dim() == 2 && factors.is_cpu() && factors.scalar_type() == ScalarType::Float &&
                      factors.is_contiguous() && factors.numel() == values.size(0),
                  "kept_weighted_sum: expected contiguous float32 tensors [N, numbers] and [N]");
  const int64_t records = values.size(0), n = values.size(1);
  Tensor out = new_floats(values, {n});
  const auto kernel = product_kernels_in_use().weigh_kept;
  torch::stable::parallel_for(0, n, 4096, [&](int64_t first, int64_t end) {
    kernel(static_cast<const float*>(values.const_data_ptr()),
           static_cast<const float*>(factors.const_data_ptr()), records, n, first, end, floats(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> grad_sample_norm_sq(const Tensor& grad_sample) {
  STD_TORCH_CHECK(grad_sample.is_cpu() && grad_sample.scalar_type() == ScalarType::Float &&
                      grad_sample.is_contiguous() && grad_sample.dim() >= 1,
                  "grad_sample: expected a contiguous float32 tensor [N, ...]");
  const int64_t records = grad_sample.size(0), n = records > 0 ? grad_sample.numel() / records : 0;
  Tensor norm_sq = new_floats(grad_sample, {records}), error = new_floats(grad_sample, {records});
  const auto kernel = product_kernels_in_use().squares;
  const float* values = static_cast<const float*>(grad_sample.const_data_ptr());
  float *norms = floats(norm_sq), *errors = floats(error);
  torch::stable::parallel_for(0, records, 1 + 16384 / (n + 1), [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) set_norm(kernel(values + r * n, n), n, norms + r, errors + r);
  });
  return {norm_sq, error};
}

}  // namespace dp2vae
