#include "buffers.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dp2vae {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;  // bytes, and of the smallest block that is mapped

// Stands in front of a block's floats.
struct alignas(64) Header {
  void* mapping;  // null: of the C library
  size_t bytes;   // of the mapping
};

#if defined(__linux__)
// The start of a block of that many bytes on a huge page's boundary; null where memory cannot be mapped.
Header* map(size_t bytes) {
  const size_t all = bytes + kHugePage;
  void* const mapping = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  const size_t begin = reinterpret_cast<size_t>(mapping);
  auto* const start = reinterpret_cast<Header*>((begin + kHugePage - 1) / kHugePage * kHugePage);
  madvise(start, bytes, MADV_HUGEPAGE);  // where refused, ordinary pages do
  *start = {mapping, all};
  return start;
}

void unmap(const Header& header) { munmap(header.mapping, header.bytes); }
#else
Header* map(size_t) { return nullptr; }
void unmap(const Header&) {}
#endif

float* allocate(int64_t floats) {
  const size_t bytes = sizeof(Header) + sizeof(float) * floats;
  Header* start = bytes >= kHugePage ? map(bytes) : nullptr;
  if (!start) {
    void* data = nullptr;
    if (posix_memalign(&data, alignof(Header), bytes) != 0) throw std::bad_alloc();
    start = static_cast<Header*>(data);
    *start = {nullptr, 0};
  }
  return reinterpret_cast<float*>(start + 1);
}

void release(void* data) {
  Header* const start = static_cast<Header*>(data) - 1;
  start->mapping ? unmap(*start) : std::free(start);
}

}  // namespace

Buffer::Buffer(int64_t floats) : data_(allocate(floats)), floats_(floats) {}

Buffer::~Buffer() { release(data_); }

void Buffer::zero() { std::memset(data_, 0, sizeof(float) * floats_); }

torch::stable::Tensor new_block(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  int64_t floats = 1;
  for (const int64_t size : sizes) floats *= size;
  return torch::stable::from_blob(allocate(floats), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  torch::headeronly::ScalarType::Float, release);
}

}  // namespace dp2vae
