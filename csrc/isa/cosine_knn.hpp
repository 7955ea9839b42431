// The seam between the search and its instruction sets: plain data and function pointers, so that
// nothing inline is compiled twice with different flags.
#pragma once

#include <cstddef>
#include <cstdint>

namespace robustft::knn {

enum class DType : std::uint8_t { float32, float16, bfloat16, float64 };

// Every dot product that decides an order is summed in this one way, whatever the instruction set:
// element i goes to lane i mod 16, each product and each sum rounded to fp64, lanes then folded
// in halves (8, 4, 2, 1).
inline constexpr std::size_t kLanes = 16;

// row [dim] of the kernel's dtype, query [dim].
using DotFn = double (*)(const void* row, const double* query, std::size_t dim);

struct Kernels {
    const char* name;
    DotFn dot[4];  // by DType
};

extern const Kernels kPortable;

}  // namespace robustft::knn
