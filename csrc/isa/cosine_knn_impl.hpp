// The kernels, written once over a type `Isa` that names the vector operations of one instruction
// set. Included by one translation unit per set; everything is local to it.
//
// Isa provides
//   kWidth, kPanels    rows per vector, vectors held per query: a tile sees kWidth * kPanels rows
//   kTile              queries per tile
//   Ints, Floats       vectors of kWidth
//   Wide               vector of kWideWidth doubles
// and the operations used below.
#pragma once

#include "isa/cosine_knn.hpp"

namespace robustft::knn {
namespace {

struct Half {
    std::uint16_t bits;
};
struct Brain {
    std::uint16_t bits;
};

template <class To, class From>
To bits_to(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    __builtin_memcpy(&out, &value, sizeof(To));
    return out;
}

[[maybe_unused]] double widen(double value) { return value; }
[[maybe_unused]] double widen(float value) { return value; }
[[maybe_unused]] double widen(Brain value) {
    return bits_to<float>(static_cast<std::uint32_t>(value.bits) << 16);
}
[[maybe_unused]] double widen(Half value) {
    // Exponent and mantissa shifted into place give a float 2^112 times too small, subnormals
    // included; infinities and NaN never get here.
    const float scaled = bits_to<float>((value.bits & 0x7fffU) << 13) * 0x1p112F;
    return bits_to<float>(bits_to<std::uint32_t>(scaled) | (value.bits & 0x8000U) << 16);
}

template <class Isa, class T>
double dot(const void* row, const double* query, std::size_t dim) {
    constexpr std::size_t parts = kLanes / Isa::kWideWidth;
    const T* x = static_cast<const T*>(row);
    typename Isa::Wide sums[parts];
#pragma GCC unroll 16
    for (std::size_t p = 0; p < parts; ++p) sums[p] = Isa::zero_wide();
    std::size_t i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
#pragma GCC unroll 16
        for (std::size_t p = 0; p < parts; ++p) {
            const std::size_t at = i + p * Isa::kWideWidth;
            sums[p] =
                Isa::add(sums[p], Isa::mul(Isa::load_wide(x + at), Isa::load_wide(query + at)));
        }
    }
    double lanes[kLanes];
#pragma GCC unroll 16
    for (std::size_t p = 0; p < parts; ++p) Isa::store(lanes + p * Isa::kWideWidth, sums[p]);
    for (std::size_t lane = 0; i + lane < dim; ++lane)
        lanes[lane] += widen(x[i + lane]) * query[i + lane];
    for (std::size_t half = kLanes / 2; half != 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    return lanes[0];
}

template <class Isa, class T>
void pack(const void* const* rows, const double* inv_norm, std::size_t dim, float* panel) {
    constexpr std::size_t side = 16;
    for (std::size_t first = 0; first < kBlockRows; first += side) {
        for (std::size_t i = 0; i < dim; i += side) {
            const std::size_t width = dim - i < side ? dim - i : side;
            alignas(64) float square[side][side];
            for (std::size_t r = 0; r < side; ++r) {
                const T* x = static_cast<const T*>(rows[first + r]) + i;
                const double scale = inv_norm[first + r];
                if (width == side) {
                    Isa::unit(x, scale, square[r]);
                } else {
                    for (std::size_t j = 0; j < width; ++j) {
                        square[r][j] = static_cast<float>(widen(x[j]) * scale);
                    }
                }
            }
            Isa::transpose(square, panel + i * kBlockRows + first, width);
        }
    }
}

// Steps whose products are summed in 16 bits; see Kernels::narrow_steps.
template <class Isa>
constexpr std::size_t narrow_steps = 1;

// Codes of one kind: how a tile starts, steps and ends.
template <class Isa>
struct IntCodes {
    using Sum = typename Isa::Ints;
    static constexpr std::size_t kTogether = narrow_steps<Isa>;
    static constexpr std::size_t kStepBytes = 4;
    static Sum start(const Sieve& sieve) { return Isa::start(sieve.offset); }
    static Sum load(const void* codes) { return Isa::load_ints(codes); }
    static Sum query(const void* code) { return Isa::splat(bits_to_int(code)); }
    static Sum step(Sum sum, Sum rows, Sum query) { return Isa::dot(sum, rows, query); }
    static typename Isa::Floats finish(Sum sum) { return Isa::to_floats(sum); }

  private:
    static std::int32_t bits_to_int(const void* code) {
        std::int32_t out;
        __builtin_memcpy(&out, code, sizeof(out));
        return out;
    }
};

template <class Isa>
struct FloatCodes {
    using Sum = typename Isa::Floats;
    static constexpr std::size_t kTogether = 1;
    static constexpr std::size_t kStepBytes = 4;
    static Sum start(const Sieve&) { return Isa::splat(0.0F); }
    static Sum load(const void* codes) { return Isa::load(static_cast<const float*>(codes)); }
    static Sum query(const void* code) { return Isa::splat(*static_cast<const float*>(code)); }
    static Sum step(Sum sum, Sum rows, Sum query) { return Isa::fma(rows, query, sum); }
    static Sum finish(Sum sum) { return sum; }
};

// What is the same for all queries of rows first ... first + kWidth * panels of a block.
template <class Isa, std::size_t panels>
struct Stretch {
    typename Isa::Floats scale[panels], error[panels];
    const std::uint32_t* positions;
    std::uint64_t mask;

    [[gnu::always_inline]] Stretch(const Block& block, std::size_t first)
        : positions(block.positions + first), mask(block.mask >> first) {
#pragma GCC unroll 8
        for (std::size_t p = 0; p < panels; ++p) {
            scale[p] = Isa::load(block.scale + first + p * Isa::kWidth);
            error[p] = Isa::load(block.error + first + p * Isa::kWidth);
        }
    }
};

// Keeps the rows whose bound, from their dot products with one query, reaches its floor. Returns
// whether the sieve now holds more than `limit`.
template <class Isa, std::size_t panels>
[[gnu::always_inline]] inline bool sift(const Stretch<Isa, panels>& rows,
                                        const typename Isa::Floats (&dots)[panels], Sieve& sieve,
                                        std::uint32_t limit) {
    const typename Isa::Floats slope = Isa::splat(sieve.slope);
    const typename Isa::Floats floor = Isa::splat(sieve.floor);
    typename Isa::Floats bounds[panels];
    std::uint64_t passed = 0;
#pragma GCC unroll 8
    for (std::size_t p = 0; p < panels; ++p) {
        bounds[p] = Isa::fma(dots[p], rows.scale[p], Isa::mul(slope, rows.error[p]));
        passed |= static_cast<std::uint64_t>(Isa::at_least(bounds[p], floor)) << (p * Isa::kWidth);
    }
    passed &= rows.mask;
    if (passed == 0) return false;
    std::uint32_t count = sieve.count;
#pragma GCC unroll 8
    for (std::size_t p = 0; p < panels; ++p) {
        const auto part =
            static_cast<std::uint32_t>(passed >> (p * Isa::kWidth)) & ((1U << Isa::kWidth) - 1);
        if (part == 0) continue;
        Isa::push(part, rows.positions + p * Isa::kWidth, bounds[p], sieve.rows + count,
                  sieve.bounds + count);
        count += static_cast<std::uint32_t>(__builtin_popcount(part));
    }
    sieve.count = count;
    return count > limit;
}

// Fetches the next block while this one is multiplied, evenly over the steps, for sets that read a
// block in a pattern which the hardware does not foresee: they would wait for memory most of the
// time.
class Ahead {
  public:
    Ahead(const Block& block, std::size_t steps)
        : at_(static_cast<const char*>(block.next)),
          left_((block.next_bytes + 63) / 64),
          share_((left_ + steps - 1) / steps) {}
    void step() {
        const std::size_t lines = left_ < share_ ? left_ : share_;
        for (std::size_t i = 0; i < lines; ++i, at_ += 64) __builtin_prefetch(at_, 0, 2);
        left_ -= lines;
    }

  private:
    const char* at_;
    std::size_t left_;   // cache lines
    std::size_t share_;  // lines a step
};

// Adds the products of some steps to the sums; of several, those of each lane in narrow integers
// first.
template <class Isa, class C, std::size_t Q, std::size_t kSteps>
[[gnu::always_inline]] inline void add_products(const char* codes, const char* query,
                                                typename C::Sum (&sums)[Q][Isa::kPanels]) {
    constexpr std::size_t panels = Isa::kPanels;
    typename C::Sum narrow[Q][panels];
#pragma GCC unroll 8
    for (std::size_t step = 0; step < kSteps; ++step) {
        typename C::Sum x[panels];
#pragma GCC unroll 8
        for (std::size_t p = 0; p < panels; ++p) {
            x[p] = C::load(codes + (step * kBlockRows + p * Isa::kWidth) * C::kStepBytes);
        }
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
            const typename C::Sum y = C::query(query + (step * Q + q) * C::kStepBytes);
#pragma GCC unroll 8
            for (std::size_t p = 0; p < panels; ++p) {
                if constexpr (kSteps == 1) {
                    sums[q][p] = C::step(sums[q][p], x[p], y);
                } else {
                    const typename C::Sum pairs = Isa::multiply(x[p], y);
                    narrow[q][p] = step == 0 ? pairs : Isa::add_narrow(narrow[q][p], pairs);
                }
            }
        }
    }
    if constexpr (kSteps > 1) {
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
#pragma GCC unroll 8
            for (std::size_t p = 0; p < panels; ++p) {
                sums[q][p] = Isa::add_wide(sums[q][p], narrow[q][p]);
            }
        }
    }
}

// All rows of a block against Q queries.
template <class Isa, template <class> class Codes, std::size_t Q>
bool filter_tile(const Block& block, const char* queries, std::size_t steps, Sieve* sieves,
                 std::uint32_t limit, Ahead& ahead) {
    using C = Codes<Isa>;
    constexpr std::size_t panels = Isa::kPanels;
    constexpr std::size_t rows = Isa::kWidth * panels;
    bool full = false;
    for (std::size_t first = 0; first < kBlockRows; first += rows) {
        const std::uint64_t wanted = block.mask >> first;
        if (rows < kBlockRows && (wanted & ((std::uint64_t{1} << (rows % 64)) - 1)) == 0) continue;
        typename C::Sum sums[Q][panels];
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
#pragma GCC unroll 8
            for (std::size_t p = 0; p < panels; ++p) sums[q][p] = C::start(sieves[q]);
        }
        const char* codes = static_cast<const char*>(block.codes) + first * C::kStepBytes;
        const char* query = queries;
        const auto advance = [&](std::size_t taken) {
            codes += taken * kBlockRows * C::kStepBytes;
            query += taken * Q * C::kStepBytes;
        };
        std::size_t left = steps;
        for (; left >= C::kTogether; left -= C::kTogether, advance(C::kTogether)) {
            // By AVX2 alone, the set that also sums narrowly: for the others nobody measured it.
            if constexpr (C::kTogether > 1) ahead.step();
            add_products<Isa, C, Q, C::kTogether>(codes, query, sums);
        }
        for (; left != 0; --left, advance(1)) add_products<Isa, C, Q, 1>(codes, query, sums);
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
            typename Isa::Floats dots[panels];
#pragma GCC unroll 8
            for (std::size_t p = 0; p < panels; ++p) dots[p] = C::finish(sums[q][p]);
            const Stretch<Isa, panels> stretch(block, first);
            full |= sift(stretch, dots, sieves[q], limit);
        }
    }
    return full;
}

template <class Isa, template <class> class Codes, std::size_t Q>
bool filter_last(const Block& block, const char* queries, std::size_t steps, Sieve* sieves,
                 std::size_t count, std::uint32_t limit, Ahead& ahead) {
    if constexpr (Q > 0) {
        if (count == Q)
            return filter_tile<Isa, Codes, Q>(block, queries, steps, sieves, limit, ahead);
        return filter_last<Isa, Codes, Q - 1>(block, queries, steps, sieves, count, limit, ahead);
    }
    return false;
}

template <class Isa, template <class> class Codes>
bool filter(const Block& block, const void* queries, std::size_t steps, Sieve* sieves,
            std::size_t count, std::uint32_t limit) {
    constexpr std::size_t tile = Isa::kTile;
    const char* codes = static_cast<const char*>(queries);
    constexpr std::size_t stretches = kBlockRows / (Isa::kWidth * Isa::kPanels);
    const std::size_t groups = (steps + Codes<Isa>::kTogether - 1) / Codes<Isa>::kTogether;
    Ahead ahead(block, (count + tile - 1) / tile * stretches * groups);
    bool full = false;
    for (; count >= tile; count -= tile) {
        full |= filter_tile<Isa, Codes, tile>(block, codes, steps, sieves, limit, ahead);
        codes += tile * steps * Codes<Isa>::kStepBytes;
        sieves += tile;
    }
    full |= filter_last<Isa, Codes, tile - 1>(block, codes, steps, sieves, count, limit, ahead);
    return full;
}

// Survivors one by one, for sets that cannot compress a vector.
template <class Isa>
[[maybe_unused]] void push_each(std::uint32_t passed, const std::uint32_t* positions,
                                typename Isa::Floats bounds, std::uint32_t* rows, float* out) {
    float values[Isa::kWidth];
    Isa::store(values, bounds);
    for (; passed != 0; passed &= passed - 1) {
        const int lane = __builtin_ctz(passed);
        *rows++ = positions[lane];
        *out++ = values[lane];
    }
}

// out[j * 64 + r] = square[r][j]
[[maybe_unused]] void transpose_each(const float (&square)[16][16], float* out, std::size_t width) {
    for (std::size_t j = 0; j < width; ++j) {
        for (std::size_t r = 0; r < 16; ++r) out[j * kBlockRows + r] = square[r][j];
    }
}

template <class Isa>
constexpr Kernels make_kernels(const char* name, bool fast_int8) {
    return {
        .name = name,
        .int8_tile = Isa::kTile,
        .int8_group = 4,
        .float_tile = Isa::kTile,
        .narrow_steps = narrow_steps<Isa>,
        .fast_int8 = fast_int8,
        .filter_int8 = filter<Isa, IntCodes>,
        .filter_float = filter<Isa, FloatCodes>,
        .dot = {dot<Isa, float>, dot<Isa, Half>, dot<Isa, Brain>, dot<Isa, double>},
        .pack = {pack<Isa, float>, pack<Isa, Half>, pack<Isa, Brain>, pack<Isa, double>},
        .few = nullptr,
        .few_queries = 0,
    };
}

}  // namespace
}  // namespace robustft::knn
