// The native module: operators, registered through PyTorch's stable interface, and what is not an operator,
// through pybind11. Schemas are declared in Python (dp2vae_fast/ops); here they are only implemented.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "chacha20.h"
#include "cpu/isa.h"
#include "cpu/noise.h"
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(dp2vae_fast, CPU, library) {
  library.impl("random_words", TORCH_BOX(&dp2vae::random_words));
  library.impl("add_noise_", TORCH_BOX(&dp2vae::add_noise_));
  library.impl("noise_sgd_", TORCH_BOX(&dp2vae::noise_sgd_));
  library.impl("noise_adam_", TORCH_BOX(&dp2vae::noise_adam_));
  library.impl("embedding_norm_sq", TORCH_BOX(&dp2vae::embedding_norm_sq));
  library.impl("clip_factors", TORCH_BOX(&dp2vae::clip_factors));
  library.impl("normalize_factors", TORCH_BOX(&dp2vae::normalize_factors));
  library.impl("linear_norm_sq", TORCH_BOX(&dp2vae::linear_norm_sq));
  library.impl("conv_norm_sq", TORCH_BOX(&dp2vae::conv_norm_sq));
  library.impl("grad_sample_norm_sq", TORCH_BOX(&dp2vae::grad_sample_norm_sq));
  library.impl("group_norm_grad_sample", TORCH_BOX(&dp2vae::group_norm_grad_sample));
  library.impl("layer_norm_grad_sample", TORCH_BOX(&dp2vae::layer_norm_grad_sample));
  library.impl("linear_kept", TORCH_BOX(&dp2vae::linear_kept));
  library.impl("linear_direct_norm_sq", TORCH_BOX(&dp2vae::linear_direct_norm_sq));
  library.impl("linear_weighted_sum", TORCH_BOX(&dp2vae::linear_weighted_sum));
  library.impl("outer_weighted_sum", TORCH_BOX(&dp2vae::outer_weighted_sum));
  library.impl("conv_kept", TORCH_BOX(&dp2vae::conv_kept));
  library.impl("conv_direct_norm_sq", TORCH_BOX(&dp2vae::conv_direct_norm_sq));
  library.impl("conv_weighted_sum", TORCH_BOX(&dp2vae::conv_weighted_sum));
  library.impl("kept_weighted_sum", TORCH_BOX(&dp2vae::kept_weighted_sum));
}

namespace {

namespace py = pybind11;
namespace scalar = dp2vae::DP2VAE_ISA;

template <size_t n>
std::array<uint32_t, n> words_of(const py::bytes& bytes, const char* name) {
  const std::string raw = bytes;
  if (raw.size() != 4 * n) {
    throw py::value_error(std::string(name) + " has " + std::to_string(raw.size()) + " bytes, expected " +
                          std::to_string(4 * n));
  }
  std::array<uint32_t, n> words;
  std::memcpy(words.data(), raw.data(), raw.size());
  return words;
}

py::bytes chacha20_block(const py::bytes& key, uint32_t counter, const py::bytes& nonce) {
  uint32_t block[16];
  scalar::chacha20_block<scalar::Scalar>(words_of<8>(key, "key").data(), counter,
                                         words_of<3>(nonce, "nonce").data(), block);
  return py::bytes(reinterpret_cast<const char*>(block), sizeof block);
}

py::tuple box_muller(uint32_t radius_word, uint32_t tail_word, uint32_t angle_word) {
  float pair[2];
  if (!dp2vae::noise_kernels_in_use().box_muller(radius_word, tail_word, angle_word, pair))
    throw std::runtime_error("the lanes of a vector disagree");
  return py::make_tuple(pair[0], pair[1]);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56 & 0xff) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["isa"] = dp2vae::isa();
  std::string isas;
  for (const std::string& name : dp2vae::isas()) isas += (isas.empty() ? "" : " ") + name;
  info["isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of dp2vae_fast; importing it registers them with torch.ops.dp2vae_fast.";
  module.def("build_info", &build_info, "What this module was built with, and the instruction set in use.");
  module.def("select_isa", &dp2vae::select_isa, py::arg("name"),
             "Use the kernels of an instruction set named in build_info()['isas']; False where it is not. "
             "For tests.");
  module.def("chacha20_block", &chacha20_block, py::arg("key"), py::arg("counter"), py::arg("nonce"),
             "One ChaCha20 block (RFC 8439, section 2.3): 32-byte key, 12-byte nonce -> 64 bytes.");
  module.def("box_muller", &box_muller, py::arg("radius_word"), py::arg("tail_word"), py::arg("angle_word"),
             "The two float32 normals of one word triple, from the instruction set in use.");
}
