// Element types and loops of the CPU backend.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "plan.h"

namespace wallvla {

// Calls f with a value of the element type
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float16:
      return f(torch::headeronly::Half{});
    case DType::bfloat16:
      return f(torch::headeronly::BFloat16{});
  }
}

// Calls f(row) for all rows, on several threads where the work is worth it
template <class F>
void for_rows(int64_t rows, int64_t elements_per_row, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_row));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      f(row);
    }
  });
}

}  // namespace wallvla
