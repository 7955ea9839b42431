// A batch of queries in every form that the filters need, with the slack of their bounds.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cosine_knn_scan.hpp"

namespace robustft::knn {
namespace {

// With unit vectors x = x' + e and y = y' + f (primes: quantised), x.y - x'.y' = x'.f + e.y, so
// |x.y - x'.y'| <= |x'| |f| + |e|: exact norms, no assumption about the data. kSlack covers the
// fp32 arithmetic of the filter: up to six roundings (2^-24 each) of terms below 4.
constexpr double kSlack = 3e-6;

// The fp32 tier multiplies unit vectors rounded to fp32: at most d + 2 roundings, each relative to
// a sum of |x_i y_i| <= 1, and twice that for good measure.
double float_slack(std::size_t dim) { return 1.32e-7 * static_cast<double>(dim) + kSlack; }

// The bound holds for the worst case, that all rounding errors conspire. Over n columns that matter
// they come to about reach / sqrt(n); four times that is hardly ever exceeded, and when it is,
// Scan::certified notices.
float caution(const double* row, double inv_norm, std::size_t dim) {
    double fourth = 0;
    for (std::size_t i = 0; i < dim; ++i) {
        const double square = (row[i] * inv_norm) * (row[i] * inv_norm);
        fourth += square * square;
    }
    return static_cast<float>(1 + std::min(1.0, 4 * std::sqrt(fourth)));
}

// The largest |code| that a query may have: no sum of its products overflows. Where they are summed
// in 16 bits this depends on how its large columns lie.
std::int32_t largest_code(const double* row, std::size_t dim, const Kernels& kernels) {
    if (kernels.narrow_steps == 1) return kLargestCode;
    const std::size_t group = 4 * kernels.narrow_steps;
    double largest = 0, most = 0;
    for (std::size_t first = 0; first < dim; first += group) {
        double sums[2][2] = {};  // by sign and lane: columns 0 and 1 or 2 and 3 of a step
        for (std::size_t i = first; i < std::min(dim, first + group); ++i) {
            const double size = std::abs(row[i]);
            sums[row[i] > 0][i / 2 % 2] += size;
            largest = std::max(largest, size);
        }
        most = std::max({most, sums[0][0], sums[0][1], sums[1][0], sums[1][1]});
    }
    // Each of a lane's codes may be rounded up by a half.
    const double room = kNarrowSum - static_cast<double>(kernels.narrow_steps);
    const double code = most > 0 ? room * (largest / most) : room;
    return std::min(kLargestCode, static_cast<std::int32_t>(code));
}

// Where query q of `count` lies when they are cut into tiles.
struct Place {
    std::size_t first;  // query of its tile
    std::size_t lane;   // within the tile
    std::size_t width;  // of the tile
    Place(std::size_t q, std::size_t count, std::size_t tile)
        : first(q / tile * tile), lane(q - first), width(std::min(tile, count - first)) {}
};

const Kernels& suited(const Kernels& kernels, std::size_t queries) {
    return queries <= kernels.few_queries ? *kernels.few : kernels;
}

}  // namespace

Batch::Batch(const Plan& plan, std::size_t first, std::size_t count)
    : first_(first),
      count_(count),
      dim_(plan.index.dim()),
      kernels_(suited(plan.index.kernels(), count)),
      wide_(count * dim_),
      inv_norm_(count),
      float_(count),
      floors_(count) {
    const bool int8 = plan.tier == Tier::int8;
    const bool floats = plan.tier == Tier::float32 || plan.adaptive;
    std::vector<std::int8_t> codes((dim_ + kernels_.int8_group - 1) / kernels_.int8_group *
                                   kernels_.int8_group);
    if (int8) {
        int8_.resize(count);
        int8_codes_.resize(count * codes.size());
    }
    if (floats) float_codes_.resize(count * dim_);
    for (std::size_t q = 0; q < count; ++q) {
        double* wide = wide_.data() + q * dim_;
        widen_row(plan.queries[first + q], plan.queries.dtype, dim_, wide);
        inv_norm_[q] = inverse_norm(wide, dim_);
        floors_[q].store(plan.options.threshold, std::memory_order_relaxed);
        if (int8) {
            const std::int32_t limit = largest_code(wide, dim_, kernels_);
            const Quantised x = quantise(wide, inv_norm_[q], dim_, limit, codes.data());
            std::int32_t sum = 0;
            for (std::size_t i = 0; i < dim_; ++i) sum += codes[i];
            const Place place(q, count, kernels_.int8_tile);
            const std::size_t group = kernels_.int8_group;
            std::int8_t* out = int8_codes_.data() + place.first * codes.size() + place.lane * group;
            for (std::size_t i = 0; i < codes.size(); i += group, out += place.width * group) {
                std::memcpy(out, codes.data() + i, group);
            }
            const double unit = zero(q) ? 1 : x.scale;
            const float care = caution(wide, inv_norm_[q], dim_);
            const auto slope = static_cast<float>(x.norm / unit * (1 + 1e-6));
            int8_[q] = {unit, x.norm, x.error + kSlack, slope, -128 * sum, care};
        }
        if (floats) {
            const Place place(q, count, kernels_.float_tile);
            float* out = float_codes_.data() + place.first * dim_ + place.lane;
            for (std::size_t i = 0; i < dim_; ++i) {
                out[i * place.width] = static_cast<float>(wide[i] * inv_norm_[q]);
            }
        }
        float_[q] = {1, 0, float_slack(dim_), 0, 0, 2};
    }
}

void Batch::be_certain() {
    for (Scale& scale : int8_) scale.caution = 2;
    certain_ = true;
}

}  // namespace robustft::knn
