// The standard headers come first: the pragma must not reach their inline functions.
#include <cstdint>
#include <cstring>

#include "isa.h"

#if DP2VAE_HAS_X86_BUILDS
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define DP2VAE_ISA avx512
#define DP2VAE_LANES 16
#include "kernels.h"
#endif
