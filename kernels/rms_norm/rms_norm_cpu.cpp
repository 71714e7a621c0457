#include <cmath>

#include "../common/cpu.h"
#include "rms_norm.h"

namespace wallvla {
namespace {

// Calls f with values of the element types of the states and of the weight
template <class F>
void dispatch_with_weight(DType dtype, bool weight_is_float32, const F& f) {
  dispatch(dtype, [&](auto zero) {
    if (weight_is_float32) {
      f(zero, float{});
    } else {
      f(zero, zero);
    }
  });
}

}  // namespace

void run_rms_norm(const RmsNormPlan& plan, void*) {
  dispatch_with_weight(plan.dtype, plan.weight_is_float32, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    const auto* weight = static_cast<const decltype(weight_zero)*>(plan.weight);
    for_rows(plan.rows, plan.width, [&](int64_t row) {
      const int64_t offset = row * plan.width;
      const T* states = static_cast<const T*>(plan.states) + offset;
      T* normed = static_cast<T*>(plan.normed) + offset;
      if (plan.residual != nullptr) {
        const T* residual = static_cast<const T*>(plan.residual) + offset;
        T* total = static_cast<T*>(plan.total) + offset;
        for (int64_t i = 0; i < plan.width; ++i) {
          total[i] = static_cast<T>(static_cast<float>(residual[i]) + static_cast<float>(states[i]));
        }
        states = total;
      }
      // In double, because this is one sum where torch's and CUDA's are trees
      double squares = 0;
      for (int64_t i = 0; i < plan.width; ++i) {
        const float value = static_cast<float>(states[i]);
        squares += static_cast<double>(value) * value;
      }
      const float scale = 1.0f / std::sqrt(static_cast<float>(squares / plan.width) + plan.eps);
      for (int64_t i = 0; i < plan.width; ++i) {
        const float scaled = static_cast<float>(states[i]) * scale;
        const float by = static_cast<float>(weight[i]);
        normed[i] =
            plan.float32_weight ? static_cast<T>(by * scaled) : static_cast<T>(by * static_cast<float>(static_cast<T>(scaled)));
      }
    });
  });
}

void run_rms_norm_backward(const RmsNormBackwardPlan& plan, void*) {
  dispatch_with_weight(plan.dtype, plan.weight_is_float32, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    const auto* weight = static_cast<const decltype(weight_zero)*>(plan.weight);
    const int64_t rows_per_part = (plan.rows + plan.weight_grad_parts - 1) / plan.weight_grad_parts;
    for_rows(plan.weight_grad_parts, rows_per_part * plan.width, [&](int64_t part) {
      float* weight_grad = plan.weight_grad + part * plan.width;
      for (int64_t row = part; row < plan.rows; row += plan.weight_grad_parts) {
        const int64_t offset = row * plan.width;
        const T* total = static_cast<const T*>(plan.total) + offset;
        const T* grad_normed = static_cast<const T*>(plan.grad_normed) + offset;
        double squares = 0, dot = 0;
        for (int64_t i = 0; i < plan.width; ++i) {
          const double value = static_cast<float>(total[i]);
          squares += value * value;
          dot += value * static_cast<float>(grad_normed[i]) * static_cast<float>(weight[i]);
        }
        const float scale = 1.0f / std::sqrt(static_cast<float>(squares / plan.width) + plan.eps);
        const float mean_dot = static_cast<float>(dot / plan.width);
        T* grad = static_cast<T*>(plan.grad) + offset;
        for (int64_t i = 0; i < plan.width; ++i) {
          const float value = static_cast<float>(total[i]), given = static_cast<float>(grad_normed[i]);
          weight_grad[i] += given * (value * scale);
          float result = rms_norm_gradient(given * static_cast<float>(weight[i]), value, scale, mean_dot);
          if (plan.grad_total != nullptr) {
            result += static_cast<float>(static_cast<const T*>(plan.grad_total)[offset + i]);
          }
          grad[i] = static_cast<T>(result);
        }
      }
    });
  });
}

}  // namespace wallvla
