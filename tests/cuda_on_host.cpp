// The CUDA kernels' own code, thread by thread on the CPU: what the launchers do, without a GPU.
#include <vector>

#include "clip_factors.h"
#include "cuda/noise_kernels.h"

using namespace dp2vae;
using namespace dp2vae::cuda;

namespace {

int64_t launches;

template <class Update>
void run(const Source& source, const std::vector<Slot<Update>>& slots) {
  launches = 0;
  in_batches(source, slots.data(), static_cast<int64_t>(slots.size()), [&](const Batch<Update>& batch) {
    ++launches;
    for (uint32_t block = 0; block < batch.blocks; ++block) {
      alignas(16) float shared[kChunk * kPitch];
      const auto& slot = slot_of(batch, block);
      const Draw draw = draw_of(batch.source, slot.index);
      for (int t = 0; t < kThreads; ++t) fill(draw, slot, place_of(slot, block, t, shared));
      for (int t = 0; t < kThreads; ++t) sweep(slot, place_of(slot, block, t, shared));
    }
    return 0;
  });
}

// Key and step on the "host" or, with `device`, behind pointers.
Source source_of(const int32_t* key, const int64_t* step, uint32_t use, bool device) {
  Source source{};
  source.use = use;
  source.device_key_stride = 1;
  if (device) {
    source.device_key = key;
    source.device_step = step;
  } else {
    for (int i = 0; i < 8; ++i) source.key[i] = static_cast<uint32_t>(key[i]);
    source.step = *step;
  }
  return source;
}

template <class Update>
void updates(const int32_t* key, const int64_t* step, uint32_t use, bool device, const Update* all,
             const int64_t* sizes, const int64_t* indices, const bool* aligned, int64_t count) {
  std::vector<Slot<Update>> slots;
  for (int64_t i = 0; i < count; ++i)
    slots.push_back({all[i], sizes[i], static_cast<uint32_t>(indices[i]), 0, aligned[i]});
  run(source_of(key, step, use, device), slots);
}

}  // namespace

#define ENTRY(name, Update)                                                                           \
  extern "C" int64_t name(const int32_t* key, const int64_t* step, uint32_t use, bool device,         \
                          const void* all, const int64_t* sizes, const int64_t* indices,              \
                          const bool* aligned, int64_t count) {                                       \
    updates(key, step, use, device, static_cast<const Update*>(all), sizes, indices, aligned, count); \
    return launches;                                                                                  \
  }
ENTRY(add_noise_float, AddNoise<float>)
ENTRY(add_noise_double, AddNoise<double>)
ENTRY(sgd_float, Sgd<float>)
ENTRY(sgd_double, Sgd<double>)
ENTRY(adam_float, Adam<float>)
ENTRY(adam_double, Adam<double>)

extern "C" void words(const int32_t* key, const int64_t* step, uint32_t use, uint32_t index, int64_t n,
                      uint32_t* out) {
  const Draw draw = draw_of(source_of(key, step, use, true), index);
  for (int64_t block = 0; block < (n + 15) / 16 + 3; ++block) block_words(draw, n, block, out);
}

extern "C" void factors(const float* norm_sq, const float* error, int64_t layers, int64_t records,
                        double bound, double stability, bool normalizes, float* out) {
  const Norms norms{norm_sq, error, layers, records, {records, 1}, {records, 1}};
  for (int64_t n = 0; n < records; ++n)
    out[n] = scalar::clip_factor(norms, {bound, stability, normalizes}, n);
}
