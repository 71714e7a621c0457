// Element types, vectors and reductions of the CUDA backend. No torch here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace wallvla {

template <class T, int N>
struct Vec {
  T at[N];
};

__device__ __forceinline__ unsigned bits(__half value) { return __half_as_ushort(value); }
__device__ __forceinline__ unsigned bits(__nv_bfloat16 value) { return __bfloat16_as_ushort(value); }

// A vector of whole 16 byte words, at an address that is a multiple of 16, moves word by word
template <int N, class T>
__device__ __forceinline__ Vec<T, N> load(const T* address) {
  Vec<T, N> values;
  if constexpr (sizeof(values) % 16 == 0) {
    uint4 words[sizeof(values) / 16];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i) {
      words[i] = reinterpret_cast<const uint4*>(address)[i];
    }
    memcpy(&values, words, sizeof(values));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      values.at[i] = address[i];
    }
  }
  return values;
}

template <int N, class T>
__device__ __forceinline__ void store(T* address, const Vec<T, N>& values) {
  if constexpr (sizeof(T) == 2 && N % 8 == 0) {
    // Packed and stored by intrinsics: nvcc splits what it may split, and stores of 16 bytes become many of 2 or 4
#pragma unroll
    for (int i = 0; i < N; i += 8) {
      const auto pair = [&](int j) { return bits(values.at[i + j]) | bits(values.at[i + j + 1]) << 16; };
      __stwb(reinterpret_cast<uint4*>(address + i), make_uint4(pair(0), pair(2), pair(4), pair(6)));
    }
  } else if constexpr (sizeof(T) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float* at = values.at + i;
      __stwb(reinterpret_cast<float4*>(address + i), make_float4(at[0], at[1], at[2], at[3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      address[i] = values.at[i];
    }
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Sums each of N values over the block; every thread gets the sums. blockDim.x is a multiple of 32.
template <int N>
__device__ __forceinline__ void block_sum(float (&values)[N]) {
  __shared__ float of_warp[N][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      values[n] += __shfl_xor_sync(0xffffffffu, values[n], offset);
    }
    if (lane == 0) {
      of_warp[n][warp] = values[n];
    }
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    values[n] = lane < warps ? of_warp[n][lane] : 0.0f;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      values[n] += __shfl_xor_sync(0xffffffffu, values[n], offset);
    }
  }
  // A next call may write `of_warp` only when every warp has read it
  __syncthreads();
}

// Calls f with a value of the element type
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float16:
      return f(__half{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
  }
}

inline bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline unsigned grid_size(int64_t blocks) {
  if (blocks > INT_MAX) {
    throw std::runtime_error("The tensor needs " + std::to_string(blocks) + " blocks, more than a grid holds.");
  }
  return static_cast<unsigned>(blocks);
}

// Threads of a block for `items` independent items: whole warps, at most `most`
inline unsigned block_size(int64_t items, int64_t most) {
  const int64_t threads = (items + 31) / 32 * 32;
  return static_cast<unsigned>(threads < most ? threads : most);
}

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("The CUDA kernel ") + name + " did not start: " + cudaGetErrorString(error));
  }
}

}  // namespace wallvla
