// random_words, add_noise_, noise_sgd_ and noise_adam_ for CUDA tensors: all tensors of a call in one launch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "../noise_arguments.h"
#include "launch.h"

namespace dp2vae::cuda {
namespace {

// Key and step may each lie on the host or on the launch's device. A step on the host is read here and now,
// so a captured graph would draw the same noise at every replay.
Source make_source(const Launch& launch, const Tensor& key, const Tensor& step, int64_t mechanism,
                   int64_t domain) {
  check_key_and_step(key, step);
  STD_TORCH_CHECK((key.is_cpu() || launch.has(key)) && (step.is_cpu() || launch.has(step)), launch.op,
                  ": key and step: expected tensors on the host or on CUDA device ", launch.device);
  Source source{};
  source.use = first_nonce_word(mechanism, domain);
  if (key.is_cpu()) {
    key_on_host(key, source.key);
  } else {
    source.device_key = key.const_data_ptr<int32_t>();
    source.device_key_stride = key.stride(0);
  }
  if (step.is_cpu()) {
    bool capturing = false;
    check(is_capturing(launch.device, launch.stream, &capturing), launch.op);
    STD_TORCH_CHECK(!capturing, launch.op,
                    ": step lies on the host, so every replay of this graph would repeat its noise: give a "
                    "CUDA tensor, and advance it in the graph");
    source.step = step_on_host(step);
  } else {
    source.device_step = step.const_data_ptr<int64_t>();
  }
  return source;
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;  // null is aligned
  return true;
}

template <class T>
bool aligned(const AddNoise<T>& u) {
  return aligned({u.data});
}

template <class T>
bool aligned(const Sgd<T>& u) {
  return aligned({u.param, u.sum, u.momentum_buffer});
}

template <class T>
bool aligned(const Adam<T>& u) {
  return aligned({u.param, u.sum, u.exp_avg, u.exp_avg_sq, u.max_exp_avg_sq});
}

// Makes one slot for every tensor, floats and doubles apart, and launches them. `make` is called with a value
// of the tensor's element type and the position in the list, and returns the update.
template <template <class> class Update, class Make>
void update_all(const Launch& launch, const Source& source, const Tensors& tensors,
                const std::vector<int64_t>& indices, Make make) {
  check_indices(indices, tensors.size());
  const auto update_those = [&](auto zero, ScalarType type) {
    using T = decltype(zero);
    std::vector<Slot<Update<T>>> slots;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].scalar_type() != type) continue;
      const Update<T> update = make(zero, i);
      slots.push_back({update, tensors[i].numel(), static_cast<uint32_t>(indices[i]), 0, aligned(update)});
    }
    const auto count = static_cast<int64_t>(slots.size());
    check(launch_updates(launch.device, launch.stream, source, slots.data(), count), launch.op);
  };
  update_those(float{}, ScalarType::Float);
  update_those(double{}, ScalarType::Double);
}

void check_list(const Launch& launch, const char* name, const Tensors& tensors, const Tensors& model) {
  dp2vae::check_list(name, tensors, model, [&](const Tensor& t) { return launch.has(t); });
}

Tensor random_words(const Tensor& key, const Tensor& step, int64_t mechanism, int64_t domain, int64_t index,
                    int64_t n) {
  const Launch launch("random_words", key);
  const Source source = make_source(launch, key, step, mechanism, domain);
  check_indices({index}, 1);
  STD_TORCH_CHECK(0 <= n && n <= 16 * kWordLimit, "n is ", n, ", expected 0 to 2^36");
  Tensor out = torch::stable::new_empty(key, {n});
  auto* words = static_cast<uint32_t*>(out.mutable_data_ptr());
  check(launch_random_words(launch.device, launch.stream, source, static_cast<uint32_t>(index), n, words),
        launch.op);
  return out;
}

void add_noise_(Tensors tensors, const Tensor& key, const Tensor& step, int64_t mechanism,
                std::vector<int64_t> indices, double std) {
  const Launch launch("add_noise_", tensors.empty() ? key : tensors[0]);
  check_list(launch, "tensors", tensors, tensors);
  const Source source = make_source(launch, key, step, mechanism, 0);
  update_all<AddNoise>(launch, source, tensors, indices, [&](auto zero, size_t i) {
    using T = decltype(zero);
    return AddNoise<T>{pointer<T>(tensors, i), static_cast<T>(std)};
  });
}

void noise_sgd_(Tensors params, Tensors sums, Tensors momentum_buffers, const Tensor& key, const Tensor& step,
                int64_t mechanism, std::vector<int64_t> indices, double std, double scale, double lr,
                double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                bool first_step) {
  const Launch launch("noise_sgd_", params.empty() ? key : params[0]);
  check_list(launch, "params", params, params);
  check_list(launch, "sums", sums, params);
  if (momentum != 0 || !momentum_buffers.empty())
    check_list(launch, "momentum_buffers", momentum_buffers, params);
  if (momentum == 0) momentum_buffers.clear();
  const Source source = make_source(launch, key, step, mechanism, 0);
  const SgdSettings settings{std,          scale,    lr,       momentum,  dampening,
                             weight_decay, nesterov, maximize, first_step};
  update_all<Sgd>(launch, source, params, indices, [&](auto zero, size_t i) {
    return sgd_of<decltype(zero)>(settings, params, sums, momentum_buffers, i);
  });
}

void noise_adam_(Tensors params, Tensors sums, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                 const Tensor& key, const Tensor& step, int64_t mechanism, std::vector<int64_t> indices,
                 double std, double scale, int64_t optimizer_step, double lr, double beta1, double beta2,
                 double eps, double weight_decay, bool decoupled, bool maximize) {
  const Launch launch("noise_adam_", params.empty() ? key : params[0]);
  check_list(launch, "params", params, params);
  check_list(launch, "sums", sums, params);
  check_list(launch, "exp_avgs", exp_avgs, params);
  check_list(launch, "exp_avg_sqs", exp_avg_sqs, params);
  if (!max_exp_avg_sqs.empty()) check_list(launch, "max_exp_avg_sqs", max_exp_avg_sqs, params);
  const Source source = make_source(launch, key, step, mechanism, 0);
  const AdamSettings settings{std,   scale, optimizer_step, lr,        beta1,
                              beta2, eps,   weight_decay,   decoupled, maximize};
  update_all<Adam>(launch, source, params, indices, [&](auto zero, size_t i) {
    return adam_of<decltype(zero)>(settings, params, sums, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, i);
  });
}

}  // namespace
}  // namespace dp2vae::cuda

STABLE_TORCH_LIBRARY_IMPL(dp2vae_fast, CUDA, library) {
  library.impl("random_words", TORCH_BOX(&dp2vae::cuda::random_words));
  library.impl("add_noise_", TORCH_BOX(&dp2vae::cuda::add_noise_));
  library.impl("noise_sgd_", TORCH_BOX(&dp2vae::cuda::noise_sgd_));
  library.impl("noise_adam_", TORCH_BOX(&dp2vae::cuda::noise_adam_));
}
