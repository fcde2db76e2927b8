// Large blocks of memory that are used again: a fresh one costs a page fault for every four kilobytes, every
// step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace dp2vae {

// A block of floats, whatever was in it; goes back to the pool at the end of its scope.
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

// A float32 CPU tensor whose memory, where it is large, is a block of the pool and goes back there with its
// last use.
torch::stable::Tensor pooled(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides);

// Bytes of the pool that nobody uses at the moment; `release_unused` gives them back to the system.
int64_t unused_bytes();
void release_unused();

}  // namespace dp2vae
