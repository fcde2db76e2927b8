// The standard headers come first: the pragma must not reach their inline functions.
#include <cstdint>
#include <cstring>

#include "isa.h"

#if DP2VAE_HAS_X86_BUILDS
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define DP2VAE_ISA avx2
#define DP2VAE_LANES 8
#define DP2VAE_SHUFFLE_BYTES 1
#include "kernels.h"
#endif
