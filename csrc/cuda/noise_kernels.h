// The noise kernels, one thread's share at a time. Nothing here needs a GPU: tests run it thread by thread on
// a CPU.
//
// Eight threads take a superblock, each of them one of its ChaCha20 blocks. Normals are born by rows of eight
// (see dp2vae_fast/ops/noise.py), but memory wants to be read four elements at a time: so a warp hands its
// normals round in shared memory (`fill`) before it updates elements (`sweep`).
#pragma once

#include <cstdint>

#include "../updates.h"

namespace dp2vae::cuda {

namespace scalar = dp2vae::DP2VAE_ISA;

constexpr int kThreads = 128;            // of a block of threads
constexpr int kChunk = kThreads / 8;     // superblocks that it takes
constexpr int kPitch = kSuperblock + 8;  // between superblocks in shared memory, so that no two share a bank
constexpr int kParameterBytes = 32764;   // that a kernel may be passed (CUDA 12.1 and later)
constexpr int64_t kStepLimit = int64_t{1} << 32;

// Key and step of a draw, each on the host or, where its pointer is not null, on the device.
struct Source {
  uint32_t key[8];
  int64_t step;
  const int32_t* device_key;
  int64_t device_key_stride;
  const int64_t* device_step;
  uint32_t use;  // the nonce's first word: mechanism and domain
};

// One tensor's share of a launch: blocks of threads from `first` on.
template <class Update>
struct Slot {
  Update update;
  int64_t n;
  uint32_t index;
  uint32_t first;
  bool aligned;  // every list's tensor, to four elements or 16 bytes
};

// What one launch is passed: as many tensors as fit.
template <class Update>
struct Batch {
  static constexpr int kCapacity = (kParameterBytes - sizeof(Source) - 16) / sizeof(Slot<Update>);
  Source source;
  int count;
  uint32_t blocks;
  Slot<Update> slots[kCapacity];
};
static_assert(sizeof(Batch<Adam<double>>) <= kParameterBytes &&
              sizeof(Batch<AddNoise<float>>) <= kParameterBytes);

// Deals `count` slots to as few launches as hold them: run(batch) for each, until one returns other than 0.
template <class Update, class Run>
int in_batches(const Source& source, const Slot<Update>* slots, int64_t count, Run run) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  Batch<Update> batch;
  batch.source = source;
  for (int64_t i = 0; i < count;) {
    int64_t blocks = 0;
    for (batch.count = 0; i < count && batch.count < Batch<Update>::kCapacity; ++i) {
      const int64_t more = (slots[i].n + kChunk * kSuperblock - 1) / (kChunk * kSuperblock);
      if (blocks + more > kMostBlocks) break;
      if (more == 0) continue;
      Slot<Update>& slot = batch.slots[batch.count++] = slots[i];
      slot.first = static_cast<uint32_t>(blocks);
      blocks += more;
    }
    batch.blocks = static_cast<uint32_t>(blocks);
    if (blocks == 0) continue;
    if (const int error = run(batch)) return error;
  }
  return 0;
}

// The tensor that a block of threads works on.
template <class Update>
DP2VAE_INLINE const Slot<Update>& slot_of(const Batch<Update>& batch, uint32_t block) {
  int low = 0;
  for (int high = batch.count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (batch.slots[middle].first <= block ? low : high) = middle;
  }
  return batch.slots[low];
}

DP2VAE_INLINE int64_t step_of(const Source& source) {
  return source.device_step ? *source.device_step : source.step;
}

DP2VAE_INLINE Draw draw_of(const Source& source, uint32_t index) {
  Draw draw;
  for (int i = 0; i < 8; ++i)
    draw.key[i] = source.device_key ? static_cast<uint32_t>(source.device_key[i * source.device_key_stride])
                                    : source.key[i];
  draw.nonce[0] = source.use;
  draw.nonce[1] = static_cast<uint32_t>(step_of(source));
  draw.nonce[2] = index;
  return draw;
}

// Normals of one ChaCha20 block, that of word w to z[8 * w].
DP2VAE_INLINE void block_normals(const Draw& draw, uint32_t block, float* z) {
  uint32_t x[16];
  scalar::chacha20_block<scalar::Scalar>(draw.key, block, draw.nonce, x);
  bool needs_tail = false;
  for (int w = 0; w < 16; w += 2) {
    float cosine, sine;
    scalar::direction<scalar::Scalar>(x[w + 1], cosine, sine);
    const float r = scalar::radius<scalar::Scalar>(x[w]);
    z[8 * w] = cosine * r;
    z[8 * w + 8] = sine * r;
    needs_tail |= x[w] < 0x10000u;
  }
  if (!needs_tail) return;
  const uint32_t nonce[3] = {draw.nonce[0] + kTail, draw.nonce[1], draw.nonce[2]};
  uint32_t tail[16];
  scalar::chacha20_block<scalar::Scalar>(draw.key, block, nonce, tail);
  for (int w = 0; w < 16; w += 2)
    if (x[w] < 0x10000u) scalar::box_muller_tail(x[w], tail[w], x[w + 1], z[8 * w], z[8 * w + 8]);
}

// Where a thread works: its superblock's first element, that superblock in shared memory, and which of the
// eight threads it is.
struct Place {
  int64_t begin;
  float* z;
  int lane;
};

template <class Update>
DP2VAE_INLINE Place place_of(const Slot<Update>& slot, uint32_t block, int thread, float* shared) {
  const int64_t superblock = static_cast<int64_t>(block - slot.first) * kChunk + thread / 8;
  return {superblock * kSuperblock, shared + thread / 8 * kPitch, thread % 8};
}

template <class Update>
DP2VAE_INLINE void fill(const Draw& draw, const Slot<Update>& slot, const Place& at) {
  if (at.begin >= slot.n) return;
  const auto block = static_cast<uint32_t>(at.begin / kSuperblock * 8 + at.lane);
  block_normals(draw, block, at.z + at.lane);
}

// `width` elements that lie side by side, read and written at once.
template <class T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T at[width];
};

template <int width, class T>
DP2VAE_INLINE Pack<T, width> load(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

template <int width, class T>
DP2VAE_INLINE void store(T* to, const Pack<T, width>& pack) {
#if defined(__CUDA_ARCH__)
  // An assignment would be taken apart, and not always be put together again.
  if constexpr (sizeof pack % 16 == 0) {
    for (int i = 0; i < static_cast<int>(sizeof pack / 16); ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(&pack)[i];
      asm("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + 16 / sizeof(T) * i), "r"(x.x), "r"(x.y),
          "r"(x.z), "r"(x.w)
          : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, width>*>(to) = pack;
}

template <int width, class T>
DP2VAE_INLINE void apply(const AddNoise<T>& u, int64_t e, const Pack<float, width>& z) {
  auto x = load<width>(u.data + e);
  for (int i = 0; i < width; ++i) x.at[i] = scalar::updated(u, x.at[i], static_cast<T>(z.at[i]));
  store(u.data + e, x);
}

template <int width, class T>
DP2VAE_INLINE void apply(const Sgd<T>& u, int64_t e, const Pack<float, width>& z) {
  auto p = load<width>(u.param + e);
  const auto sum = load<width>(u.sum + e);
  if (u.momentum_buffer) {
    auto buffer = load<width>(u.momentum_buffer + e);
    for (int i = 0; i < width; ++i)
      p.at[i] = scalar::updated<true>(u, p.at[i], sum.at[i], static_cast<T>(z.at[i]), buffer.at[i]);
    store(u.momentum_buffer + e, buffer);
  } else {
    T none = 0;
    for (int i = 0; i < width; ++i)
      p.at[i] = scalar::updated<false>(u, p.at[i], sum.at[i], static_cast<T>(z.at[i]), none);
  }
  store(u.param + e, p);
}

template <int width, class T>
DP2VAE_INLINE void apply(const Adam<T>& u, int64_t e, const Pack<float, width>& z) {
  auto p = load<width>(u.param + e), m = load<width>(u.exp_avg + e), v = load<width>(u.exp_avg_sq + e);
  const auto sum = load<width>(u.sum + e);
  if (u.max_exp_avg_sq) {
    auto most = load<width>(u.max_exp_avg_sq + e);
    for (int i = 0; i < width; ++i)
      p.at[i] =
          scalar::updated<true>(u, p.at[i], sum.at[i], static_cast<T>(z.at[i]), m.at[i], v.at[i], most.at[i]);
    store(u.max_exp_avg_sq + e, most);
  } else {
    T none = 0;
    for (int i = 0; i < width; ++i)
      p.at[i] =
          scalar::updated<false>(u, p.at[i], sum.at[i], static_cast<T>(z.at[i]), m.at[i], v.at[i], none);
  }
  store(u.exp_avg + e, m);
  store(u.exp_avg_sq + e, v);
  store(u.param + e, p);
}

template <class Update>
DP2VAE_INLINE void sweep(const Slot<Update>& slot, const Place& at) {
  for (int row = 4 * at.lane; row < kSuperblock; row += 32) {
    const int64_t e = at.begin + row;
    if (slot.aligned && e + 4 <= slot.n) {
      apply<4>(slot.update, e, load<4>(at.z + row));
    } else {
      DP2VAE_ROLLED
      for (int i = 0; i < 4 && e + i < slot.n; ++i) apply<1>(slot.update, e + i, load<1>(at.z + row + i));
    }
  }
}

// Words of one ChaCha20 block of a keystream that is cut off at n words.
DP2VAE_INLINE void block_words(const Draw& draw, int64_t n, int64_t block, uint32_t* out) {
  if (16 * block >= n) return;
  Pack<uint32_t, 4> x[4];
  scalar::chacha20_block<scalar::Scalar>(draw.key, static_cast<uint32_t>(block), draw.nonce, x[0].at);
  if (16 * block + 16 <= n) {
    for (int i = 0; i < 4; ++i) store(out + 16 * block + 4 * i, x[i]);
  } else {
    for (int w = 0; w < 16; ++w)
      if (16 * block + w < n) out[16 * block + w] = x[w / 4].at[w % 4];
  }
}

}  // namespace dp2vae::cuda
