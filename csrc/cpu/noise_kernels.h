// The CPU noise kernels, compiled once per instruction set: include with DP2VAE_LANES and DP2VAE_ISA defined
// and the target pragma set.
#pragma once

#include <cstring>

#include "lanes.h"
#include "noise.h"

namespace dp2vae::DP2VAE_ISA {

// A pass fills as many superblocks as there are lanes for, at least one: a lane is a block, eight a
// superblock.
constexpr int kPassBlocks = kWidth < 8 ? 8 : kWidth;
constexpr int kPass = 16 * kPassBlocks;  // elements

// Where the normal of word w of a pass's block goes.
constexpr int place(int block, int w) { return block / 8 * kSuperblock + 8 * w + block % 8; }

// Writes word w's normals of the blocks from `block` on: a run of elements for every superblock.
DP2VAE_INLINE void store_row(float* z, int block, int w, const Lanes::F& row) {
  constexpr int kRun = kWidth < 8 ? kWidth : 8;
  for (int l = 0; l < kWidth; l += kRun)
    memcpy(z + place(block + l, w), reinterpret_cast<const float*>(&row) + l, sizeof(float) * kRun);
}

// The two normals of every lane's radius and angle word. Returns the lanes that need a tail word instead.
DP2VAE_INLINE Lanes::I box_muller(const Lanes::U& radius_word, const Lanes::U& angle_word, Lanes::F& first,
                                  Lanes::F& second) {
  direction<Lanes>(angle_word, first, second);
  const Lanes::F r = radius<Lanes>(radius_word);
  first *= r;
  second *= r;
  return radius_word < 0x10000u;
}

DP2VAE_INLINE bool any(const Lanes::I& mask) {
  uint64_t parts[kWidth / 2], either = 0;
  memcpy(parts, &mask, sizeof parts);
  for (uint64_t part : parts) either |= part;
  return either != 0;
}

// Standard normals of the superblocks of one pass, in row-major element order: row w of a superblock holds
// word w of its eight blocks.
DP2VAE_INLINE void normals(const Draw& draw, int64_t superblock, float* z) {
  for (int offset = 0; offset < kPassBlocks; offset += kWidth) {
    const uint32_t block = static_cast<uint32_t>(8 * superblock) + offset;
    Lanes::U x[16];
    chacha20_block<Lanes>(draw.key, Lanes::count_from(block), draw.nonce, x);
    Lanes::I tails = {};
    for (int w = 0; w < 16; w += 2) {
      Lanes::F first, second;
      tails |= box_muller(x[w], x[w + 1], first, second);
      store_row(z, offset, w, first);
      store_row(z, offset, w + 1, second);
    }
    if (__builtin_expect(!any(tails), 1)) continue;
    const uint32_t tail_nonce[3] = {draw.nonce[0] + kTail, draw.nonce[1], draw.nonce[2]};
    for (int w = 0; w < 16; w += 2) {
      for (int l = 0; l < kWidth; ++l) {
        if (x[w][l] >= 0x10000u) continue;
        uint32_t tail[16];
        chacha20_block<Scalar>(draw.key, block + l, tail_nonce, tail);
        box_muller_tail(x[w][l], tail[w], x[w + 1][l], z[place(offset + l, w)], z[place(offset + l, w + 1)]);
      }
    }
  }
}

// One word triple in every lane, for tests. Returns false where the lanes disagree.
bool box_muller_of(uint32_t radius_word, uint32_t tail_word, uint32_t angle_word, float* pair) {
  const Lanes::U zero = {};
  Lanes::F first, second;
  const Lanes::I tails = box_muller(zero + radius_word, zero + angle_word, first, second);
  for (int l = 0; l < kWidth; ++l) {
    float here[2] = {first[l], second[l]};
    if (tails[l]) box_muller_tail(radius_word, tail_word, angle_word, here[0], here[1]);
    if (l > 0 && memcmp(here, pair, sizeof here) != 0) return false;
    memcpy(pair, here, sizeof here);
  }
  return true;
}

// The updates: plain loops over updates.h that the compiler vectorises. For that, settings are copied: a
// store must not seem to change them.

template <class T>
DP2VAE_INLINE void apply(AddNoise<T> u, int64_t begin, const float* z, int count) {
  T* data = u.data + begin;
  for (int i = 0; i < count; ++i) data[i] = updated(u, data[i], static_cast<T>(z[i]));
}

template <bool with_momentum, class T>
DP2VAE_INLINE void sgd(Sgd<T> u, int64_t begin, const float* z, int count) {
  T* __restrict param = u.param + begin;
  const T* __restrict sum = u.sum + begin;
  T* __restrict buffer = u.momentum_buffer + (with_momentum ? begin : 0);
  for (int i = 0; i < count; ++i) {
    T average = with_momentum ? buffer[i] : 0;
    param[i] = updated<with_momentum>(u, param[i], sum[i], static_cast<T>(z[i]), average);
    if constexpr (with_momentum) buffer[i] = average;
  }
}

template <class T>
DP2VAE_INLINE void apply(const Sgd<T>& u, int64_t begin, const float* z, int count) {
  u.momentum_buffer ? sgd<true>(u, begin, z, count) : sgd<false>(u, begin, z, count);
}

template <bool amsgrad, class T>
DP2VAE_INLINE void adam(Adam<T> u, int64_t begin, const float* z, int count) {
  T* __restrict param = u.param + begin;
  const T* __restrict sum = u.sum + begin;
  T* __restrict first = u.exp_avg + begin;
  T* __restrict second = u.exp_avg_sq + begin;
  T* __restrict largest = u.max_exp_avg_sq + (amsgrad ? begin : 0);
  for (int i = 0; i < count; ++i) {
    T m = first[i], v = second[i], most = amsgrad ? largest[i] : 0;
    param[i] = updated<amsgrad>(u, param[i], sum[i], static_cast<T>(z[i]), m, v, most);
    first[i] = m;
    second[i] = v;
    if constexpr (amsgrad) largest[i] = most;
  }
}

template <class T>
DP2VAE_INLINE void apply(const Adam<T>& u, int64_t begin, const float* z, int count) {
  u.max_exp_avg_sq ? adam<true>(u, begin, z, count) : adam<false>(u, begin, z, count);
}

template <class Update>
void run(const Draw& draw, int64_t n, int64_t first, int64_t end, const Update& update) {
  alignas(64) float z[kPass];
  const int64_t stop = n < end * kSuperblock ? n : end * kSuperblock;
  for (int64_t s = first; s < end; s += kPassBlocks / 8) {
    normals(draw, s, z);
    const int64_t begin = s * kSuperblock;
    if (stop - begin >= kPass)
      apply(update, begin, z, kPass);
    else
      apply(update, begin, z, static_cast<int>(stop - begin));
  }
}

void random_words(const Draw& draw, int64_t n, int64_t first, int64_t end, uint32_t* out) {
  const int64_t stop = n < 16 * end ? n : 16 * end;
  for (int64_t block = first; block < end; block += kWidth) {
    Lanes::U x[16];
    chacha20_block<Lanes>(draw.key, Lanes::count_from(static_cast<uint32_t>(block)), draw.nonce, x);
    uint32_t words[16][kWidth], turned[16 * kWidth];
    memcpy(words, x, sizeof words);
    for (int w = 0; w < 16; ++w)
      for (int l = 0; l < kWidth; ++l) turned[16 * l + w] = words[w][l];
    const int64_t left = stop - 16 * block;
    memcpy(out + 16 * block, turned, sizeof(uint32_t) * (left < 16 * kWidth ? left : 16 * kWidth));
  }
}

extern const NoiseKernels noise_kernels = {random_words,          box_muller_of,    run<AddNoise<float>>,
                                           run<AddNoise<double>>, run<Sgd<float>>,  run<Sgd<double>>,
                                           run<Adam<float>>,      run<Adam<double>>};

}  // namespace dp2vae::DP2VAE_ISA
