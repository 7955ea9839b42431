// Token statistics of next-token logits on the CPU: one pass over each row, any instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "isa/token_stats_isa.hpp"

namespace robustft::token_stats {

enum class Type { f32, bf16, f16, f64 };

// [outer, inner, vocab], unit stride in vocab, any other strides (counted in elements).
struct Logits {
    const void* data;
    Type type;
    std::int64_t outer, inner, vocab;
    std::int64_t outer_stride, inner_stride;

    std::int64_t rows() const { return outer * inner; }
    const void* row(std::int64_t index) const;
};

struct Options {
    double temperature = 1;  // finite, above 0
    double softcap = 0;      // 0: none
    std::int64_t ignore_index = -100;
    unsigned threads = 1;
    std::string isa;  // empty: the best this CPU has
};

// [rows] each. Real is float, or double for f64 logits; everything in nats.
template <class Real>
struct Stats {
    Real *entropy, *logprob, *logsumexp, *max_logprob, *margin;
    std::int64_t *argmax, *rank;
};

// [rows] each, see RowPartial; the target's logit is the caller's own.
template <class Real>
struct Partials {
    Real *max, *second, *sum, *weighted;
    std::int64_t *argmax, *rank;
};

// Cotangents [rows] (null: zero) and what the forward pass returned [rows].
template <class Real>
struct Gradients {
    const Real *entropy, *logprob, *logsumexp, *max_logprob;
    const Real *forward_entropy, *forward_max_logprob;
    const std::int64_t* forward_argmax;
};

// Names of the instruction sets this CPU can run, best first.
std::vector<std::string> available();

// targets [rows] or null. Throws std::invalid_argument for a target that is neither a column nor
// ignore_index, and for an unknown instruction set.
template <class Real>
void compute(const Logits& logits, const std::int64_t* targets, const Options& options,
             const Stats<Real>& out);

// One shard of a vocabulary. targets [rows] count from this shard's first column and may lie
// outside it; target_logits [rows] hold the target's logit wherever it is (NaN: no target).
template <class Real>
void compute_partials(const Logits& logits, const std::int64_t* targets, const Real* target_logits,
                      const Options& options, const Partials<Real>& out);

// Adds columns to the running partials of rows whose earlier columns are in `total` (at first: max
// and second -inf, everything else 0). `tile` holds columns from first_column on and is the
// caller's to change: a target's entry is replaced by its target_logit (NaN: no target), so that
// rank, argmax and logprob agree on one value however the entry was computed.
template <class Real>
void accumulate(const Logits& tile, const std::int64_t* targets, const Real* target_logits,
                std::int64_t first_column, const Options& options, const Partials<double>& total);

// Writes d(loss)/d(logits) to `out`, shaped and typed like `logits` and possibly the same memory.
// Throws std::invalid_argument as `compute` does, and for a forward_argmax that is no column nor
// -1.
template <class Real>
void backward(const Logits& logits, const std::int64_t* targets, const Options& options,
              const Gradients<Real>& gradients, const Logits& out);

}  // namespace robustft::token_stats
