#include "rms_norm.h"


#include "../common/tensors.h"
#include "../torch-ext/torch_binding.h"

namespace wallvla {
namespace {

// Blocks that share the gradient of a weight: about two for each multiprocessor of a large GPU
constexpr int64_t kMostParts = 256;

// Checks the weight and returns whether it is float32
bool check_weight(const Tensor& weight, const Tensor& states, bool float32_weight) {
  WALLVLA_CHECK(weight.is_cuda() == states.is_cuda() && weight.get_device_index() == states.get_device_index(),
                "weight and states are on different devices.");
  WALLVLA_CHECK(states.dim() >= 1 && weight.dim() == 1 && weight.size(0) == states.size(states.dim() - 1),
                "weight has shape ", shape_of(weight), " and states ", shape_of(states),
                "; the weight needs one number for each element of the last dimension.");
  check_contiguous(weight, "weight");
  const bool is_float32 = weight.scalar_type() == ScalarType::Float;
  WALLVLA_CHECK(weight.scalar_type() == states.scalar_type() || (is_float32 && float32_weight), "weight is ",
                torch::headeronly::toString(weight.scalar_type()), " and states ",
                torch::headeronly::toString(states.scalar_type()),
                "; the weight must have the dtype of the states, or be float32 with float32_weight.");
  return is_float32;
}

RmsNormPlan make_plan(const Tensor& states, const Tensor& weight, double eps, bool float32_weight) {
  RmsNormPlan plan{};
  plan.dtype = dtype_of(states, "states");
  check_contiguous(states, "states");
  plan.weight_is_float32 = check_weight(weight, states, float32_weight);
  plan.width = weight.size(0);
  plan.rows = plan.width ? states.numel() / plan.width : 0;
  plan.states = states.data_ptr();
  plan.weight = weight.data_ptr();
  plan.float32_weight = float32_weight;
  plan.eps = static_cast<float>(eps);
  return plan;
}

void run(const RmsNormPlan& plan, const Tensor& on) {
  if (plan.rows == 0) {
    return;
  }
  const OnDevice device(on);
  run_rms_norm(plan, device.stream());
}

}  // namespace

Tensor rms_norm(const Tensor& states, const Tensor& weight, double eps, bool float32_weight) {
  RmsNormPlan plan = make_plan(states, weight, eps, float32_weight);
  Tensor normed = torch::stable::empty_like(states);
  plan.normed = normed.data_ptr();
  run(plan, states);
  return normed;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& states, const Tensor& residual, const Tensor& weight,
                                        double eps, bool float32_weight) {
  RmsNormPlan plan = make_plan(states, weight, eps, float32_weight);
  check_like(residual, "residual", states, "states");
  check_contiguous(residual, "residual");
  bool same_shape = residual.dim() == states.dim();
  for (int64_t i = 0; same_shape && i < states.dim(); ++i) {
    same_shape = residual.size(i) == states.size(i);
  }
  WALLVLA_CHECK(same_shape, "residual has shape ", shape_of(residual), " and states ", shape_of(states),
                "; they must be the same.");
  Tensor normed = torch::stable::empty_like(states), total = torch::stable::empty_like(states);
  plan.residual = residual.data_ptr();
  plan.normed = normed.data_ptr();
  plan.total = total.data_ptr();
  run(plan, states);
  return {normed, total};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_normed, const std::optional<Tensor>& grad_total,
                                             const Tensor& total, const Tensor& weight, double eps) {
  RmsNormBackwardPlan plan{};
  plan.dtype = dtype_of(total, "total");
  check_contiguous(total, "total");
  plan.weight_is_float32 = check_weight(weight, total, true);
  plan.width = weight.size(0);
  plan.rows = plan.width ? total.numel() / plan.width : 0;
  check_like(grad_normed, "grad_normed", total, "total");
  check_contiguous(grad_normed, "grad_normed");
  WALLVLA_CHECK(grad_normed.numel() == total.numel(), "grad_normed has shape ", shape_of(grad_normed), " and total ",
                shape_of(total), "; they must be the same.");
  if (grad_total.has_value()) {
    check_like(*grad_total, "grad_total", total, "total");
    check_contiguous(*grad_total, "grad_total");
    WALLVLA_CHECK(grad_total->numel() == total.numel(), "grad_total has shape ", shape_of(*grad_total),
                  " and total ", shape_of(total), "; they must be the same.");
    plan.grad_total = grad_total->data_ptr();
  }
  plan.weight_grad_parts = plan.rows < kMostParts ? plan.rows : kMostParts;
  Tensor grad = torch::stable::empty_like(total);
  Tensor parts = torch::stable::new_zeros(total, {plan.weight_grad_parts, plan.width}, ScalarType::Float);
  plan.grad_normed = grad_normed.data_ptr();
  plan.total = total.data_ptr();
  plan.weight = weight.data_ptr();
  plan.eps = static_cast<float>(eps);
  plan.grad = grad.data_ptr();
  plan.weight_grad = static_cast<float*>(parts.data_ptr());
  if (plan.rows > 0) {
    const OnDevice device(total);
    run_rms_norm_backward(plan, device.stream());
  }
  const int64_t over_parts = 0;
  return {grad, torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(&over_parts, 1))};
}

}  // namespace wallvla
