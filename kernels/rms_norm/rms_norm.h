// x / sqrt(mean(x^2) + eps) * weight over rows, with or without adding a residual first, and its gradient.
#pragma once

#include "../common/plan.h"

namespace wallvla {

// All tensors are contiguous, (rows, width).
struct RmsNormPlan {
  DType dtype;
  int64_t rows, width;
  const void* states;
  const void* residual;  // null: none
  const void* weight;    // (width,), of `dtype`, or float32 if weight_is_float32
  bool weight_is_float32;
  bool float32_weight;  // multiply by the weight before rounding to `dtype` (Wall-OSS) or after (Qwen)
  float eps;
  void* normed;
  void* total;  // states + residual; null without a residual
};

struct RmsNormBackwardPlan {
  DType dtype;
  int64_t rows, width;
  const void* grad_normed;
  const void* grad_total;  // null: none
  const void* total;       // what was normed
  const void* weight;
  bool weight_is_float32;
  float eps;
  void* grad;                 // with respect to what was normed
  int64_t weight_grad_parts;  // the gradient of the weight is the sum of so many parts
  float* weight_grad;         // (weight_grad_parts, width); part p sums the rows p, p + weight_grad_parts, ...
};

// n = t r with r = 1 / sqrt(mean(t^2) + eps) has the gradient r (g - n mean(g n)); `dot` is mean(g t), g that of n.
WALLVLA_FORMULA float rms_norm_gradient(float grad, float total, float scale, float dot) {
  return scale * (grad - total * (scale * scale * dot));
}

void run_rms_norm(const RmsNormPlan& plan, void* stream);
void run_rms_norm_backward(const RmsNormBackwardPlan& plan, void* stream);

}  // namespace wallvla
