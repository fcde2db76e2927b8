// Eight lanes side by side, as vectors of GCC and Clang: one AVX2 register, two of SSE or NEON.
#pragma once

#include "../chacha20.h"

namespace dp2vae::DP2VAE_ISA {

struct Lanes8 {
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef float F __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));

  static DP2VAE_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }
  static DP2VAE_INLINE I bits(F x) { return (I)x; }
  static DP2VAE_INLINE F from_bits(I x) { return (F)x; }
  static DP2VAE_INLINE F sqrt(F x) {
    F out;
    for (int i = 0; i < 8; ++i) out[i] = __builtin_sqrtf(x[i]);
    return out;
  }
  template <int k>
  static DP2VAE_INLINE U rotate_left(U x) {
#if defined(__AVX2__)
    if constexpr (k == 16)  // whole bytes: one shuffle
      return (U)__builtin_shufflevector((Bytes)x, (Bytes)x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12,
                                        13, 18, 19, 16, 17, 22, 23, 20, 21, 26, 27, 24, 25, 30, 31, 28, 29);
    if constexpr (k == 8)
      return (U)__builtin_shufflevector((Bytes)x, (Bytes)x, 3, 0, 1, 2, 7, 4, 5, 6, 11, 8, 9, 10, 15, 12, 13,
                                        14, 19, 16, 17, 18, 23, 20, 21, 22, 27, 24, 25, 26, 31, 28, 29, 30);
#endif
    return x << k | x >> (32 - k);
  }
};

}  // namespace dp2vae::DP2VAE_ISA
