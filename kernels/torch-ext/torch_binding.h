// The operations; wallvla_kernels/functions.py says what they do.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace wallvla {

using torch::stable::Tensor;

Tensor rope(const Tensor& states, const Tensor& cos, const Tensor& sin, bool transposed);
Tensor qkv_rope_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values,
                      int64_t start);
void vision_rope_(Tensor qkv, const Tensor& cos, const Tensor& sin);
Tensor rms_norm(const Tensor& states, const Tensor& weight, double eps, bool float32_weight);
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& states, const Tensor& residual, const Tensor& weight,
                                        double eps, bool float32_weight);
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_total,
                                             const Tensor& total, const Tensor& weight, double eps);
Tensor swiglu(const Tensor& gate_up);
Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up);

}  // namespace wallvla
