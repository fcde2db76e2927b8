// Which instruction sets this build holds, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

// Clang ignores GCC's target pragma: there the portable kernels do, at the width that the compiler's flags
// allow.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DP2VAE_HAS_X86_BUILDS 1
#else
#define DP2VAE_HAS_X86_BUILDS 0
#endif

namespace dp2vae {

// The instruction sets that this build and this machine have, of "avx512", "avx2" and "portable": best first.
std::vector<std::string> isas();

// The one in use: the best, unless another was selected.
const std::string& isa();

// Use the named instruction set from now on; false where it is not one of isas(). For tests.
bool select_isa(const std::string& name);

// Of a table that every instruction set has one of, that of the one in use.
template <class Table>
const Table& in_use(const Table& portable, const Table& avx2, const Table& avx512) {
  return isa() == "avx512" ? avx512 : isa() == "avx2" ? avx2 : portable;
}

}  // namespace dp2vae

// The table of this name that is in use, of those in the namespaces of all instruction sets of this build.
#if DP2VAE_HAS_X86_BUILDS
#define DP2VAE_IN_USE(table) in_use(portable::table, avx2::table, avx512::table)
#else
#define DP2VAE_IN_USE(table) (portable::table)
#endif
