#include "buffers.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

namespace dp2vae {
namespace {

constexpr int64_t kSmall = int64_t{1} << 15;  // floats; smaller blocks are the system's business
// Scratch memory above this is too: it would raise the peak of a step, which comes when no scratch is in use.
constexpr int64_t kLargeScratch = int64_t{1} << 20;
constexpr int64_t kPatience = 1024;  // a block that so many others were taken before is given back

struct Block {
  float* data;
  int64_t floats, when;
};

struct Pool {
  std::mutex lock;
  std::list<Block> unused;  // the latest first
  std::unordered_map<float*, int64_t> used;
  int64_t clock = 0;
};

// Never destroyed: tensors may outlive whatever would destroy it.
Pool& pool() {
  static Pool* const the_pool = new Pool;
  return *the_pool;
}

float* allocate(int64_t floats) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, sizeof(float) * (floats > 0 ? floats : 1)) != 0) throw std::bad_alloc();
  return static_cast<float*>(data);
}

float* take(int64_t floats, int64_t most) {
  if (floats < kSmall || floats > most) return allocate(floats);
  Pool& p = pool();
  {
    const std::lock_guard<std::mutex> guard(p.lock);
    ++p.clock;
    for (auto block = p.unused.begin(); block != p.unused.end(); ++block)
      if (floats <= block->floats && block->floats <= floats + floats / 8) {
        float* const data = block->data;
        p.used[data] = block->floats;
        p.unused.erase(block);
        return data;
      }
  }
  float* const data = allocate(floats);
  const std::lock_guard<std::mutex> guard(p.lock);
  p.used[data] = floats;
  return data;
}

void give_back(void* data) {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.lock);
  const auto found = p.used.find(static_cast<float*>(data));
  if (found == p.used.end()) {  // not of the pool
    std::free(data);
    return;
  }
  p.unused.push_front({found->first, found->second, p.clock});
  p.used.erase(found);
  while (!p.unused.empty() && p.unused.back().when + kPatience < p.clock) {
    std::free(p.unused.back().data);
    p.unused.pop_back();
  }
}

}  // namespace

Buffer::Buffer(int64_t floats) : data_(take(floats, kLargeScratch)), floats_(floats) {}

Buffer::~Buffer() { give_back(data_); }

void Buffer::zero() { std::memset(data_, 0, sizeof(float) * floats_); }

torch::stable::Tensor pooled(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t floats = 1;
  for (const int64_t size : sizes) floats *= size;
  return torch::stable::from_blob(take(floats, floats), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float, give_back);
}

int64_t unused_bytes() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.lock);
  int64_t floats = 0;
  for (const Block& block : p.unused) floats += block.floats;
  return 4 * floats;
}

void release_unused() {
  Pool& p = pool();
  const std::lock_guard<std::mutex> guard(p.lock);
  for (const Block& block : p.unused) std::free(block.data);
  p.unused.clear();
}

}  // namespace dp2vae
