// What is done to one parameter, and to one of its elements once the normal is drawn: the arithmetic of CPU
// and GPU alike. As in chacha20.h nothing may be contracted to fused multiply-adds: then both give the same
// bits.
#pragma once

#include <cstdint>

#include "chacha20.h"

namespace dp2vae {

constexpr int kSuperblock = 128;  // elements that eight ChaCha20 blocks serve
constexpr uint32_t kTail = 1;     // added to the nonce's first word for tail words

// Key and nonce of one parameter's noise.
struct Draw {
  uint32_t key[8];
  uint32_t nonce[3];
};

// Fields are in the tensor's own type, as PyTorch computes.
template <class T>
struct AddNoise {
  T* data;
  T std;
};

template <class T>
struct Sgd {
  T* param;
  const T* sum;
  T* momentum_buffer;  // null without momentum
  T std, scale, lr, momentum, undamped, weight_decay;
  bool nesterov, first_step;
};

template <class T>
struct Adam {
  T* param;
  const T* sum;
  T *exp_avg, *exp_avg_sq, *max_exp_avg_sq;  // the last null without amsgrad
  T std, scale, step_size, lerp_weight, beta2, one_minus_beta2, root_correction2, eps, weight_decay, shrink;
};

namespace DP2VAE_ISA {

// Choices are values rather than branches, and a list that may be absent is a template flag: so loops over
// these functions vectorise. What has no operand yet (a buffer at the first step) may be anything, NaN too.

template <class T>
DP2VAE_INLINE T updated(const AddNoise<T>& u, T x, T z) {
  return x + u.std * z;
}

template <bool with_momentum, class T>
DP2VAE_INLINE T updated(const Sgd<T>& u, T p, T sum, T z, T& buffer) {
  T grad = (sum + u.std * z) * u.scale;
  grad = u.weight_decay != 0 ? grad + u.weight_decay * p : grad;
  if constexpr (with_momentum) {
    const T later = buffer * u.momentum + u.undamped * grad;
    buffer = u.first_step ? grad : later;
    grad = u.nesterov ? grad + u.momentum * buffer : buffer;
  }
  return p - u.lr * grad;
}

template <bool amsgrad, class T>
DP2VAE_INLINE T updated(const Adam<T>& u, T p, T sum, T z, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) {
  p *= u.shrink;  // 1, or 1 - lr * weight_decay where the decay is decoupled
  T grad = (sum + u.std * z) * u.scale;
  grad = u.weight_decay != 0 ? grad + u.weight_decay * p : grad;
  exp_avg += u.lerp_weight * (grad - exp_avg);
  T second = exp_avg_sq * u.beta2 + u.one_minus_beta2 * grad * grad;
  exp_avg_sq = second;
  if constexpr (amsgrad) second = max_exp_avg_sq = max_exp_avg_sq < second ? second : max_exp_avg_sq;
  return p - u.step_size * exp_avg / (root(second) / u.root_correction2 + u.eps);
}

}  // namespace DP2VAE_ISA
}  // namespace dp2vae
