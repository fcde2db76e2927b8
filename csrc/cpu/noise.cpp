// random_words, add_noise_, noise_sgd_ and noise_adam_ for CPU tensors: checks, and superblocks dealt to
// threads.
//
// The argument checks that a user meets are in dp2vae_fast/ops/noise.py; those here keep memory safe and
// noise unrepeated when torch.ops is called directly.
#include "noise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../ops.h"
#include "isa.h"

namespace dp2vae {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kWordLimit = int64_t{1} << 32;
constexpr int64_t kGrain = 64;  // superblocks: 10 to 25 microseconds of work

Draw make_draw(const Tensor& key, const Tensor& step, int64_t mechanism, int64_t domain) {
  STD_TORCH_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Int && key.dim() == 1 && key.numel() == 8,
                  "key: expected an int32 CPU tensor of 8 words");
  STD_TORCH_CHECK(step.is_cpu() && step.scalar_type() == ScalarType::Long && step.numel() == 1,
                  "step: expected an int64 CPU scalar");
  STD_TORCH_CHECK(0 <= mechanism && mechanism < kWordLimit / 4, "mechanism is ", mechanism,
                  ", expected 0 to 2^30 - 1");
  STD_TORCH_CHECK(0 <= domain && domain < 4, "domain is ", domain, ", expected 0 to 3");
  const int64_t at = *step.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(0 <= at && at < kWordLimit, "step is ", at,
                  ", expected 0 to 2^32 - 1: further steps would repeat");
  Draw draw{};
  const int32_t* words = key.const_data_ptr<int32_t>();
  for (int i = 0; i < 8; ++i) draw.key[i] = static_cast<uint32_t>(words[i * key.stride(0)]);
  draw.nonce[0] = static_cast<uint32_t>(4 * mechanism + domain);
  draw.nonce[1] = static_cast<uint32_t>(at);
  return draw;
}

void check_indices(const std::vector<int64_t>& indices, size_t expected) {
  STD_TORCH_CHECK(indices.size() == expected, "indices holds ", indices.size(), " numbers for ", expected,
                  " tensors");
  std::vector<int64_t> sorted(indices);
  std::sort(sorted.begin(), sorted.end());
  STD_TORCH_CHECK(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "indices repeat");
  STD_TORCH_CHECK(sorted.empty() || (sorted.front() >= 0 && sorted.back() < kWordLimit),
                  "indices are outside 0 to 2^32 - 1");
}

// `tensors` must match `model` one by one: contiguous CPU tensors of the same dtype and size.
void check_list(const char* name, const Tensors& tensors, const Tensors& model) {
  STD_TORCH_CHECK(tensors.size() == model.size(), name, " holds ", tensors.size(), " tensors, expected ",
                  model.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    const ScalarType type = t.scalar_type();
    STD_TORCH_CHECK(
        t.is_cpu() && t.is_contiguous() && (type == ScalarType::Float || type == ScalarType::Double) &&
            type == model[i].scalar_type() && t.numel() == model[i].numel(),
        name, "[", i, "]: expected a contiguous float32 or float64 CPU tensor like its parameter");
    STD_TORCH_CHECK(t.numel() <= 16 * kWordLimit, name, "[", i, "] has more than 2^36 elements");
  }
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

template <class T>
T* pointer(const Tensors& tensors, size_t i) {
  return tensors.empty() ? nullptr : static_cast<T*>(tensors[i].mutable_data_ptr());
}

}  // namespace

const NoiseKernels& noise_kernels_in_use() {
#if DP2VAE_HAS_X86_BUILDS
  return in_use(portable::noise_kernels, avx2::noise_kernels, avx512::noise_kernels);
#else
  return portable::noise_kernels;
#endif
}

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
  update_all<Sgd>(params, make_draw(key, step, mechanism, 0), indices, noise_kernels_in_use().sgd_float,
                  noise_kernels_in_use().sgd_double, [&](auto zero, size_t i) {
                    using T = decltype(zero);
                    Sgd<T> update{};
                    update.param = pointer<T>(params, i);
                    update.sum = pointer<T>(sums, i);
                    update.momentum_buffer = pointer<T>(momentum_buffers, i);
                    update.std = static_cast<T>(std);
                    update.scale = static_cast<T>(maximize ? -scale : scale);
                    update.lr = static_cast<T>(lr);
                    update.momentum = static_cast<T>(momentum);
                    update.undamped = static_cast<T>(1 - dampening);
                    update.weight_decay = static_cast<T>(weight_decay);
                    update.nesterov = nesterov;
                    update.first_step = first_step;
                    return update;
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
  STD_TORCH_CHECK(optimizer_step >= 1, "optimizer_step is ", optimizer_step, ", expected 1 or more");
  const double steps = static_cast<double>(optimizer_step);
  update_all<Adam>(params, make_draw(key, step, mechanism, 0), indices, noise_kernels_in_use().adam_float,
                   noise_kernels_in_use().adam_double, [&](auto zero, size_t i) {
                     using T = decltype(zero);
                     Adam<T> update{};
                     update.param = pointer<T>(params, i);
                     update.sum = pointer<T>(sums, i);
                     update.exp_avg = pointer<T>(exp_avgs, i);
                     update.exp_avg_sq = pointer<T>(exp_avg_sqs, i);
                     update.max_exp_avg_sq = pointer<T>(max_exp_avg_sqs, i);
                     update.std = static_cast<T>(std);
                     update.scale = static_cast<T>(maximize ? -scale : scale);
                     update.step_size = static_cast<T>(lr / (1 - std::pow(beta1, steps)));
                     update.lerp_weight = static_cast<T>(1 - beta1);
                     update.beta2 = static_cast<T>(beta2);
                     update.one_minus_beta2 = static_cast<T>(1 - beta2);
                     update.root_correction2 = static_cast<T>(std::sqrt(1 - std::pow(beta2, steps)));
                     update.eps = static_cast<T>(eps);
                     update.weight_decay = static_cast<T>(decoupled ? 0 : weight_decay);
                     update.shrink = static_cast<T>(decoupled ? 1 - lr * weight_decay : 1);
                     return update;
                   });
}

}  // namespace dp2vae
