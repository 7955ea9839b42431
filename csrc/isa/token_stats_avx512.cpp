// 512-bit row kernels (AVX-512 F, BW, DQ, VL).
#include "isa/token_stats_isa.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 blames its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace robustft::token_stats {
namespace {

constexpr int width = 16;
constexpr int registers = 32;
constexpr bool fused = true;
using F = __m512;
using Count = __m512i;

inline F splat(float x) { return _mm512_set1_ps(x); }

inline __m256i load_halves(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p)), 16));
}
inline F load(const f16* p) { return _mm512_cvtph_ps(load_halves(p)); }

inline __m512i load_pairs(const void* p) { return _mm512_loadu_si512(p); }

inline void load_step(const float* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}
inline void load_step(const bf16* p, F* a, F* b) {  // even and odd entries: one instruction each
    const __m512i both = load_pairs(p);
    *a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-0x10000)));
}
inline void load_step(const f16* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}

inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline void store(bf16* p, F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i out = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    out = _mm512_srli_epi32(out, 16);  // rounded to nearest even; a NaN keeps its top bits
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    out = _mm512_mask_or_epi32(out, nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
inline void store(f16* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void lanes(F v, float* out) { _mm512_storeu_ps(out, v); }
inline float largest(F v) { return _mm512_reduce_max_ps(v); }

inline F vmax(F a, F b) { return _mm512_max_ps(a, b); }
inline F vmin(F a, F b) { return _mm512_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F select_greater(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
inline bool any_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0; }
inline bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

inline Count zero_count() { return _mm512_setzero_si512(); }
inline Count add_where(Count c, __mmask16 mask) {
    return _mm512_mask_add_epi32(c, mask, c, _mm512_set1_epi32(1));
}
inline Count count_greater(Count c, F a, F b) {
    return add_where(c, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ));
}
inline Count count_greater_equal(Count c, F a, F b) {
    return add_where(c, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ));
}
inline Count count_equal(Count c, F a, F b) {
    return add_where(c, _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ));
}
inline std::int64_t total(Count c) { return _mm512_reduce_add_epi32(c); }

// 2^x for x in [-125, 128), relative error at most 1.8e-7, exact at integers: with x rounded down
// to k / 32, a table in two registers for 2^(k / 32) and a parabola for the rest. Seven
// instructions, where a polynomial alone takes twelve.
inline F exp2_vector(F x) {
    const __m512i low =
        _mm512_setr_epi32(0x3F800000, 0x3F82CD87, 0x3F85AAC3, 0x3F88980F, 0x3F8B95C2, 0x3F8EA43A,
                          0x3F91C3D3, 0x3F94F4F0, 0x3F9837F0, 0x3F9B8D3A, 0x3F9EF532, 0x3FA27043,
                          0x3FA5FED7, 0x3FA9A15B, 0x3FAD583F, 0x3FB123F6);
    const __m512i high =
        _mm512_setr_epi32(0x3FB504F3, 0x3FB8FBAF, 0x3FBD08A4, 0x3FC12C4D, 0x3FC5672A, 0x3FC9B9BE,
                          0x3FCE248C, 0x3FD2A81E, 0x3FD744FD, 0x3FDBFBB8, 0x3FE0CCDF, 0x3FE5B907,
                          0x3FEAC0C7, 0x3FEFE4BA, 0x3FF5257D, 0x3FFA83B3);
    constexpr int down = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    // A float near 1.5 * 2^18 counts in steps of 1/32: its last five bits are k modulo 32.
    const __m512i k = _mm512_castps_si512(_mm512_add_round_ps(x, splat(393216.0F), down));
    const F f = _mm512_reduce_ps(x, 5 << 4 | down);
    const F root = _mm512_castsi512_ps(_mm512_permutex2var_epi32(low, k, high));
    const F scaled = _mm512_scalef_ps(root, x);  // by 2^floor(x)
    const F p = fma(splat(0.24274401366710663F), f, splat(0.6931212544441223F));
    return fma(scaled * f, p, scaled);
}
#define ROBUSTFT_OWN_EXP2

#include "isa/token_stats_rows.inc"

// Halves are compared as integers, 32 at a time. Bits with the sign clear are in order, those with
// the sign set in reverse order, and NaN stands beyond the infinities.
template <class T>
struct HalfSearch {
    __m512i signed_max = _mm512_set1_epi16(-0x8000), unsigned_min = _mm512_set1_epi16(-1);

    void take(const T* x) {
        const __m512i bits = load_pairs(x);
        signed_max = _mm512_max_epi16(signed_max, bits);
        unsigned_min = _mm512_min_epu16(unsigned_min, bits);
    }

    float maximum(const T* x, int n) const {
        std::int16_t positive[2 * width];
        std::uint16_t negative[2 * width];
        _mm512_storeu_si512(positive, signed_max);
        _mm512_storeu_si512(negative, unsigned_min);
        std::int16_t top = -1;
        std::uint16_t low = 0xFFFF;
        for (const std::int16_t lane : positive) top = lane > top ? lane : top;
        for (const std::uint16_t lane : negative) low = lane < low ? lane : low;
        const T bits{top >= 0 ? static_cast<std::uint16_t>(top) : low};
        const float value = widen<T>(&bits);
        if (value == value) return value;
        FloatSearch<T> again;  // a NaN hides the maximum
        for (int i = 0; i < n; i += step) again.take(x + i);
        return again.maximum(x, n);
    }

    template <bool Ties>
    static std::int64_t count(const T* x, int n, float level) {
        T nearest;
        narrow<T>(level, &nearest);
        if (widen<T>(&nearest) != level) return FloatSearch<T>::template count<Ties>(x, n, level);
        if (level == 0) nearest.bits = Ties ? 0x8000 : 0;  // both zeros are one
        const __m512i limit = _mm512_set1_epi16(static_cast<std::int16_t>(nearest.bits));
        if (nearest.bits >= 0x8000) {
            return count_bits(x, n, [limit](__m512i v) {
                return Ties ? _mm512_cmple_epu16_mask(v, limit) : _mm512_cmplt_epu16_mask(v, limit);
            });
        }
        return count_bits(x, n, [limit](__m512i v) {
            return Ties ? _mm512_cmpge_epi16_mask(v, limit) : _mm512_cmpgt_epi16_mask(v, limit);
        });
    }

  private:
    template <class Above>
    static std::int64_t count_bits(const T* x, int n, Above&& above) {
        const __m512i one = _mm512_set1_epi16(1);
        __m512i count = _mm512_setzero_si512();
        for (int i = 0; i < n; i += step) {
            count = _mm512_mask_add_epi16(count, above(load_pairs(x + i)), count, one);
        }
        return _mm512_reduce_add_epi32(_mm512_madd_epi16(count, one));
    }
};

template <>
struct Search<bf16> : HalfSearch<bf16> {};
template <>
struct Search<f16> : HalfSearch<f16> {};

const Kernels kernels = ROBUSTFT_TOKEN_STATS_KERNELS("avx512");

}  // namespace

const Kernels* const kernels_avx512 = &kernels;

}  // namespace robustft::token_stats

#else
namespace robustft::token_stats {
const Kernels* const kernels_avx512 = nullptr;
}
#endif
