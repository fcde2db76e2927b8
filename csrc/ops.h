// The operators that bindings.cpp registers. Names, schemas and meaning: dp2vae_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace dp2vae {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

Tensor random_words(const Tensor& key, const Tensor& step, int64_t mechanism, int64_t domain, int64_t index,
                    int64_t n);

void add_noise_(std::vector<Tensor> tensors, const Tensor& key, const Tensor& step, int64_t mechanism,
                std::vector<int64_t> indices, double std);

void noise_sgd_(std::vector<Tensor> params, std::vector<Tensor> sums, std::vector<Tensor> momentum_buffers,
                const Tensor& key, const Tensor& step, int64_t mechanism, std::vector<int64_t> indices,
                double std, double scale, double lr, double momentum, double dampening, double weight_decay,
                bool nesterov, bool maximize, bool first_step);

void noise_adam_(std::vector<Tensor> params, std::vector<Tensor> sums, std::vector<Tensor> exp_avgs,
                 std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, const Tensor& key,
                 const Tensor& step, int64_t mechanism, std::vector<int64_t> indices, double std,
                 double scale, int64_t optimizer_step, double lr, double beta1, double beta2, double eps,
                 double weight_decay, bool decoupled, bool maximize);

std::tuple<Tensor, Tensor, Tensor> linear_kept(const Tensor& activations, const Tensor& backprops);
std::tuple<Tensor, Tensor> linear_direct_norm_sq(const Tensor& activations, const Tensor& backprops);
Tensor linear_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors);
Tensor outer_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors);
std::tuple<Tensor, Tensor, Tensor> conv_kept(const Tensor& activations, const Tensor& backprops,
                                             Ints weight_shape, Ints stride, Ints padding, Ints dilation,
                                             int64_t groups, bool transposed);
std::tuple<Tensor, Tensor> conv_direct_norm_sq(const Tensor& activations, const Tensor& backprops,
                                               Ints weight_shape, Ints stride, Ints padding, Ints dilation,
                                               int64_t groups, bool transposed);
Tensor conv_weighted_sum(const Tensor& activations, const Tensor& backprops, const Tensor& factors,
                         Ints weight_shape, Ints stride, Ints padding, Ints dilation, int64_t groups,
                         bool transposed);
std::tuple<Tensor, Tensor> linear_norm_sq(const Tensor& activations, const Tensor& backprops);
std::tuple<Tensor, Tensor> conv_norm_sq(const Tensor& activations, const Tensor& backprops, Ints weight_shape,
                                        Ints stride, Ints padding, Ints dilation, int64_t groups,
                                        bool transposed);
std::tuple<Tensor, Tensor> grad_sample_norm_sq(const Tensor& grad_sample);
std::tuple<Tensor, Tensor> group_norm_grad_sample(const Tensor& activations, const Tensor& backprops,
                                                  int64_t groups, double eps);
std::tuple<Tensor, Tensor> layer_norm_grad_sample(const Tensor& activations, const Tensor& backprops,
                                                  bool rms, double eps);
std::tuple<Tensor, Tensor> embedding_norm_sq(const Tensor& indices, const Tensor& backprops,
                                             int64_t padding_idx);
Tensor clip_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm);
Tensor normalize_factors(const Tensor& norm_sq, const Tensor& error, double max_grad_norm, double stability);
Tensor kept_weighted_sum(const Tensor& values, const Tensor& factors);

}  // namespace dp2vae
