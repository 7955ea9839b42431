// The path that runs everywhere, and the definition the others must match.
#include <bit>

#include "isa/cosine_knn.hpp"

namespace robustft::knn {
namespace {

double widen(double value) { return value; }
double widen(float value) { return value; }

struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};

double widen(Brain value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

double widen(Half value) {
    // Shifting exponent and mantissa into place leaves a float 2^112 times too small, subnormals
    // included; infinities and NaN never get here.
    const std::uint32_t magnitude = (value.bits & 0x7fffU) << 13;
    const std::uint32_t sign = (value.bits & 0x8000U) << 16;
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p112F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(scaled) | sign);
}

template <class T>
double dot(const void* row, const double* query, std::size_t dim) {
    const T* x = static_cast<const T*>(row);
    double lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += widen(x[i + lane]) * query[i + lane];
        }
    }
    for (std::size_t lane = 0; i + lane < dim; ++lane) {
        lanes[lane] += widen(x[i + lane]) * query[i + lane];
    }
    for (std::size_t half = kLanes / 2; half != 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

}  // namespace

const Kernels kPortable = {
    .name = "portable",
    .dot = {dot<float>, dot<Half>, dot<Brain>, dot<double>},
};

}  // namespace robustft::knn
