// Argument checks, and what a backend needs to know of a tensor's device. Stable ABI only.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "plan.h"

#if defined(CUDA_KERNEL)
// Declared by torch's shim only where its CUDA headers are
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace wallvla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The message is built on failure only
#define WALLVLA_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::wallvla::fail(__VA_ARGS__);   \
    }                                 \
  } while (0)

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << ")";
  return text.str();
}

inline std::string strides_of(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.stride(i);
  }
  text << ")";
  return text.str();
}

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      fail(name, " is ", torch::headeronly::toString(tensor.scalar_type()),
           "; these kernels take float32, float16 and bfloat16.");
  }
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& first, const char* first_name) {
  WALLVLA_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device_index() == first.get_device_index(), name,
                " and ", first_name, " are on different devices.");
  WALLVLA_CHECK(tensor.scalar_type() == first.scalar_type(), name, " is ",
                torch::headeronly::toString(tensor.scalar_type()), " and ", first_name, " is ",
                torch::headeronly::toString(first.scalar_type()), "; they must have one dtype.");
}

inline void check_contiguous(const Tensor& tensor, const char* name) {
  WALLVLA_CHECK(tensor.is_contiguous(), name, " of shape ", shape_of(tensor), " has strides ", strides_of(tensor),
                "; it must be contiguous: pass ", name, ".contiguous().");
}

// The device of a tensor is current as long as this lives
class OnDevice {
 public:
#if defined(CUDA_KERNEL)
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    WALLVLA_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0,
                  "torch did not give the current CUDA stream.");
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif

  void* stream() const { return stream_; }

 private:
#if defined(CUDA_KERNEL)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace wallvla
