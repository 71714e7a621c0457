#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("rope(Tensor states, Tensor cos, Tensor sin, bool transposed) -> Tensor");
  ops.def("qkv_rope_store(Tensor qkv, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, int start) -> Tensor");
  ops.def("vision_rope_(Tensor(a!) qkv, Tensor cos, Tensor sin) -> ()");
  ops.def("rms_norm(Tensor states, Tensor weight, float eps, bool float32_weight) -> Tensor");
  ops.def(
      "add_rms_norm(Tensor states, Tensor residual, Tensor weight, float eps, bool float32_weight) -> (Tensor, Tensor)");
  ops.def(
      "rms_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor weight, float eps) -> "
      "(Tensor, Tensor)");
  ops.def("swiglu(Tensor gate_up) -> Tensor");
  ops.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
#else
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
#endif
  ops.impl("rope", TORCH_BOX(&wallvla::rope));
  ops.impl("qkv_rope_store", TORCH_BOX(&wallvla::qkv_rope_store));
  ops.impl("vision_rope_", TORCH_BOX(&wallvla::vision_rope_));
  ops.impl("rms_norm", TORCH_BOX(&wallvla::rms_norm));
  ops.impl("add_rms_norm", TORCH_BOX(&wallvla::add_rms_norm));
  ops.impl("rms_norm_backward", TORCH_BOX(&wallvla::rms_norm_backward));
  ops.impl("swiglu", TORCH_BOX(&wallvla::swiglu));
  ops.impl("swiglu_backward", TORCH_BOX(&wallvla::swiglu_backward));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
