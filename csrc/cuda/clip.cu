// clip_factors and normalize_factors: a thread for every record, which reads its layers one after the other.
#include "kernels.h"

namespace dp2vae::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    clip_factors(const __grid_constant__ Norms norms, Clipping clipping, float* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n < norms.records) out[n] = scalar::clip_factor(norms, clipping, n);
}

}  // namespace

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int is_capturing(int device, void* stream, bool* capturing) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *capturing = status != cudaStreamCaptureStatusNone;
  return error;
}

int launch_clip_factors(int device, void* stream, const Norms& norms, const Clipping& clipping, float* out) {
  if (norms.records == 0) return cudaSuccess;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto blocks = static_cast<unsigned>((norms.records + kThreads - 1) / kThreads);
  clip_factors<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(norms, clipping, out);
  return cudaGetLastError();
}

}  // namespace dp2vae::cuda
