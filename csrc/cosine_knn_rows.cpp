// Reading one row of any dtype.
#include <algorithm>
#include <bit>
#include <cmath>

#include "cosine_knn.hpp"

namespace robustft::knn {
namespace {

float from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000U) << 16;
    const std::uint32_t magnitude = (bits & 0x7fffU) << 13;
    if (magnitude >= 0x0f80'0000U) return std::bit_cast<float>(sign | 0x7fc0'0000U);  // inf or NaN
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

float from_brain(std::uint16_t bits) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

template <class T, class Widen>
bool widen_all(const void* row, std::size_t dim, double* out, Widen widen) {
    const T* x = static_cast<const T*>(row);
    // A sum of |x| * 0 is 0 unless some x is NaN or infinite: a test without branches.
    double poison = 0;
    for (std::size_t i = 0; i < dim; ++i) {
        out[i] = widen(x[i]);
        poison += out[i] * 0;
    }
    return poison == 0;
}

}  // namespace

bool widen_row(const void* row, DType dtype, std::size_t dim, double* out) {
    switch (dtype) {
        case DType::float32:
            return widen_all<float>(row, dim, out, [](float x) { return x; });
        case DType::float16:
            return widen_all<std::uint16_t>(row, dim, out, from_half);
        case DType::bfloat16:
            return widen_all<std::uint16_t>(row, dim, out, from_brain);
        case DType::float64:
            break;
    }
    if (!widen_all<double>(row, dim, out, [](double x) { return x; })) return false;
    double largest = 0;
    for (std::size_t i = 0; i < dim; ++i) largest = std::max(largest, std::abs(out[i]));
    return largest == 0 || (largest >= 1e-140 && largest <= 1e140);
}

}  // namespace robustft::knn
