// As much of CUDA as our kernels use, for one CPU thread: tests run every line of them without a GPU.
//
// Blocks run one after another. The threads of a block are fibers, and each runs up to a point where threads meet
// (__syncthreads, a shuffle) before the next one runs, so a missing barrier shows as a wrong result.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static

struct Dim {
  unsigned x;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T>
void __stwb(T* address, T value) {
  *address = value;
}

using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;
inline float __half2float(__half value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline uint16_t __half_as_ushort(__half value) { return value.x; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.x; }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool done;
};

inline std::vector<Fiber> fibers(1024);
inline ucontext_t scheduler;
inline std::function<void()> body;
inline float exchanged[1024];

inline void meet() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibers[self].context, &scheduler);
  threadIdx.x = self;
}

inline void start() {
  body();
  fibers[threadIdx.x].done = true;
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    makecontext(&fiber.context, start, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (!fibers[i].done) {
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
        running = true;
      }
    }
  }
}

// What <<<blocks, threads>>> becomes
inline void run_grid(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim.x = blocks, blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx.x = block;
    run_block(threads);
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::meet(); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  cuda_on_cpu::exchanged[threadIdx.x] = value;
  cuda_on_cpu::meet();
  const float received = cuda_on_cpu::exchanged[threadIdx.x ^ offset];
  cuda_on_cpu::meet();
  return received;
}
