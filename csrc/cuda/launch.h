// What every op on CUDA tensors does around its launch, through PyTorch's stable interface.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "kernels.h"

namespace dp2vae::cuda {

using torch::stable::Tensor;

inline void check(int error, const char* op) {
  STD_TORCH_CHECK(error == 0, op, ": CUDA error ", error, ", ", error_string(error));
}

// PyTorch's current stream on a device. Looked up in the library that is loaded: a module that named the
// function would not load beside a CPU build of torch.
inline void* current_stream(int32_t device, const char* op) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr, op, ": this build of PyTorch has no CUDA");
  STD_TORCH_CHECK(function(device, &stream) == 0, op, ": no current stream on CUDA device ", device);
  return stream;
}

// Makes the device of a tensor current for as long as it lives, and holds the stream to launch on.
struct Launch {
  const char* op;
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;

  Launch(const char* name, const Tensor& tensor)
      : op(name), device(device_of(name, tensor)), guard(device), stream(current_stream(device, name)) {}

  bool has(const Tensor& tensor) const { return tensor.is_cuda() && tensor.get_device_index() == device; }

 private:
  static int32_t device_of(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), name, ": expected a CUDA tensor");
    return tensor.get_device_index();
  }
};

}  // namespace dp2vae::cuda
