// The baseline: 128-bit vectors in the compiler's own notation, which become SSE2 on x86-64 and
// NEON on AArch64.
#include "isa/token_stats_isa.hpp"

namespace robustft::token_stats {
namespace {

constexpr int width = 4;
constexpr int registers = 16;
constexpr bool fused = false;
using F = float __attribute__((vector_size(16)));
using Count = std::int32_t __attribute__((vector_size(16)));
using Bits = std::uint32_t __attribute__((vector_size(16)));

inline F splat(float x) { return F{x, x, x, x}; }

inline F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, F v) { __builtin_memcpy(p, &v, sizeof v); }
inline void lanes(F v, float* out) { store(out, v); }
inline float largest(F v) {
    float out[width];
    lanes(v, out);
    float max = out[0];
    for (const float lane : out) max = lane > max ? lane : max;
    return max;
}

inline Bits as_bits(F v) {
    Bits b;
    __builtin_memcpy(&b, &v, sizeof b);
    return b;
}
inline F as_float(Bits b) {
    F v;
    __builtin_memcpy(&v, &b, sizeof v);
    return v;
}
inline Bits load_halves(const std::uint16_t* h) { return Bits{h[0], h[1], h[2], h[3]}; }

inline F load(const bf16* p) {
    std::uint16_t h[width];
    __builtin_memcpy(h, p, sizeof h);
    return as_float(load_halves(h) << 16);
}

inline void store(bf16* p, F v) {
    const Bits bits = as_bits(v);
    // Round to nearest even; a NaN keeps its top bits and stays one.
    const Bits rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const Bits nan = (bits >> 16) | 0x40U;
    const Bits out = v == v ? rounded : nan;
    for (int i = 0; i < width; ++i) p[i].bits = static_cast<std::uint16_t>(out[i]);
}

inline F load(const f16* p) {
    std::uint16_t h[width];
    __builtin_memcpy(h, p, sizeof h);
    const Bits half = load_halves(h);
    const Bits sign = (half & 0x8000U) << 16, rest = half & 0x7FFFU;
    // Shift the exponent into place and rescale by 2^112; the multiplication makes subnormals
    // right.
    const F scaled = as_float(rest << 13) * splat(5.192296858534828e33F);
    const Bits special = (rest << 13) | 0x7F800000U;
    return as_float((rest >= 0x7C00U ? special : as_bits(scaled)) | sign);
}

inline void store(f16* p, F v) {
    for (int i = 0; i < width; ++i) {
        const std::uint32_t bits = as_bits(v)[i], sign = bits >> 16 & 0x8000U;
        const std::uint32_t size = bits & 0x7FFFFFFFU;
        std::uint32_t half;
        if (size > 0x7F800000U) {
            half = 0x7E00U;
        } else if (size >= 0x477FF000U) {
            half = 0x7C00U;
        } else if (size < 0x38800000U) {  // subnormal: adding 0.5 rounds at the right bit
            float f;
            __builtin_memcpy(&f, &size, sizeof f);
            f += 0.5F;
            std::uint32_t raised;
            __builtin_memcpy(&raised, &f, sizeof raised);
            half = raised - 0x3F000000U;
        } else {
            half = (size - 0x38000000U + 0xFFFU + (size >> 13 & 1U)) >> 13;
        }
        p[i].bits = static_cast<std::uint16_t>(half | sign);
    }
}

template <class T>
void load_step(const T* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}

// Second argument when either is NaN, as on x86.
inline F vmax(F a, F b) { return a > b ? a : b; }
inline F vmin(F a, F b) { return a < b ? a : b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F round_even(F x) { return (x + splat(12582912.0F)) - splat(12582912.0F); }
inline F scale2(F p, F n) { return as_float(as_bits(p) + (as_bits(n + splat(12582912.0F)) << 23)); }
inline F select_greater(F a, F b, F x, F y) { return a > b ? x : y; }
inline bool any(Count c) { return (c[0] | c[1] | c[2] | c[3]) != 0; }
inline bool any_equal(F a, F b) { return any(a == b); }
inline bool any_greater(F a, F b) { return any(a > b); }

inline Count zero_count() { return Count{0, 0, 0, 0}; }
inline Count count_greater(Count c, F a, F b) { return c - (a > b); }
inline Count count_greater_equal(Count c, F a, F b) { return c - (a >= b); }
inline Count count_equal(Count c, F a, F b) { return c - (a == b); }
inline std::int64_t total(Count c) { return std::int64_t{c[0]} + c[1] + c[2] + c[3]; }

#include "isa/token_stats_rows.inc"

const Kernels kernels = ROBUSTFT_TOKEN_STATS_KERNELS("portable");

}  // namespace

const Kernels* const kernels_portable = &kernels;

}  // namespace robustft::token_stats
