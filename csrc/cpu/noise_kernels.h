// The CPU noise kernels, compiled once per instruction set: include with DP2VAE_ISA defined and its target
// pragma set.
#pragma once

#include <cstring>

#include "lanes.h"
#include "noise.h"

namespace dp2vae::DP2VAE_ISA {

// Standard normals of one superblock, in row-major element order: row w holds word w of blocks 8 s to 8 s
// + 7.
DP2VAE_INLINE void normals(const Draw& draw, int64_t superblock, float* z) {
  using U = Lanes8::U;
  using F = Lanes8::F;
  const U lane = {0, 1, 2, 3, 4, 5, 6, 7};
  const uint32_t block = static_cast<uint32_t>(8 * superblock);
  U x[16];
  chacha20_block<Lanes8>(draw.key, lane + block, draw.nonce, x);
  Lanes8::I any_tail = {};
  for (int w = 0; w < 16; w += 2) {
    F cosine, sine;
    direction<Lanes8>(x[w + 1], cosine, sine);
    const F r = radius<Lanes8>(x[w]);
    const F rows[2] = {r * cosine, r * sine};
    memcpy(z + 8 * w, rows, sizeof rows);
    any_tail |= x[w] < 0x10000u;
  }
  uint64_t any[4];
  memcpy(any, &any_tail, sizeof any);
  if (__builtin_expect((any[0] | any[1] | any[2] | any[3]) == 0, 1)) return;
  const uint32_t tail_nonce[3] = {draw.nonce[0] + kTail, draw.nonce[1], draw.nonce[2]};
  for (int w = 0; w < 16; w += 2) {
    for (int l = 0; l < 8; ++l) {
      if (x[w][l] >= 0x10000u) continue;
      uint32_t tail[16];
      chacha20_block<Scalar>(draw.key, block + l, tail_nonce, tail);
      float cosine, sine;
      direction<Scalar>(x[w + 1][l], cosine, sine);
      const float r = tail_radius(x[w][l], tail[w]);
      z[8 * w + l] = r * cosine;
      z[8 * w + 8 + l] = r * sine;
    }
  }
}

template <class T>
DP2VAE_INLINE void apply(const AddNoise<T>& u, int64_t begin, const float* z, int count) {
  T* data = u.data + begin;
  for (int i = 0; i < count; ++i) data[i] += u.std * static_cast<T>(z[i]);
}

template <class T>
DP2VAE_INLINE void apply(const Sgd<T>& u, int64_t begin, const float* z, int count) {
  T* __restrict param = u.param + begin;
  const T* __restrict sum = u.sum + begin;
  T* __restrict buffer = u.momentum_buffer ? u.momentum_buffer + begin : nullptr;
  for (int i = 0; i < count; ++i) {
    T grad = (sum[i] + u.std * static_cast<T>(z[i])) * u.scale;
    if (u.weight_decay != 0) grad += u.weight_decay * param[i];
    if (buffer) {
      const T average = u.first_step ? grad : buffer[i] * u.momentum + u.undamped * grad;
      buffer[i] = average;
      grad = u.nesterov ? grad + u.momentum * average : average;
    }
    param[i] -= u.lr * grad;
  }
}

template <class T>
DP2VAE_INLINE T root(T x) {
  if constexpr (sizeof(T) == 4) return __builtin_sqrtf(x);
  return __builtin_sqrt(x);
}

template <class T>
DP2VAE_INLINE void apply(const Adam<T>& u, int64_t begin, const float* z, int count) {
  T* __restrict param = u.param + begin;
  const T* __restrict sum = u.sum + begin;
  T* __restrict first = u.exp_avg + begin;
  T* __restrict second = u.exp_avg_sq + begin;
  T* __restrict largest = u.max_exp_avg_sq ? u.max_exp_avg_sq + begin : nullptr;
  for (int i = 0; i < count; ++i) {
    T grad = (sum[i] + u.std * static_cast<T>(z[i])) * u.scale;
    T p = param[i] * u.shrink;  // 1, or 1 - lr * weight_decay where the decay is decoupled
    if (u.weight_decay != 0) grad += u.weight_decay * p;
    const T m = first[i] + u.lerp_weight * (grad - first[i]);
    T v = second[i] * u.beta2 + u.one_minus_beta2 * grad * grad;
    first[i] = m;
    second[i] = v;
    if (largest) largest[i] = v = largest[i] < v ? v : largest[i];
    param[i] = p - u.step_size * m / (root(v) / u.root_correction2 + u.eps);
  }
}

template <class Update>
void run(const Draw& draw, int64_t n, int64_t first, int64_t end, const Update& update) {
  alignas(32) float z[kSuperblock];
  for (int64_t s = first; s < end; ++s) {
    normals(draw, s, z);
    const int64_t begin = s * kSuperblock;
    if (n - begin >= kSuperblock)
      apply(update, begin, z, kSuperblock);
    else
      apply(update, begin, z, static_cast<int>(n - begin));
  }
}

void random_words(const Draw& draw, int64_t n, int64_t first, int64_t end, uint32_t* out) {
  const Lanes8::U lane = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t block = first; block < end; block += 8) {
    Lanes8::U x[16];
    chacha20_block<Lanes8>(draw.key, lane + static_cast<uint32_t>(block), draw.nonce, x);
    uint32_t words[16][8], turned[128];
    memcpy(words, x, sizeof words);
    for (int w = 0; w < 16; ++w)
      for (int l = 0; l < 8; ++l) turned[16 * l + w] = words[w][l];
    const int64_t stop = n < 16 * end ? n : 16 * end;
    const int64_t left = stop - 16 * block;
    memcpy(out + 16 * block, turned, sizeof(uint32_t) * (left < 128 ? left : 128));
  }
}

#define DP2VAE_NAME_(isa) #isa
#define DP2VAE_NAME(isa) DP2VAE_NAME_(isa)
extern const NoiseKernels noise_kernels = {DP2VAE_NAME(DP2VAE_ISA), random_words,     run<AddNoise<float>>,
                                           run<AddNoise<double>>,   run<Sgd<float>>,  run<Sgd<double>>,
                                           run<Adam<float>>,        run<Adam<double>>};

}  // namespace dp2vae::DP2VAE_ISA
