#include "../common/cuda.cuh"
#include "swiglu.h"

namespace wallvla {
namespace {

constexpr int kThreads = 128;

// A block does kThreads vectors of V elements of one row; `tiles` blocks do a row.
template <class T, int V>
__global__ void swiglu_kernel(const __grid_constant__ SwigluPlan plan, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles;
  const int64_t i = (static_cast<int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x) * V;
  if (i >= plan.width) {
    return;
  }
  const T* gate_up = static_cast<const T*>(plan.gate_up) + row * 2 * plan.width + i;
  const Vec<T, V> gate = load<V>(gate_up), up = load<V>(gate_up + plan.width);
  Vec<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    result.at[v] = from_float<T>(swiglu_value(to_float(gate.at[v]), to_float(up.at[v])));
  }
  store<V>(static_cast<T*>(plan.result) + row * plan.width + i, result);
}

template <class T, int V>
__global__ void swiglu_backward_kernel(const __grid_constant__ SwigluBackwardPlan plan, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles;
  const int64_t i = (static_cast<int64_t>(blockIdx.x % tiles) * kThreads + threadIdx.x) * V;
  if (i >= plan.width) {
    return;
  }
  const T* gate_up = static_cast<const T*>(plan.gate_up) + row * 2 * plan.width + i;
  const Vec<T, V> grad = load<V>(static_cast<const T*>(plan.grad) + row * plan.width + i);
  const Vec<T, V> gate = load<V>(gate_up), up = load<V>(gate_up + plan.width);
  Vec<T, V> of_gate, of_up;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    float grad_gate, grad_up;
    swiglu_gradient(to_float(grad.at[v]), to_float(gate.at[v]), to_float(up.at[v]), grad_gate, grad_up);
    of_gate.at[v] = from_float<T>(grad_gate);
    of_up.at[v] = from_float<T>(grad_up);
  }
  T* grad_gate_up = static_cast<T*>(plan.grad_gate_up) + row * 2 * plan.width + i;
  store<V>(grad_gate_up, of_gate);
  store<V>(grad_gate_up + plan.width, of_up);
}

// Blocks that a row of `width` elements needs
unsigned tiles_of(int64_t width, int vector) {
  const int64_t elements = static_cast<int64_t>(kThreads) * vector;
  return grid_size((width + elements - 1) / elements);
}

}  // namespace

void run_swiglu(const SwigluPlan& plan, void* stream) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int vector = 16 / sizeof(T);
    const auto queue = static_cast<cudaStream_t>(stream);
    if (plan.width % vector == 0 && aligned(plan.gate_up) && aligned(plan.result)) {
      const unsigned tiles = tiles_of(plan.width, vector);
      swiglu_kernel<T, vector><<<grid_size(plan.rows * tiles), kThreads, 0, queue>>>(plan, tiles);
    } else {
      const unsigned tiles = tiles_of(plan.width, 1);
      swiglu_kernel<T, 1><<<grid_size(plan.rows * tiles), kThreads, 0, queue>>>(plan, tiles);
    }
    check_launch("swiglu");
  });
}

void run_swiglu_backward(const SwigluBackwardPlan& plan, void* stream) {
  dispatch(plan.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int vector = 16 / sizeof(T);
    const auto queue = static_cast<cudaStream_t>(stream);
    if (plan.width % vector == 0 && aligned(plan.grad) && aligned(plan.gate_up) && aligned(plan.grad_gate_up)) {
      const unsigned tiles = tiles_of(plan.width, vector);
      swiglu_backward_kernel<T, vector><<<grid_size(plan.rows * tiles), kThreads, 0, queue>>>(plan, tiles);
    } else {
      const unsigned tiles = tiles_of(plan.width, 1);
      swiglu_backward_kernel<T, 1><<<grid_size(plan.rows * tiles), kThreads, 0, queue>>>(plan, tiles);
    }
    check_launch("swiglu_backward");
  });
}

}  // namespace wallvla
