// Norms of per-sample gradients of an embedding table: rows that name the same entry are added before they
// are squared.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "../ops.h"
#include "operands.h"

namespace dp2vae {

std::tuple<Tensor, Tensor> embedding_norm_sq(const Tensor& indices, const Tensor& backprops,
                                             int64_t padding_idx) {
  STD_TORCH_CHECK(indices.is_cpu() && backprops.is_cpu() && indices.scalar_type() == ScalarType::Long &&
                      backprops.scalar_type() == ScalarType::Float && indices.dim() == 2 &&
                      backprops.dim() == 3 && indices.size(0) == backprops.size(0) &&
                      indices.size(1) == backprops.size(1),
                  "expected int64 indices [N, T] and float32 backprops [N, T, D]");
  const int64_t records = indices.size(0), positions = indices.size(1), features = backprops.size(2);
  const int64_t index_step[] = {indices.stride(0), indices.stride(1)};
  const int64_t step[] = {backprops.stride(0), backprops.stride(1), backprops.stride(2)};
  const auto* named = static_cast<const int64_t*>(indices.const_data_ptr());
  const auto* values = static_cast<const float*>(backprops.const_data_ptr());
  Tensor norm_sq = torch::stable::new_empty(backprops, {records}),
         error = torch::stable::new_empty(backprops, {records});
  auto *norms = static_cast<float*>(norm_sq.mutable_data_ptr()),
       *errors = static_cast<float*>(error.mutable_data_ptr());
  // As the reference counts it, though sums are in double here: products are added up in float32's company
  // later.
  const double relative = roundoff(static_cast<double>(features + 2 * positions + 2));
  const double lost = static_cast<double>(features) * positions * positions * kTiny;
  torch::stable::parallel_for(0, records, 1, [&](int64_t first, int64_t end) {
    std::vector<std::pair<int64_t, int64_t>> order;  // entry, position
    std::vector<double> sum(features);
    for (int64_t n = first; n < end; ++n) {
      order.clear();
      for (int64_t t = 0; t < positions; ++t) {
        const int64_t entry = named[n * index_step[0] + t * index_step[1]];
        if (entry != padding_idx) order.emplace_back(entry, t);
      }
      std::sort(order.begin(), order.end());
      double total = 0, reach = 0;
      for (size_t i = 0; i < order.size();) {
        const int64_t entry = order[i].first;
        std::fill(sum.begin(), sum.end(), 0.0);
        double lengths = 0;
        for (; i < order.size() && order[i].first == entry; ++i) {
          const float* row = values + n * step[0] + order[i].second * step[1];
          double square = 0;
          for (int64_t f = 0; f < features; ++f) {
            const double x = row[f * step[2]];
            sum[f] += x;
            square += x * x;
          }
          lengths += std::sqrt(square);
        }
        for (const double x : sum) total += x * x;
        reach += lengths * lengths;
      }
      norms[n] = static_cast<float>(total);
      errors[n] = static_cast<float>(relative * reach + lost);
    }
  });
  return {norm_sq, error};
}

}  // namespace dp2vae
