// The launchers, for the host: each returns a cudaError_t, 0 where the launch went well.
#pragma once

#include "../clip_factors.h"
#include "noise_kernels.h"

namespace dp2vae::cuda {

const char* error_string(int error);

// Whether work on this stream is being captured into a graph rather than run.
int is_capturing(int device, void* stream, bool* capturing);

// Updates all tensors: one launch where its parameters hold them.
template <template <class> class Update, class T>
int launch_updates(int device, void* stream, const Source& source, const Slot<Update<T>>* slots,
                   int64_t count);

int launch_random_words(int device, void* stream, const Source& source, uint32_t index, int64_t n,
                        uint32_t* out);

int launch_clip_factors(int device, void* stream, const Norms& norms, const Clipping& clipping, float* out);

}  // namespace dp2vae::cuda
