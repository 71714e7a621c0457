#include "../common/cuda.cuh"
#include "rms_norm.h"

namespace wallvla {
namespace {

// One block a row; a thread has the vectors threadIdx.x, threadIdx.x + blockDim.x, ... of V elements. Widths up to
// 1024 V, which are all of ours, give each thread one vector at most, and that one stays in registers between the passes.
template <class T, class W, int V>
__global__ void rms_norm_kernel(const __grid_constant__ RmsNormPlan plan) {
  const int64_t offset = blockIdx.x * plan.width;
  const int width = static_cast<int>(plan.width), step = static_cast<int>(blockDim.x) * V;
  const bool in_registers = width <= step;
  const T* states = static_cast<const T*>(plan.states) + offset;
  const T* residual = plan.residual == nullptr ? nullptr : static_cast<const T*>(plan.residual) + offset;
  T* total = residual == nullptr ? nullptr : static_cast<T*>(plan.total) + offset;
  T* normed = static_cast<T*>(plan.normed) + offset;
  const W* weight = static_cast<const W*>(plan.weight);

  Vec<T, V> held;
  Vec<W, V> by;
  float squares[1] = {0.0f};
  for (int i = threadIdx.x * V; i < width; i += step) {
    held = load<V>(states + i);
    by = load<V>(weight + i);  // here, so that it does not wait for the sum
    if (residual != nullptr) {
      const Vec<T, V> added = load<V>(residual + i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        held.at[v] = from_float<T>(to_float(added.at[v]) + to_float(held.at[v]));
      }
      store<V>(total + i, held);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float value = to_float(held.at[v]);
      squares[0] += value * value;
    }
  }
  block_sum(squares);
  const float scale = rsqrtf(squares[0] / width + plan.eps);

  for (int i = threadIdx.x * V; i < width; i += step) {
    if (!in_registers) {
      // The thread's own writes, where there is a residual
      held = load<V>((residual == nullptr ? states : total) + i);
      by = load<V>(weight + i);
    }
    Vec<T, V> result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float scaled = to_float(held.at[v]) * scale;
      if (!plan.float32_weight) {
        scaled = to_float(from_float<T>(scaled));
      }
      result.at[v] = from_float<T>(to_float(by.at[v]) * scaled);
    }
    store<V>(normed + i, result);
  }
}

// One block a part of the weight's gradient; it takes the rows of its part one after another.
template <class T, class W, int V>
__global__ void rms_norm_backward_kernel(const __grid_constant__ RmsNormBackwardPlan plan) {
  const int width = static_cast<int>(plan.width), step = static_cast<int>(blockDim.x) * V;
  const bool in_registers = width <= step;
  const W* weight = static_cast<const W*>(plan.weight);
  float* weight_grad = plan.weight_grad + blockIdx.x * plan.width;
  Vec<float, V> sum{};

  for (int64_t row = blockIdx.x; row < plan.rows; row += gridDim.x) {
    const int64_t offset = row * plan.width;
    const T* total = static_cast<const T*>(plan.total) + offset;
    const T* grad_normed = static_cast<const T*>(plan.grad_normed) + offset;
    const T* grad_total = plan.grad_total == nullptr ? nullptr : static_cast<const T*>(plan.grad_total) + offset;
    T* grad = static_cast<T*>(plan.grad) + offset;

    float sums[2] = {0.0f, 0.0f};  // of squares; of grad * total
    for (int i = threadIdx.x * V; i < width; i += step) {
      const Vec<T, V> value = load<V>(total + i), given = load<V>(grad_normed + i);
      const Vec<W, V> by = load<V>(weight + i);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = to_float(value.at[v]);
        sums[0] += x * x;
        sums[1] += x * to_float(given.at[v]) * to_float(by.at[v]);
      }
    }
    block_sum(sums);
    const float scale = rsqrtf(sums[0] / width + plan.eps), dot = sums[1] / width;

    for (int i = threadIdx.x * V; i < width; i += step) {
      const Vec<T, V> value = load<V>(total + i), given = load<V>(grad_normed + i);
      const Vec<W, V> by = load<V>(weight + i);
      Vec<T, V> result, passed;
      if (!in_registers) {
        sum = load<V>(weight_grad + i);  // the thread's own columns, zero at first
      }
      if (grad_total != nullptr) {
        passed = load<V>(grad_total + i);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float x = to_float(value.at[v]), g = to_float(given.at[v]);
        float gradient = rms_norm_gradient(g * to_float(by.at[v]), x, scale, dot);
        if (grad_total != nullptr) {
          gradient += to_float(passed.at[v]);
        }
        result.at[v] = from_float<T>(gradient);
        sum.at[v] += g * (x * scale);
      }
      store<V>(grad + i, result);
      if (!in_registers) {
        store<V>(weight_grad + i, sum);
      }
    }
  }
  const int i = threadIdx.x * V;
  if (in_registers && i < width) {
    store<V>(weight_grad + i, sum);
  }
}

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

void check_width(int64_t width) {
  if (width > INT_MAX / 2) {
    throw std::runtime_error("A row has " + std::to_string(width) + " elements; these kernels take up to 2^30.");
  }
}

}  // namespace

void run_rms_norm(const RmsNormPlan& plan, void* stream) {
  check_width(plan.width);
  const unsigned blocks = grid_size(plan.rows);
  const auto queue = static_cast<cudaStream_t>(stream);
  dispatch_with_weight(plan.dtype, plan.weight_is_float32, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    using W = decltype(weight_zero);
    constexpr int vector = 16 / sizeof(T);
    const bool addresses = aligned(plan.states) && aligned(plan.weight) && aligned(plan.normed) &&
                           aligned(plan.residual) && aligned(plan.total);  // null is aligned
    if (addresses && plan.width % vector == 0) {
      rms_norm_kernel<T, W, vector><<<blocks, block_size(plan.width / vector, 1024), 0, queue>>>(plan);
    } else {
      rms_norm_kernel<T, W, 1><<<blocks, block_size(plan.width, 1024), 0, queue>>>(plan);
    }
    check_launch("rms_norm");
  });
}

void run_rms_norm_backward(const RmsNormBackwardPlan& plan, void* stream) {
  check_width(plan.width);
  const unsigned blocks = grid_size(plan.weight_grad_parts);
  const auto queue = static_cast<cudaStream_t>(stream);
  dispatch_with_weight(plan.dtype, plan.weight_is_float32, [&](auto zero, auto weight_zero) {
    using T = decltype(zero);
    using W = decltype(weight_zero);
    constexpr int vector = 16 / sizeof(T);
    const bool addresses = aligned(plan.grad_normed) && aligned(plan.grad_total) && aligned(plan.total) &&
                           aligned(plan.weight) && aligned(plan.grad) && aligned(plan.weight_grad);  // null is aligned
    if (addresses && plan.width % vector == 0) {
      rms_norm_backward_kernel<T, W, vector><<<blocks, block_size(plan.width / vector, 1024), 0, queue>>>(plan);
    } else {
      rms_norm_backward_kernel<T, W, 1><<<blocks, block_size(plan.width, 1024), 0, queue>>>(plan);
    }
    check_launch("rms_norm_backward");
  });
}

}  // namespace wallvla
