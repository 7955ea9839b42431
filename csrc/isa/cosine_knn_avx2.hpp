// The vector operations that AVX2 and AVX-VNNI share; the dot product of bytes is the derived
// class's own.
#pragma once

#include <immintrin.h>

#include "isa/cosine_knn_impl.hpp"

namespace robustft::knn {
namespace {

struct Avx2 {
    static constexpr std::size_t kWidth = 8, kPanels = 2, kWideWidth = 4;
    using Ints = __m256i;
    using Floats = __m256;
    using Wide = __m256d;

    static Ints splat(std::int32_t x) { return _mm256_set1_epi32(x); }
    static Floats splat(float x) { return _mm256_set1_ps(x); }
    static Ints start(std::int32_t offset) { return splat(offset); }
    static Ints load_ints(const void* codes) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(codes));
    }
    static Floats load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* out, Floats x) { _mm256_storeu_ps(out, x); }

    static Floats to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static std::uint32_t at_least(Floats x, Floats floor) {
        return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x, floor, _CMP_GE_OQ)));
    }
    static void push(std::uint32_t passed, const std::uint32_t* positions, Floats bounds,
                     std::uint32_t* rows, float* out) {
        push_each<Avx2>(passed, positions, bounds, rows, out);
    }

    static Wide zero_wide() { return _mm256_setzero_pd(); }
    static Wide load_wide(const double* x) { return _mm256_loadu_pd(x); }
    static Wide load_wide(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }
    static Wide load_wide(const Half* x) {
        return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
    }
    static Wide load_wide(const Brain* x) {
        const __m128i bits =
            _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
        return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
    }
    static Wide add(Wide a, Wide b) { return _mm256_add_pd(a, b); }
    static Wide mul(Wide a, Wide b) { return _mm256_mul_pd(a, b); }
    static void store(double* out, Wide x) { _mm256_storeu_pd(out, x); }

    template <class T>
    static void unit(const T* x, double scale, float* out) {
        const Wide factor = _mm256_set1_pd(scale);
        for (std::size_t i = 0; i < 16; i += 4) {
            _mm_store_ps(out + i, _mm256_cvtpd_ps(mul(load_wide(x + i), factor)));
        }
    }
    static void transpose(const float (&square)[16][16], float* out, std::size_t width) {
        transpose_each(square, out, width);
    }
};

}  // namespace
}  // namespace robustft::knn
