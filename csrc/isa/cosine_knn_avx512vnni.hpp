// The vector operations of AVX-512 with VNNI: 64 products of bytes an instruction.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "isa/cosine_knn_impl.hpp"

namespace robustft::knn {
namespace {

struct Avx512Vnni {
    static constexpr std::size_t kWidth = 16, kPanels = 4, kTile = 6, kWideWidth = 8;
    using Ints = __m512i;
    using Floats = __m512;
    using Wide = __m512d;

    static Ints splat(std::int32_t x) { return _mm512_set1_epi32(x); }
    static Floats splat(float x) { return _mm512_set1_ps(x); }
    static Ints start(std::int32_t offset) { return splat(offset); }
    static Ints load_ints(const void* codes) { return _mm512_loadu_si512(codes); }
    static Floats load(const float* x) { return _mm512_loadu_ps(x); }

    // Not the intrinsic: GCC 12 then copies and spills every accumulator, at half the speed.
    static Ints dot(Ints sum, Ints rows, Ints query) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(rows), "v"(query));
        return sum;
    }
    static Floats to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static std::uint32_t at_least(Floats x, Floats floor) {
        return _mm512_cmp_ps_mask(x, floor, _CMP_GE_OQ);
    }
    // A compressing store to memory is microcoded on Zen: compress in a register, store it whole.
    static void push(std::uint32_t passed, const std::uint32_t* positions, Floats bounds,
                     std::uint32_t* rows, float* out) {
        const auto mask = static_cast<__mmask16>(passed);
        _mm512_storeu_si512(rows, _mm512_maskz_compress_epi32(mask, _mm512_loadu_si512(positions)));
        _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, bounds));
    }

    static Wide zero_wide() { return _mm512_setzero_pd(); }
    static Wide load_wide(const double* x) { return _mm512_loadu_pd(x); }
    static Wide load_wide(const float* x) { return _mm512_cvtps_pd(_mm256_loadu_ps(x)); }
    static Wide load_wide(const Half* x) {
        return _mm512_cvtps_pd(
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
    }
    static Wide load_wide(const Brain* x) {
        const __m256i bits =
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
    }
    static Wide add(Wide a, Wide b) { return _mm512_add_pd(a, b); }
    static Wide mul(Wide a, Wide b) { return _mm512_mul_pd(a, b); }
    static void store(double* out, Wide x) { _mm512_storeu_pd(out, x); }

    template <class T>
    static void unit(const T* x, double scale, float* out) {
        const Wide factor = _mm512_set1_pd(scale);
        _mm256_store_ps(out, _mm512_cvtpd_ps(mul(load_wide(x), factor)));
        _mm256_store_ps(out + 8, _mm512_cvtpd_ps(mul(load_wide(x + 8), factor)));
    }

    static void transpose(const float (&square)[16][16], float* out, std::size_t width) {
        __m512 a[16];
        __m512 b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) a[i] = _mm512_load_ps(square[i]);
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4) {
            a[i] = pairs<0x00>(b[i], b[i + 2]);
            a[i + 1] = pairs<0xff>(b[i], b[i + 2]);
            a[i + 2] = pairs<0x00>(b[i + 1], b[i + 3]);
            a[i + 3] = pairs<0xff>(b[i + 1], b[i + 3]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
            b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
            b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
            b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
            a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        }
#pragma GCC unroll 16
        for (std::size_t i = 0; i < 16; ++i) {
            if (i < width) _mm512_storeu_ps(out + i * kBlockRows, a[i]);
        }
    }

  private:
    template <int Control>
    static __m512 pairs(__m512 a, __m512 b) {
        return _mm512_castpd_ps(Control == 0
                                    ? _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))
                                    : _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
    }
};

}  // namespace
}  // namespace robustft::knn
