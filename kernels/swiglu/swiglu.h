// silu(gate) * up, where a row holds its gates and then its ups, and its gradient.
#pragma once

#include <cmath>

#include "../common/plan.h"

namespace wallvla {

// Rows of `gate_up` and `grad_gate_up` have 2 width elements, those of `result` and `grad` width.
struct SwigluPlan {
  DType dtype;
  int64_t rows, width;
  const void* gate_up;
  void* result;
};

struct SwigluBackwardPlan {
  DType dtype;
  int64_t rows, width;
  const void* grad;
  const void* gate_up;
  void* grad_gate_up;
};

WALLVLA_FORMULA float swiglu_value(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

WALLVLA_FORMULA void swiglu_gradient(float grad, float gate, float up, float& grad_gate, float& grad_up) {
  const float sigmoid = 1.0f / (1.0f + expf(-gate));
  grad_gate = grad * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
  grad_up = grad * gate * sigmoid;
}

void run_swiglu(const SwigluPlan& plan, void* stream);
void run_swiglu_backward(const SwigluBackwardPlan& plan, void* stream);

}  // namespace wallvla
