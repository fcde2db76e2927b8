// Which instruction sets this build holds, and which of them this machine runs.
#pragma once

// Clang ignores GCC's target pragma: there the portable kernels do, at the width that the compiler's flags
// allow.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DP2VAE_HAS_AVX2_BUILD 1
#else
#define DP2VAE_HAS_AVX2_BUILD 0
#endif

namespace dp2vae {

// The instruction set in use, "avx2" or "portable".
const char* isa();

// Use the named instruction set from now on; false where this machine or this build lacks it. For tests.
bool select_isa(const char* name);

}  // namespace dp2vae
