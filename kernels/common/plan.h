// What the plans of all operations share. No torch and no CUDA here: backends are plain functions on plans.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define WALLVLA_FORMULA __host__ __device__ __forceinline__
#else
#define WALLVLA_FORMULA inline
#endif

namespace wallvla {

enum class DType { float32, float16, bfloat16 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

}  // namespace wallvla
