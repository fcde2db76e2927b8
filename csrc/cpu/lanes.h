// DP2VAE_LANES values side by side, as vectors of GCC and Clang: 4 fill a register of SSE or NEON, 8 one of
// AVX2, 16 one of AVX-512.
#pragma once

#include "../chacha20.h"

// Set for instruction sets whose 16-bit and 8-bit rotations are cheapest as a shuffle of bytes.
#ifndef DP2VAE_SHUFFLE_BYTES
#define DP2VAE_SHUFFLE_BYTES 0
#endif

namespace dp2vae::DP2VAE_ISA {

constexpr int kWidth = DP2VAE_LANES;

struct Lanes {
  typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
  typedef int32_t I __attribute__((vector_size(4 * kWidth)));
  typedef float F __attribute__((vector_size(4 * kWidth)));

  static DP2VAE_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
  static DP2VAE_INLINE I bits(F x) { return (I)x; }
  static DP2VAE_INLINE F from_bits(I x) { return (F)x; }
  static DP2VAE_INLINE F sqrt(F x) {
    F out;
    for (int i = 0; i < kWidth; ++i) out[i] = __builtin_sqrtf(x[i]);
    return out;
  }
  template <int k>
  static DP2VAE_INLINE U rotate_left(U x) {
#if DP2VAE_SHUFFLE_BYTES
    typedef uint8_t Bytes __attribute__((vector_size(4 * kWidth)));
    static_assert(kWidth == 8, "the shuffles are written for eight lanes");
    constexpr Bytes by_16 = {2,  3,  0,  1,  6,  7,  4,  5,  10, 11, 8,  9,  14, 15, 12, 13,
                             18, 19, 16, 17, 22, 23, 20, 21, 26, 27, 24, 25, 30, 31, 28, 29};
    constexpr Bytes by_8 = {3,  0,  1,  2,  7,  4,  5,  6,  11, 8,  9,  10, 15, 12, 13, 14,
                            19, 16, 17, 18, 23, 20, 21, 22, 27, 24, 25, 26, 31, 28, 29, 30};
    if constexpr (k == 16) return (U)__builtin_shuffle((Bytes)x, by_16);
    if constexpr (k == 8) return (U)__builtin_shuffle((Bytes)x, by_8);
#endif
    return x << k | x >> (32 - k);
  }
  // first, first + 1, first + 2, ...
  static DP2VAE_INLINE U count_from(uint32_t first) {
    U out;
    for (int i = 0; i < kWidth; ++i) out[i] = first + i;
    return out;
  }
};

}  // namespace dp2vae::DP2VAE_ISA
