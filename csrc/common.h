// Vocabulary shared by host and device code.
#pragma once

#if defined(__CUDACC__)
#define DP2VAE_INLINE __host__ __device__ __forceinline__
#else
#define DP2VAE_INLINE inline __attribute__((always_inline))
#endif

// Code that is compiled once per instruction set lives in a namespace of that name (see cpu/noise_kernels.h),
// so that the linker cannot merge a function compiled for one with its namesake compiled for another.
#ifndef DP2VAE_ISA
#define DP2VAE_ISA portable
#endif
