// random_words, add_noise_, noise_sgd_ and noise_adam_ for CPU tensors: superblocks dealt to threads.
#include "noise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "../noise_arguments.h"
#include "../ops.h"
#include "isa.h"

namespace dp2vae {
namespace {

constexpr int64_t kGrain = 64;  // superblocks: 10 to 25 microseconds of work

Draw make_draw(const Tensor& key, const Tensor& step, int64_t mechanism, int64_t domain) {
  check_key_and_step(key, step);
  STD_TORCH_CHECK(key.is_cpu() && step.is_cpu(), "key and step: expected CPU tensors");
  Draw draw{};
  key_on_host(key, draw.key);
  draw.nonce[0] = first_nonce_word(mechanism, domain);
  draw.nonce[1] = static_cast<uint32_t>(step_on_host(step));
  return draw;
}

void check_list(const char* name, const Tensors& tensors, const Tensors& model) {
  dp2vae::check_list(name, tensors, model, [](const Tensor& t) { return t.is_cpu(); });
}

// One tensor's share of a call.
template <class Update>
struct Job {
  Draw draw;
  int64_t n;
  Update update;
};

// Runs `kernel` over all superblocks of all jobs, split among threads wherever that is even: a superblock's
// noise does not depend on who computes it.
template <class Update>
void run_jobs(const std::vector<Job<Update>>& jobs, Kernel<Update> kernel) {
  std::vector<int64_t> ends;  // running total of superblocks
  int64_t total = 0;
  for (const auto& job : jobs) ends.push_back(total += (job.n + kSuperblock - 1) / kSuperblock);
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; ++i) {
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      const int64_t stop = std::min(end, ends[i]);
      if (begin < stop) kernel(jobs[i].draw, jobs[i].n, begin - start, stop - start, jobs[i].update);
      begin = std::max(begin, stop);
    }
  });
}

// Makes one job for every tensor, floats and doubles apart, and runs them. `make` is called with a value of
// the tensor's element type and the position in the list, and returns the update.
template <template <class> class Update, class Make>
void update_all(const Tensors& tensors, Draw draw, const std::vector<int64_t>& indices,
                Kernel<Update<float>> float_kernel, Kernel<Update<double>> double_kernel, Make make) {
  check_indices(indices, tensors.size());
  std::vector<Job<Update<float>>> floats;
  std::vector<Job<Update<double>>> doubles;
  for (size_t i = 0; i < tensors.size(); ++i) {
    draw.nonce[2] = static_cast<uint32_t>(indices[i]);
    if (tensors[i].scalar_type() == ScalarType::Float)
      floats.push_back({draw, tensors[i].numel(), make(float{}, i)});
    else
      doubles.push_back({draw, tensors[i].numel(), make(double{}, i)});
  }
  run_jobs(floats, float_kernel);
  run_jobs(doubles, double_kernel);
}

}  // namespace

const NoiseKernels& noise_kernels_in_use() { return DP2VAE_IN_USE(noise_kernels); }

Tensor random_words(const Tensor& key, const Tensor& step, int64_t mechanism, int64_t domain, int64_t index,
                    int64_t n) {
  Draw draw = make_draw(key, step, mechanism, domain);
  check_indices({index}, 1);
  STD_TORCH_CHECK(0 <= n && n <= 16 * kWordLimit, "n is ", n, ", expected 0 to 2^36");
  draw.nonce[2] = static_cast<uint32_t>(index);
  Tensor out = torch::stable::new_empty(key, {n});
  auto* words = static_cast<uint32_t*>(out.mutable_data_ptr());
  const auto kernel = noise_kernels_in_use().random_words;
  torch::stable::parallel_for(0, (n + 15) / 16, 8 * kGrain,
                              [&](int64_t begin, int64_t end) { kernel(draw, n, begin, end, words); });
  return out;
}

void add_noise_(Tensors tensors, const Tensor& key, const Tensor& step, int64_t mechanism,
                std::vector<int64_t> indices, double std) {
  check_list("tensors", tensors, tensors);
  update_all<AddNoise>(tensors, make_draw(key, step, mechanism, 0), indices,
                       noise_kernels_in_use().add_noise_float, noise_kernels_in_use().add_noise_double,
                       [&](auto zero, size_t i) {
                         using T = decltype(zero);
                         return AddNoise<T>{pointer<T>(tensors, i), static_cast<T>(std)};
                       });
}

void noise_sgd_(Tensors params, Tensors sums, Tensors momentum_buffers, const Tensor& key, const Tensor& step,
                int64_t mechanism, std::vector<int64_t> indices, double std, double scale, double lr,
                double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                bool first_step) {
  check_list("params", params, params);
  check_list("sums", sums, params);
  if (momentum != 0 || !momentum_buffers.empty()) check_list("momentum_buffers", momentum_buffers, params);
  if (momentum == 0) momentum_buffers.clear();
  const SgdSettings settings{std,          scale,    lr,       momentum,  dampening,
                             weight_decay, nesterov, maximize, first_step};
  update_all<Sgd>(params, make_draw(key, step, mechanism, 0), indices, noise_kernels_in_use().sgd_float,
                  noise_kernels_in_use().sgd_double, [&](auto zero, size_t i) {
                    return sgd_of<decltype(zero)>(settings, params, sums, momentum_buffers, i);
                  });
}

void noise_adam_(Tensors params, Tensors sums, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
                 const Tensor& key, const Tensor& step, int64_t mechanism, std::vector<int64_t> indices,
                 double std, double scale, int64_t optimizer_step, double lr, double beta1, double beta2,
                 double eps, double weight_decay, bool decoupled, bool maximize) {
  check_list("params", params, params);
  check_list("sums", sums, params);
  check_list("exp_avgs", exp_avgs, params);
  check_list("exp_avg_sqs", exp_avg_sqs, params);
  if (!max_exp_avg_sqs.empty()) check_list("max_exp_avg_sqs", max_exp_avg_sqs, params);
  const AdamSettings settings{std,   scale, optimizer_step, lr,        beta1,
                              beta2, eps,   weight_decay,   decoupled, maximize};
  update_all<Adam>(params, make_draw(key, step, mechanism, 0), indices, noise_kernels_in_use().adam_float,
                   noise_kernels_in_use().adam_double, [&](auto zero, size_t i) {
                     return adam_of<decltype(zero)>(settings, params, sums, exp_avgs, exp_avg_sqs,
                                                    max_exp_avg_sqs, i);
                   });
}

}  // namespace dp2vae
