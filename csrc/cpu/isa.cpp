#include "isa.h"

namespace dp2vae {
namespace {

std::string& chosen() {
  static std::string name = isas().front();
  return name;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> usable;
#if DP2VAE_HAS_X86_BUILDS
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    usable.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) usable.push_back("avx2");
#endif
  usable.push_back("portable");
  return usable;
}

const std::string& isa() { return chosen(); }

bool select_isa(const std::string& name) {
  for (const std::string& usable : isas())
    if (usable == name) {
      chosen() = name;
      return true;
    }
  return false;
}

}  // namespace dp2vae
