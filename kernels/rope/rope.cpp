#include "rope.h"

#include <climits>

#include "../common/tensors.h"
#include "../torch-ext/torch_binding.h"

namespace wallvla {
namespace {

void check_angles(const Tensor& angles, const char* name, const Tensor& states, bool matches, const char* shape) {
  WALLVLA_CHECK(angles.is_cuda() == states.is_cuda() && angles.get_device_index() == states.get_device_index(), name,
                " and the states are on different devices.");
  WALLVLA_CHECK(angles.scalar_type() == ScalarType::Float, name, " is ",
                torch::headeronly::toString(angles.scalar_type()), "; it must be float32: pass ", name, ".float().");
  WALLVLA_CHECK(matches, name, " has shape ", shape_of(angles), ", but states of shape ", shape_of(states), " need ",
                shape, ".");
  check_contiguous(angles, name);
}

// cos and sin of (B or 1, S, P); returns the stride of their batch
int64_t check_batched_angles(const Tensor& cos, const Tensor& sin, const Tensor& states, int64_t batch,
                             int64_t length, int64_t width) {
  for (const auto& [angles, name] : {std::pair(&cos, "cos"), std::pair(&sin, "sin")}) {
    const bool matches = angles->dim() == 3 && (angles->size(0) == batch || angles->size(0) == 1) &&
                         angles->size(1) == length && angles->size(2) == width;
    check_angles(*angles, name, states, matches, "(B, S, P) or (1, S, P)");
  }
  WALLVLA_CHECK(cos.size(0) == sin.size(0), "cos has shape ", shape_of(cos), " and sin ", shape_of(sin),
                "; they must be the same.");
  return cos.size(0) == 1 ? 0 : length * width;
}

void check_width(int64_t width, int64_t heads) {
  WALLVLA_CHECK(width > 0 && width % 2 == 0, "A head has width ", width, "; rope rotates pairs, so it must be even.");
  WALLVLA_CHECK(heads * width < INT_MAX, "A token has ", heads, " heads of width ", width,
                "; together they must stay below 2^31 elements.");
}

RopeTarget target(const Tensor& tensor, int64_t start, int64_t first_head) {
  char* data = static_cast<char*>(tensor.data_ptr()) + start * tensor.stride(2) * tensor.element_size();
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), first_head};
}

void run(const RopePlan& plan, const Tensor& on) {
  if (plan.batch * plan.length * plan.heads == 0) {
    return;
  }
  const OnDevice device(on);
  run_rope(plan, device.stream());
}

}  // namespace

Tensor rope(const Tensor& states, const Tensor& cos, const Tensor& sin, bool transposed) {
  RopePlan plan{};
  plan.dtype = dtype_of(states, "states");
  WALLVLA_CHECK(states.dim() == 4, "states has shape ", shape_of(states), "; it must be (B, N, S, P).");
  plan.batch = states.size(0), plan.heads = states.size(1), plan.length = states.size(2), plan.width = states.size(3);
  check_width(plan.width, plan.heads);
  WALLVLA_CHECK(states.stride(3) == 1, "states of shape ", shape_of(states), " has strides ", strides_of(states),
                "; heads must be contiguous: pass states.contiguous().");
  plan.angle_batch_stride = check_batched_angles(cos, sin, states, plan.batch, plan.length, plan.width);

  Tensor result = torch::stable::new_empty(states, states.sizes());
  plan.source = states.data_ptr();
  plan.source_batch_stride = states.stride(0);
  plan.source_head_stride = states.stride(1);
  plan.source_token_stride = states.stride(2);
  plan.cos = static_cast<const float*>(cos.data_ptr());
  plan.sin = static_cast<const float*>(sin.data_ptr());
  plan.rotated_heads = plan.heads;
  plan.transposed = transposed;
  plan.num_targets = 1;
  plan.targets[0] = target(result, 0, 0);
  run(plan, states);
  return result;
}

Tensor qkv_rope_store(const Tensor& qkv, const Tensor& cos, const Tensor& sin, Tensor keys, Tensor values,
                      int64_t start) {
  RopePlan plan{};
  plan.dtype = dtype_of(qkv, "qkv");
  WALLVLA_CHECK(qkv.dim() == 3, "qkv has shape ", shape_of(qkv), "; it must be (B, S, (Nq + 2 Nkv) P).");
  check_contiguous(qkv, "qkv");
  plan.batch = qkv.size(0), plan.length = qkv.size(1);
  for (const auto& [cache, name] : {std::pair(&keys, "keys"), std::pair(&values, "values")}) {
    check_like(*cache, name, qkv, "qkv");
    WALLVLA_CHECK(cache->dim() == 4 && cache->size(0) == plan.batch, name, " has shape ", shape_of(*cache),
                  ", but qkv of shape ", shape_of(qkv), " needs (B, Nkv, L, P).");
    WALLVLA_CHECK(cache->stride(3) == 1, name, " of shape ", shape_of(*cache), " has strides ", strides_of(*cache),
                  "; heads must be contiguous.");
    for (int64_t i = 0; i < 3; ++i) {
      WALLVLA_CHECK(cache->stride(i) != 0 || cache->size(i) <= 1, name, " of shape ", shape_of(*cache),
                    " is expanded along dimension ", i, "; several heads cannot be written to one place.");
    }
  }
  for (int64_t i = 1; i < 4; ++i) {
    WALLVLA_CHECK(keys.size(i) == values.size(i), "keys has shape ", shape_of(keys), " and values ",
                  shape_of(values), "; they must be the same.");
  }
  const int64_t kv_heads = keys.size(1);
  plan.width = keys.size(3);
  WALLVLA_CHECK(plan.width > 0 && qkv.size(2) % plan.width == 0 && qkv.size(2) / plan.width >= 2 * kv_heads,
                "qkv has shape ", shape_of(qkv), ", which is not (B, S, (Nq + 2 Nkv) P) with the Nkv ", kv_heads,
                " and P ", plan.width, " of keys.");
  plan.heads = qkv.size(2) / plan.width;
  const int64_t q_heads = plan.heads - 2 * kv_heads;
  check_width(plan.width, plan.heads);
  WALLVLA_CHECK(start >= 0 && start + plan.length <= keys.size(2), "Tokens [", start, ", ", start + plan.length,
                ") do not fit into caches of length ", keys.size(2), ".");
  plan.angle_batch_stride = check_batched_angles(cos, sin, qkv, plan.batch, plan.length, plan.width);

  Tensor queries = torch::stable::new_empty(qkv, {plan.batch, q_heads, plan.length, plan.width});
  plan.source = qkv.data_ptr();
  plan.source_batch_stride = qkv.stride(0);
  plan.source_head_stride = plan.width;
  plan.source_token_stride = qkv.stride(1);
  plan.cos = static_cast<const float*>(cos.data_ptr());
  plan.sin = static_cast<const float*>(sin.data_ptr());
  plan.rotated_heads = q_heads + kv_heads;
  plan.num_targets = 3;
  plan.targets[0] = target(queries, 0, 0);
  plan.targets[1] = target(keys, start, q_heads);
  plan.targets[2] = target(values, start, q_heads + kv_heads);
  run(plan, qkv);
  return queries;
}

void vision_rope_(Tensor qkv, const Tensor& cos, const Tensor& sin) {
  RopePlan plan{};
  plan.dtype = dtype_of(qkv, "qkv");
  WALLVLA_CHECK(qkv.dim() == 4 && qkv.size(1) == 3, "qkv has shape ", shape_of(qkv), "; it must be (S, 3, N, P).");
  check_contiguous(qkv, "qkv");
  plan.batch = 1, plan.length = qkv.size(0), plan.heads = 2 * qkv.size(2), plan.width = qkv.size(3);
  check_width(plan.width, plan.heads);
  for (const auto& [angles, name] : {std::pair(&cos, "cos"), std::pair(&sin, "sin")}) {
    const bool matches =
        angles->dim() == 2 && angles->size(0) == plan.length && angles->size(1) == plan.width;
    check_angles(*angles, name, qkv, matches, "(S, P)");
  }

  plan.source = qkv.data_ptr();
  plan.source_head_stride = plan.width;
  plan.source_token_stride = qkv.stride(0);
  plan.cos = static_cast<const float*>(cos.data_ptr());
  plan.sin = static_cast<const float*>(sin.data_ptr());
  plan.rotated_heads = plan.heads;
  plan.num_targets = 1;
  plan.targets[0] = {qkv.data_ptr(), 0, plan.width, qkv.stride(0), 0};
  run(plan, qkv);
}

}  // namespace wallvla
