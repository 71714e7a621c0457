// Rotation of heads by their positions: x cos + rotate_half(x) sin, where rotate_half((a, b)) = (-b, a).
#pragma once

#include "../common/plan.h"

namespace wallvla {

// Strides are in elements; within a head they are 1.
struct RopeTarget {
  void* data;
  int64_t batch_stride, head_stride, token_stride;
  int64_t first_head;  // of the source; the target has the heads from here to the next target's
};

struct RopePlan {
  DType dtype;
  int64_t batch, length, heads, width;
  const void* source;
  int64_t source_batch_stride, source_head_stride, source_token_stride;
  const float* cos;  // (batch or 1, length, width)
  const float* sin;
  int64_t angle_batch_stride;
  int64_t rotated_heads;  // the others are copied
  bool transposed;        // rotate by the transposed matrix, as the gradient does
  int num_targets;
  RopeTarget targets[3];
};

// One pair (a, b) of a head, in place
WALLVLA_FORMULA void rotate_pair(float& a, float& b, float cos_a, float cos_b, float sin_a, float sin_b,
                                 bool transposed) {
  const float x = a, y = b;
  a = transposed ? x * cos_a + y * sin_b : x * cos_a - y * sin_a;
  b = transposed ? y * cos_b - x * sin_a : y * cos_b + x * sin_b;
}

WALLVLA_FORMULA const RopeTarget& target_of(const RopePlan& plan, int64_t head) {
  int target = 0;
  while (target + 1 < plan.num_targets && head >= plan.targets[target + 1].first_head) {
    ++target;
  }
  return plan.targets[target];
}

// In place if source and target are the same: both halves of a pair are read before either is written.
void run_rope(const RopePlan& plan, void* stream);

}  // namespace wallvla
