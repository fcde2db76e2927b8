// Vocabulary shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define DP2VAE_INLINE __host__ __device__ __forceinline__
#define DP2VAE_ROLLED _Pragma("unroll 1")  // before a loop that is not worth its copies
#else
#define DP2VAE_INLINE inline __attribute__((always_inline))
#define DP2VAE_ROLLED
#endif

// Code that is compiled once per instruction set lives in a namespace of that name (see cpu/noise_kernels.h),
// so that the linker cannot merge a function compiled for one with its namesake compiled for another.
#ifndef DP2VAE_ISA
#define DP2VAE_ISA portable
#endif

namespace dp2vae::DP2VAE_ISA {

// Square roots, rounded correctly on every processor.
DP2VAE_INLINE float root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

DP2VAE_INLINE double root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace dp2vae::DP2VAE_ISA
