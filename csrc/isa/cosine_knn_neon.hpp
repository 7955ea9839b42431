// The vector operations that all 64-bit Arm cores share; the dot product of bytes is the derived
// class's own.
#pragma once

#include <arm_neon.h>

#include "isa/cosine_knn_impl.hpp"

namespace robustft::knn {
namespace {

struct Neon {
    static constexpr std::size_t kWidth = 4, kPanels = 4, kTile = 4, kWideWidth = 2;
    using Ints = int32x4_t;
    using Floats = float32x4_t;
    using Wide = float64x2_t;

    static Ints splat(std::int32_t x) { return vdupq_n_s32(x); }
    static Floats splat(float x) { return vdupq_n_f32(x); }
    // Rows' codes are made signed again, so that no offset is needed.
    static Ints start(std::int32_t) { return vdupq_n_s32(0); }
    static Ints load_ints(const void* codes) {
        const uint8x16_t raised = vld1q_u8(static_cast<const std::uint8_t*>(codes));
        return vreinterpretq_s32_u8(veorq_u8(raised, vdupq_n_u8(0x80)));
    }
    static Floats load(const float* x) { return vld1q_f32(x); }
    static void store(float* out, Floats x) { vst1q_f32(out, x); }

    static Floats to_floats(Ints x) { return vcvtq_f32_s32(x); }
    static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
    static std::uint32_t at_least(Floats x, Floats floor) {
        constexpr std::uint32_t bits[kWidth] = {1, 2, 4, 8};
        return vaddvq_u32(vandq_u32(vcgeq_f32(x, floor), vld1q_u32(bits)));
    }
    static void push(std::uint32_t passed, const std::uint32_t* positions, Floats bounds,
                     std::uint32_t* rows, float* out) {
        push_each<Neon>(passed, positions, bounds, rows, out);
    }

    static Wide zero_wide() { return vdupq_n_f64(0); }
    static Wide load_wide(const double* x) { return vld1q_f64(x); }
    static Wide load_wide(const float* x) { return vcvt_f64_f32(vld1_f32(x)); }
    template <class T>
    static Wide load_wide(const T* x) {  // half precision
        const double wide[kWideWidth] = {widen(x[0]), widen(x[1])};
        return vld1q_f64(wide);
    }
    static Wide add(Wide a, Wide b) { return vaddq_f64(a, b); }
    static Wide mul(Wide a, Wide b) { return vmulq_f64(a, b); }
    static void store(double* out, Wide x) { vst1q_f64(out, x); }

    template <class T>
    static void unit(const T* x, double scale, float* out) {
        const Wide factor = vdupq_n_f64(scale);
        for (std::size_t i = 0; i < 16; i += kWideWidth) {
            vst1_f32(out + i, vcvt_f32_f64(mul(load_wide(x + i), factor)));
        }
    }
    static void transpose(const float (&square)[16][16], float* out, std::size_t width) {
        transpose_each(square, out, width);
    }
};

}  // namespace
}  // namespace robustft::knn
