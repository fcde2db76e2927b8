// The operators that bindings.cpp registers. Names, schemas and meaning: dp2vae_fast/ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace dp2vae {

using torch::stable::Tensor;

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

}  // namespace dp2vae
