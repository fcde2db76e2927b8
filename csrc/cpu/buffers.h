// Blocks of memory. Large ones are mapped apart and in huge pages where the system has them: a fresh block
// would cost a page fault for every four kilobytes, every step, and one that is kept for the next step would
// raise the peak of memory, which comes when it is not in use.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace dp2vae {

// A block of floats, whatever was in it, on a cache line's boundary; freed at the end of its scope.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* data() const { return data_; }
  void zero();

 private:
  float* data_;
  int64_t floats_;
};

// A float32 CPU tensor in such a block, freed with its last use.
torch::stable::Tensor new_block(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

}  // namespace dp2vae
