#include "../common/cuda.cuh"
#include "rope.h"

namespace wallvla {
namespace {

// One block rotates all heads of a token, so that its angles come from the cache; a thread rotates V pairs at a time.
template <class T, int V>
__global__ void rope_kernel(const __grid_constant__ RopePlan plan) {
  const unsigned length = static_cast<unsigned>(plan.length);
  const int64_t batch = blockIdx.x / length, token = blockIdx.x % length;
  const int half = static_cast<int>(plan.width) / 2, units_per_head = half / V;
  const int units = static_cast<int>(plan.heads) * units_per_head;
  const int64_t angle = batch * plan.angle_batch_stride + token * plan.width;
  const float *cos = plan.cos + angle, *sin = plan.sin + angle;
  const T* source =
      static_cast<const T*>(plan.source) + batch * plan.source_batch_stride + token * plan.source_token_stride;

  for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
    const int head = unit / units_per_head, i = unit % units_per_head * V;
    const T* from = source + head * plan.source_head_stride + i;
    Vec<T, V> first = load<V>(from), second = load<V>(from + half);
    if (head < plan.rotated_heads) {
      const Vec<float, V> cos_a = load<V>(cos + i), cos_b = load<V>(cos + half + i);
      const Vec<float, V> sin_a = load<V>(sin + i), sin_b = load<V>(sin + half + i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float a = to_float(first.at[v]), b = to_float(second.at[v]);
        rotate_pair(a, b, cos_a.at[v], cos_b.at[v], sin_a.at[v], sin_b.at[v], plan.transposed);
        first.at[v] = from_float<T>(a);
        second.at[v] = from_float<T>(b);
      }
    }
    const RopeTarget& target = target_of(plan, head);
    T* to = static_cast<T*>(target.data) + batch * target.batch_stride + token * target.token_stride +
            (head - target.first_head) * target.head_stride + i;
    store<V>(to, first);
    store<V>(to + half, second);
  }
}

// Whether every vector of V elements that the kernel touches starts at a multiple of 16 bytes
bool can_vectorise(const RopePlan& plan, int vector) {
  const auto whole = [&](int64_t stride) { return stride * size_of(plan.dtype) % 16 == 0; };
  bool fits = plan.width / 2 % vector == 0 && aligned(plan.cos) && aligned(plan.sin) && aligned(plan.source) &&
              whole(plan.source_batch_stride) && whole(plan.source_head_stride) && whole(plan.source_token_stride);
  for (int i = 0; i < plan.num_targets; ++i) {
    const RopeTarget& target = plan.targets[i];
    fits = fits && aligned(target.data) && whole(target.batch_stride) && whole(target.head_stride) &&
           whole(target.token_stride);
  }
  return fits;
}

}  // namespace

void run_rope(const RopePlan& plan, void* stream) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int vector = 16 / sizeof(T);
    const auto queue = static_cast<cudaStream_t>(stream);
    const unsigned blocks = grid_size(plan.batch * plan.length);
    const int64_t pairs = plan.heads * plan.width / 2;
    if (can_vectorise(plan, vector)) {
      rope_kernel<T, vector><<<blocks, block_size(pairs / vector, 256), 0, queue>>>(plan);
    } else {
      rope_kernel<T, 1><<<blocks, block_size(pairs, 256), 0, queue>>>(plan);
    }
    check_launch("rope");
  });
}

}  // namespace wallvla
