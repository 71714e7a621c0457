#include "swiglu.h"

#include <vector>

#include "../common/tensors.h"
#include "../torch-ext/torch_binding.h"

namespace wallvla {
namespace {

// Checks the packed input and returns the width of one of its halves
int64_t check_packed(const Tensor& gate_up) {
  WALLVLA_CHECK(gate_up.dim() >= 1 && gate_up.size(gate_up.dim() - 1) % 2 == 0, "gate_up has shape ",
                shape_of(gate_up), "; its last dimension holds gates and as many ups, so it must be even.");
  check_contiguous(gate_up, "gate_up");
  return gate_up.size(gate_up.dim() - 1) / 2;
}

}  // namespace

Tensor swiglu(const Tensor& gate_up) {
  SwigluPlan plan{};
  plan.dtype = dtype_of(gate_up, "gate_up");
  plan.width = check_packed(gate_up);
  plan.rows = plan.width ? gate_up.numel() / (2 * plan.width) : 0;
  std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
  sizes.back() = plan.width;
  Tensor result = torch::stable::new_empty(gate_up, sizes);
  plan.gate_up = gate_up.data_ptr();
  plan.result = result.data_ptr();
  if (plan.rows > 0) {
    const OnDevice device(gate_up);
    run_swiglu(plan, device.stream());
  }
  return result;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  SwigluBackwardPlan plan{};
  plan.dtype = dtype_of(gate_up, "gate_up");
  plan.width = check_packed(gate_up);
  plan.rows = plan.width ? gate_up.numel() / (2 * plan.width) : 0;
  check_like(grad, "grad", gate_up, "gate_up");
  check_contiguous(grad, "grad");
  WALLVLA_CHECK(2 * grad.numel() == gate_up.numel(), "grad has shape ", shape_of(grad), " and gate_up ",
                shape_of(gate_up), "; grad must be half as wide.");
  Tensor grad_gate_up = torch::stable::empty_like(gate_up);
  plan.grad = grad.data_ptr();
  plan.gate_up = gate_up.data_ptr();
  plan.grad_gate_up = grad_gate_up.data_ptr();
  if (plan.rows > 0) {
    const OnDevice device(gate_up);
    run_swiglu_backward(plan, device.stream());
  }
  return grad_gate_up;
}

}  // namespace wallvla
