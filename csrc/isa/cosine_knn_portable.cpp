// The path that runs everywhere: plain C++ that a compiler may vectorise for its baseline.
#include "isa/cosine_knn_impl.hpp"

namespace robustft::knn {
namespace {

struct Isa {
    static constexpr std::size_t kWidth = 4, kPanels = 4, kTile = 2, kWideWidth = 2;
    struct Ints {
        std::int32_t lane[kWidth];
    };
    struct Floats {
        float lane[kWidth];
    };
    struct Wide {
        double lane[kWideWidth];
    };

    static Ints splat(std::int32_t x) { return {{x, x, x, x}}; }
    static Floats splat(float x) { return {{x, x, x, x}}; }
    static Ints start(std::int32_t offset) { return splat(offset); }
    static Ints load_ints(const void* codes) {
        Ints out;
        __builtin_memcpy(&out, codes, sizeof(out));
        return out;
    }
    static Floats load(const float* x) { return {{x[0], x[1], x[2], x[3]}}; }
    static void store(float* out, Floats x) { __builtin_memcpy(out, &x, sizeof(x)); }

    static Ints dot(Ints sum, Ints rows, Ints query) {
        for (std::size_t lane = 0; lane < kWidth; ++lane) {
            std::uint8_t x[4];
            std::int8_t y[4];
            __builtin_memcpy(x, &rows.lane[lane], 4);
            __builtin_memcpy(y, &query.lane[lane], 4);
            sum.lane[lane] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
        return sum;
    }
    static Floats to_floats(Ints x) {
        Floats out;
        for (std::size_t i = 0; i < kWidth; ++i) out.lane[i] = static_cast<float>(x.lane[i]);
        return out;
    }
    static Floats mul(Floats a, Floats b) {
        for (std::size_t i = 0; i < kWidth; ++i) a.lane[i] *= b.lane[i];
        return a;
    }
    static Floats fma(Floats a, Floats b, Floats c) {
        for (std::size_t i = 0; i < kWidth; ++i) c.lane[i] += a.lane[i] * b.lane[i];
        return c;
    }
    static std::uint32_t at_least(Floats x, Floats floor) {
        std::uint32_t out = 0;
        for (std::size_t i = 0; i < kWidth; ++i) {
            out |= static_cast<std::uint32_t>(x.lane[i] >= floor.lane[i]) << i;
        }
        return out;
    }
    static void push(std::uint32_t passed, const std::uint32_t* positions, Floats bounds,
                     std::uint32_t* rows, float* out) {
        push_each<Isa>(passed, positions, bounds, rows, out);
    }

    static Wide zero_wide() { return {{0, 0}}; }
    template <class T>
    static Wide load_wide(const T* x) {
        return {{widen(x[0]), widen(x[1])}};
    }
    static Wide add(Wide a, Wide b) { return {{a.lane[0] + b.lane[0], a.lane[1] + b.lane[1]}}; }
    static Wide mul(Wide a, Wide b) { return {{a.lane[0] * b.lane[0], a.lane[1] * b.lane[1]}}; }
    static void store(double* out, Wide x) { __builtin_memcpy(out, &x, sizeof(x)); }

    template <class T>
    static void unit(const T* x, double scale, float* out) {
        for (std::size_t i = 0; i < 16; ++i) out[i] = static_cast<float>(widen(x[i]) * scale);
    }
    static void transpose(const float (&square)[16][16], float* out, std::size_t width) {
        transpose_each(square, out, width);
    }
};

}  // namespace

const Kernels kPortable = make_kernels<Isa>("portable", false);

}  // namespace robustft::knn
