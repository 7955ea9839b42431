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

inline F vmax(F a, F b) { return _mm512_max_ps(a, b); }
inline F vmin(F a, F b) { return _mm512_min_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F round_even(F x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
inline F select_greater(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}
inline bool any_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ) != 0; }

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

#include "isa/token_stats_rows.inc"

const Kernels kernels = ROBUSTFT_TOKEN_STATS_KERNELS("avx512");

}  // namespace

const Kernels* const kernels_avx512 = &kernels;

}  // namespace robustft::token_stats

#else
namespace robustft::token_stats {
const Kernels* const kernels_avx512 = nullptr;
}
#endif
