// What the instruction-set-independent half of the CPU noise ops (noise.cpp) and the kernels
// (noise_kernels.h) share.
#pragma once

#include <cstdint>

#include "../updates.h"

namespace dp2vae {

// Updates superblocks [first, end) of a tensor of n elements.
template <class Update>
using Kernel = void (*)(const Draw& draw, int64_t n, int64_t first, int64_t end, const Update& update);

// The kernels of one instruction set.
struct NoiseKernels {
  // Words of ChaCha20 blocks [first, end), in keystream order, cut off at n words.
  void (*random_words)(const Draw& draw, int64_t n, int64_t first, int64_t end, uint32_t* out);
  // The two normals of one word triple; false where the lanes of a vector disagree.
  bool (*box_muller)(uint32_t radius_word, uint32_t tail_word, uint32_t angle_word, float* pair);
  Kernel<AddNoise<float>> add_noise_float;
  Kernel<AddNoise<double>> add_noise_double;
  Kernel<Sgd<float>> sgd_float;
  Kernel<Sgd<double>> sgd_double;
  Kernel<Adam<float>> adam_float;
  Kernel<Adam<double>> adam_double;
};

namespace portable {
extern const NoiseKernels noise_kernels;
}
namespace avx2 {
extern const NoiseKernels noise_kernels;
}
namespace avx512 {
extern const NoiseKernels noise_kernels;
}

// Those in use.
const NoiseKernels& noise_kernels_in_use();

}  // namespace dp2vae
