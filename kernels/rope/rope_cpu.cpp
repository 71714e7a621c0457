#include "../common/cpu.h"
#include "rope.h"

namespace wallvla {

void run_rope(const RopePlan& plan, void*) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t half = plan.width / 2;
    for_rows(plan.batch * plan.length, plan.heads * plan.width, [&](int64_t row) {
      const int64_t batch = row / plan.length, token = row % plan.length;
      const int64_t angle = batch * plan.angle_batch_stride + token * plan.width;
      const float *cos = plan.cos + angle, *sin = plan.sin + angle;
      const T* source = static_cast<const T*>(plan.source) + batch * plan.source_batch_stride +
                        token * plan.source_token_stride;
      for (int64_t head = 0; head < plan.heads; ++head) {
        const RopeTarget& target = target_of(plan, head);
        const T* from = source + head * plan.source_head_stride;
        T* to = static_cast<T*>(target.data) + batch * target.batch_stride + token * target.token_stride +
                (head - target.first_head) * target.head_stride;
        for (int64_t i = 0; i < half; ++i) {
          float a = static_cast<float>(from[i]), b = static_cast<float>(from[i + half]);
          if (head < plan.rotated_heads) {
            rotate_pair(a, b, cos[i], cos[i + half], sin[i], sin[i + half], plan.transposed);
          }
          to[i] = static_cast<T>(a);
          to[i + half] = static_cast<T>(b);
        }
      }
    });
  });
}

}  // namespace wallvla
