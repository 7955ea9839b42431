// 128-bit row kernels (NEON, part of every AArch64).
#include "isa/token_stats_isa.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace robustft::token_stats {
namespace {

constexpr int width = 4;
constexpr int registers = 32;
constexpr bool fused = true;
using F = float32x4_t;
using Count = uint32x4_t;

inline F splat(float x) { return vdupq_n_f32(x); }

inline F load(const float* p) { return vld1q_f32(p); }
inline uint16x4_t load_halves(const void* p) {
    return vld1_u16(static_cast<const std::uint16_t*>(p));
}
inline F load(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_halves(p), 16)); }
inline F load(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_halves(p))); }

template <class T>
void load_step(const T* p, F* a, F* b) {
    *a = load(p);
    *b = load(p + width);
}

inline void store(float* p, F v) { vst1q_f32(p, v); }
inline void store(bf16* p, F v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    uint32x4_t out = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    out = vshrq_n_u32(out, 16);  // rounded to nearest even; a NaN keeps its top bits
    out = vbslq_u32(vceqq_f32(v, v), out, vorrq_u32(high, vdupq_n_u32(0x40)));
    vst1_u16(reinterpret_cast<std::uint16_t*>(p), vmovn_u32(out));
}
inline void store(f16* p, F v) {
    vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline void lanes(F v, float* out) { vst1q_f32(out, v); }
inline float largest(F v) { return vmaxvq_f32(v); }

// The second argument where either is NaN, as on x86.
inline F vmax(F a, F b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline F vmin(F a, F b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F round_even(F x) { return vrndnq_f32(x); }
inline F scale2(F p, F n) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
}
inline F select_greater(F a, F b, F x, F y) { return vbslq_f32(vcgtq_f32(a, b), x, y); }
inline bool any_equal(F a, F b) { return vmaxvq_u32(vceqq_f32(a, b)) != 0; }
inline bool any_greater(F a, F b) { return vmaxvq_u32(vcgtq_f32(a, b)) != 0; }

inline Count zero_count() { return vdupq_n_u32(0); }
inline Count count_greater(Count c, F a, F b) { return vsubq_u32(c, vcgtq_f32(a, b)); }
inline Count count_greater_equal(Count c, F a, F b) { return vsubq_u32(c, vcgeq_f32(a, b)); }
inline Count count_equal(Count c, F a, F b) { return vsubq_u32(c, vceqq_f32(a, b)); }
inline std::int64_t total(Count c) { return vaddvq_u32(c); }

#include "isa/token_stats_rows.inc"

const Kernels kernels = ROBUSTFT_TOKEN_STATS_KERNELS("neon");

}  // namespace

const Kernels* const kernels_neon = &kernels;

}  // namespace robustft::token_stats

#else
namespace robustft::token_stats {
const Kernels* const kernels_neon = nullptr;
}
#endif
