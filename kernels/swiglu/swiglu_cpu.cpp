#include "../common/cpu.h"
#include "swiglu.h"

namespace wallvla {

void run_swiglu(const SwigluPlan& plan, void*) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(plan.rows, plan.width, [&](int64_t row) {
      const T* gate = static_cast<const T*>(plan.gate_up) + row * 2 * plan.width;
      T* result = static_cast<T*>(plan.result) + row * plan.width;
      for (int64_t i = 0; i < plan.width; ++i) {
        result[i] =
            static_cast<T>(swiglu_value(static_cast<float>(gate[i]), static_cast<float>(gate[i + plan.width])));
      }
    });
  });
}

void run_swiglu_backward(const SwigluBackwardPlan& plan, void*) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_rows(plan.rows, plan.width, [&](int64_t row) {
      const T* grad = static_cast<const T*>(plan.grad) + row * plan.width;
      const T* gate = static_cast<const T*>(plan.gate_up) + row * 2 * plan.width;
      T* grad_gate_up = static_cast<T*>(plan.grad_gate_up) + row * 2 * plan.width;
      for (int64_t i = 0; i < plan.width; ++i) {
        float grad_gate, grad_up;
        swiglu_gradient(static_cast<float>(grad[i]), static_cast<float>(gate[i]),
                        static_cast<float>(gate[i + plan.width]), grad_gate, grad_up);
        grad_gate_up[i] = static_cast<T>(grad_gate);
        grad_gate_up[i + plan.width] = static_cast<T>(grad_up);
      }
    });
  });
}

}  // namespace wallvla
