// 256-bit row kernels (AVX2, FMA, F16C).
#include "isa/token_stats_isa.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace robustft::token_stats {
namespace {

constexpr int width = 8;
constexpr int registers = 16;
constexpr bool fused = true;
using F = __m256;
using Count = __m256i;

inline F splat(float x) { return _mm256_set1_ps(x); }

inline __m128i load_halves(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
inline F load(const f16* p) { return _mm256_cvtph_ps(load_halves(p)); }

inline void load_step(const float* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}
inline void load_step(const bf16* p, F* a, F* b) {  // even and odd entries: one instruction each
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    *a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-0x10000)));
}
inline void load_step(const f16* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}

inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline void store(bf16* p, F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i out = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    out = _mm256_srli_epi32(out, 16);  // rounded to nearest even; a NaN keeps its top bits
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    out = _mm256_blendv_epi8(out, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x88);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(f16* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void lanes(F v, float* out) { _mm256_storeu_ps(out, v); }
inline float largest(F v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline F vmax(F a, F b) { return _mm256_max_ps(a, b); }
inline F vmin(F a, F b) { return _mm256_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F round_even(F x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F scale2(F p, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
inline F select_greater(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline bool any_equal(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)) != 0; }
inline bool any_greater(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

inline Count zero_count() { return _mm256_setzero_si256(); }
inline Count add_where(Count c, F mask) { return _mm256_sub_epi32(c, _mm256_castps_si256(mask)); }
inline Count count_greater(Count c, F a, F b) {
    return add_where(c, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
inline Count count_greater_equal(Count c, F a, F b) {
    return add_where(c, _mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
inline Count count_equal(Count c, F a, F b) {
    return add_where(c, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
inline std::int64_t total(Count c) {
    std::int32_t out[width];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), c);
    std::int64_t sum = 0;
    for (const std::int32_t lane : out) sum += lane;
    return sum;
}

#include "isa/token_stats_rows.inc"

const Kernels kernels = ROBUSTFT_TOKEN_STATS_KERNELS("avx2");

}  // namespace

const Kernels* const kernels_avx2 = &kernels;

}  // namespace robustft::token_stats

#else
namespace robustft::token_stats {
const Kernels* const kernels_avx2 = nullptr;
}
#endif
