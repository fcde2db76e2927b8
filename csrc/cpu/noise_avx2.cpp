// The standard headers come first: the pragma must not reach their inline functions.
#include <cstdint>
#include <cstring>

#include "isa.h"

#if DP2VAE_HAS_AVX2_BUILD
#pragma GCC target("avx2")
#define DP2VAE_ISA avx2
#include "noise_kernels.h"
#endif
