// What the bindings of CUDA operators share: the device they run on, and checks of what lies there.
// With FASTPRUNE_SIM the device is the simulator, and tensors lie on the CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "bindings/tensor_list.h"
#include "cuda/launch.h"

namespace fastprune {

#if defined(FASTPRUNE_SIM)
struct Device {
  explicit Device(const Tensor&) {}
  Stream stream = nullptr;
  int max_blocks = 3;            // so that a block has several chunks
  size_t max_shared = 40 << 10;  // so that tests have groups that do not fit
};
#else
// Makes the tensor's device the current one as long as it lives.
struct Device {
  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    const int32_t index = tensor.get_device_index();
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<Stream>(current);
    int multiprocessors = 0;
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index),
               "asking for the number of multiprocessors", __FILE__, __LINE__);
    // As many as are resident at once: a block more would begin when the others have finished.
    constexpr int kBlocksPerMultiprocessor = 4;
    max_blocks = kBlocksPerMultiprocessor * multiprocessors;
    int shared = 0;
    check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
               "asking for the size of shared memory", __FILE__, __LINE__);
    max_shared = static_cast<size_t>(shared);
  }
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream;
  int max_blocks;
  size_t max_shared;  // bytes that a block may ask for
};
#endif

inline void check_same_device(const Tensor& tensor, const Tensor& expected, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() == expected.is_cuda() &&
                      tensor.get_device_index() == expected.get_device_index(),
                  name, " must be on the device of the other tensors");
}

inline void check_same_device(const Tensors& tensors, const Tensor& expected, const char* name) {
  for (const Tensor& tensor : tensors) check_same_device(tensor, expected, name);
}

// The caching allocator gives it to others only in the order of the stream.
inline Tensor empty_scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

inline const float* device_float(const std::optional<Tensor>& tensor, const Tensor& like,
                                 const char* name) {
  if (!tensor) return nullptr;
  check_same_device(*tensor, like, name);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->numel() == 1, name,
                  " must be one float32 number");
  return tensor->const_data_ptr<float>();
}

}  // namespace fastprune
