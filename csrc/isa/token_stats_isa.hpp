// What token_stats.cpp and the per-instruction-set files share: plain data, no inline code, so that
// nothing compiled for a newer instruction set can be linked into a baseline function.
#pragma once

#include <cstdint>

namespace robustft::token_stats {

struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

// z = softcap(x) / temperature, in the form the kernels need it.
struct RowTransform {
    float rate;         // log2(e) / temperature
    float cap;          // soft cap, used only by the capped kernels
    float inverse_cap;  // 1 / cap
};

struct RowTask {
    const void* row;     // [vocab] contiguous, of the kernel's element type
    std::int64_t vocab;  // at least 1
    RowTransform transform;
    bool has_target;
    std::int64_t target;  // column of the target; outside [0, vocab) when another shard holds it
    float target_logit;
};

// One row, or one shard of it. `max`, `second` and `target` are logits as given, before the
// transform z(x); the sums are relative to z(max).
struct RowPartial {
    double max;       // largest logit; NaN entries are passed over here and show in `sum`
    double second;    // second largest (equal to max on a tie), -inf if there is none
    double sum;       // S = sum exp(z - z(max)); NaN if the row holds NaN, +inf if it holds +inf
    double weighted;  // T = sum exp(z - z(max)) * (z - z(max))
    double target;    // the target's logit
    std::int64_t argmax;  // first column that holds max
    std::int64_t rank;    // columns before the target in (logit descending, column ascending) order
};

struct BackwardTask {
    const void* row;  // [vocab]
    void* out;        // [vocab] of the same type; may be `row`
    std::int64_t vocab;
    RowTransform transform;
    float max;    // largest logit of the row, finite
    float scale;  // 1 / temperature
    float a, b;   // out[j] = slope * e * (a + b * d), e = 2^d, d = log2(e) * (z - z(max))
};

using PartialFunction = void (*)(const RowTask&, RowPartial*);
using BackwardFunction = void (*)(const BackwardTask&);

struct Kernels {
    const char* name;
    PartialFunction partial[3][2];    // [f32, bf16, f16][capped]
    BackwardFunction backward[3][2];  // [f32, bf16, f16][capped]
    float (*widen[3])(const void*);   // one element, exact
    void (*narrow[3])(float, void*);  // one element, rounded to nearest even
};

// Null where the file was not compiled for its instruction set.
extern const Kernels* const kernels_avx512;
extern const Kernels* const kernels_avx2;
extern const Kernels* const kernels_neon;
extern const Kernels* const kernels_portable;

}  // namespace robustft::token_stats
