// Kernels and launchers of random_words, add_noise_, noise_sgd_ and noise_adam_. A thread's share of the work
// is in noise_kernels.h.
#include <cassert>

#include "kernels.h"

namespace dp2vae::cuda {
namespace {

// Read once for a block of threads. As in the reference, a step that the nonce's 32 bits cannot hold ends the
// program: it would repeat the noise of another.
__device__ const Draw& shared_draw(const Source& source, uint32_t index) {
  __shared__ Draw draw;
  if (threadIdx.x == 0) {
    const int64_t step = step_of(source);
    assert(0 <= step && step < kStepLimit && "step is outside 0 to 2^32 - 1: further steps would repeat");
    draw = draw_of(source, index);
  }
  __syncthreads();
  return draw;
}

template <template <class> class Update, class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 7 : 5)
    update(const __grid_constant__ Batch<Update<T>> batch) {
  __shared__ alignas(16) float shared[kChunk * kPitch];
  const auto& slot = slot_of(batch, blockIdx.x);
  const Place at = place_of(slot, blockIdx.x, threadIdx.x, shared);
  fill(shared_draw(batch.source, slot.index), slot, at);
  __syncwarp();  // four superblocks to a warp: nobody reads another warp's
  sweep(slot, at);
}

__global__ void __launch_bounds__(kThreads)
    random_words(const __grid_constant__ Source source, uint32_t index, int64_t n, uint32_t* out) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  block_words(shared_draw(source, index), n, block, out);
}

}  // namespace

template <template <class> class Update, class T>
int launch_updates(int device, void* stream, const Source& source, const Slot<Update<T>>* slots,
                   int64_t count) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  return in_batches(source, slots, count, [&](const Batch<Update<T>>& batch) -> int {
    update<Update, T><<<batch.blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
    return cudaGetLastError();
  });
}

template int launch_updates(int, void*, const Source&, const Slot<AddNoise<float>>*, int64_t);
template int launch_updates(int, void*, const Source&, const Slot<AddNoise<double>>*, int64_t);
template int launch_updates(int, void*, const Source&, const Slot<Sgd<float>>*, int64_t);
template int launch_updates(int, void*, const Source&, const Slot<Sgd<double>>*, int64_t);
template int launch_updates(int, void*, const Source&, const Slot<Adam<float>>*, int64_t);
template int launch_updates(int, void*, const Source&, const Slot<Adam<double>>*, int64_t);

int launch_random_words(int device, void* stream, const Source& source, uint32_t index, int64_t n,
                        uint32_t* out) {
  if (n == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto blocks = static_cast<unsigned>((n + 16 * kThreads - 1) / (16 * kThreads));
  random_words<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(source, index, n, out);
  return cudaGetLastError();
}

}  // namespace dp2vae::cuda
