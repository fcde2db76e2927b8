// The arguments of the noise ops, checked and turned into updates, on the host of CPU and GPU alike.
//
// The checks that a user meets are in dp2vae_fast/ops/noise.py; those here keep memory safe and noise
// unrepeated when torch.ops is called directly.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "updates.h"

namespace dp2vae {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kWordLimit = int64_t{1} << 32;

inline uint32_t first_nonce_word(int64_t mechanism, int64_t domain) {
  STD_TORCH_CHECK(0 <= mechanism && mechanism < kWordLimit / 4, "mechanism is ", mechanism,
                  ", expected 0 to 2^30 - 1");
  STD_TORCH_CHECK(0 <= domain && domain < 4, "domain is ", domain, ", expected 0 to 3");
  return static_cast<uint32_t>(4 * mechanism + domain);
}

inline void check_key_and_step(const Tensor& key, const Tensor& step) {
  STD_TORCH_CHECK(key.scalar_type() == ScalarType::Int && key.dim() == 1 && key.numel() == 8,
                  "key: expected an int32 tensor of 8 words");
  STD_TORCH_CHECK(step.scalar_type() == ScalarType::Long && step.numel() == 1,
                  "step: expected an int64 scalar");
}

inline int64_t step_on_host(const Tensor& step) {
  const int64_t at = *step.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(0 <= at && at < kWordLimit, "step is ", at,
                  ", expected 0 to 2^32 - 1: further steps would repeat");
  return at;
}

inline void key_on_host(const Tensor& key, uint32_t* words) {
  const int32_t* from = key.const_data_ptr<int32_t>();
  for (int i = 0; i < 8; ++i) words[i] = static_cast<uint32_t>(from[i * key.stride(0)]);
}

inline void check_indices(const std::vector<int64_t>& indices, size_t expected) {
  STD_TORCH_CHECK(indices.size() == expected, "indices holds ", indices.size(), " numbers for ", expected,
                  " tensors");
  std::vector<int64_t> sorted(indices);
  std::sort(sorted.begin(), sorted.end());
  STD_TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "indices repeat");
  STD_TORCH_CHECK(sorted.empty() || (sorted.front() >= 0 && sorted.back() < kWordLimit),
                  "indices are outside 0 to 2^32 - 1");
}

// `tensors` must match `model` one by one: contiguous tensors of the same dtype and size, all of them `here`.
template <class Here>
void check_list(const char* name, const Tensors& tensors, const Tensors& model, Here here) {
  STD_TORCH_CHECK(tensors.size() == model.size(), name, " holds ", tensors.size(), " tensors, expected ",
                  model.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(
        here(t) && t.is_contiguous() && (type == ScalarType::Float || type == ScalarType::Double) &&
            type == model[i].scalar_type() && t.numel() == model[i].numel(),
        name, "[", i,
        "]: expected a contiguous float32 or float64 tensor like its parameter, on the device of the first");
    STD_TORCH_CHECK(t.numel() <= 16 * kWordLimit, name, "[", i, "] has more than 2^36 elements");
  }
}

template <class T>
T* pointer(const Tensors& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[i].mutable_data_ptr());
}

struct SgdSettings {
  double std, scale, lr, momentum, dampening, weight_decay;
  bool nesterov, maximize, first_step;
};

// The update of the tensors at position i of the lists.
template <class T>
Sgd<T> sgd_of(const SgdSettings& s, const Tensors& params, const Tensors& sums, const Tensors& buffers,
              size_t i) {
  Sgd<T> update{};
  update.param = pointer<T>(params, i);
  update.sum = pointer<T>(sums, i);
  update.momentum_buffer = pointer<T>(buffers, i);
  update.std = static_cast<T>(s.std);
  update.scale = static_cast<T>(s.maximize ? -s.scale : s.scale);
  update.lr = static_cast<T>(s.lr);
  update.momentum = static_cast<T>(s.momentum);
  update.undamped = static_cast<T>(1 - s.dampening);
  update.weight_decay = static_cast<T>(s.weight_decay);
  update.nesterov = s.nesterov;
  update.first_step = s.first_step;
  return update;
}

struct AdamSettings {
  double std, scale;
  int64_t optimizer_step;
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled, maximize;
};

template <class T>
Adam<T> adam_of(const AdamSettings& s, const Tensors& params, const Tensors& sums, const Tensors& exp_avgs,
                const Tensors& exp_avg_sqs, const Tensors& max_exp_avg_sqs, size_t i) {
  STD_TORCH_CHECK(s.optimizer_step >= 1, "optimizer_step is ", s.optimizer_step, ", expected 1 or more");
  const double steps = static_cast<double>(s.optimizer_step);
  Adam<T> update{};
  update.param = pointer<T>(params, i);
  update.sum = pointer<T>(sums, i);
  update.exp_avg = pointer<T>(exp_avgs, i);
  update.exp_avg_sq = pointer<T>(exp_avg_sqs, i);
  update.max_exp_avg_sq = pointer<T>(max_exp_avg_sqs, i);
  update.std = static_cast<T>(s.std);
  update.scale = static_cast<T>(s.maximize ? -s.scale : s.scale);
  update.step_size = static_cast<T>(s.lr / (1 - std::pow(s.beta1, steps)));
  update.lerp_weight = static_cast<T>(1 - s.beta1);
  update.beta2 = static_cast<T>(s.beta2);
  update.one_minus_beta2 = static_cast<T>(1 - s.beta2);
  update.root_correction2 = static_cast<T>(std::sqrt(1 - std::pow(s.beta2, steps)));
  update.eps = static_cast<T>(s.eps);
  update.weight_decay = static_cast<T>(s.decoupled ? 0 : s.weight_decay);
  update.shrink = static_cast<T>(s.decoupled ? 1 - s.lr * s.weight_decay : 1);
  return update;
}

}  // namespace dp2vae
