#include "token_stats.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "parallel_for.hpp"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace robustft::token_stats {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

std::size_t bytes(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// Writing a fresh gradient takes less time than the page faults it meets; pages of 2 MiB are a
// 512th as many. Advice alone: memory that is there already, and other systems, are left as they
// are.
void expect_huge_pages(const Logits& out) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
    if (out.rows() == 0 || out.outer_stride < 0 || out.inner_stride < 0) return;
    const auto at = [&](std::int64_t row) {
        return reinterpret_cast<std::uintptr_t>(out.row(row));
    };
    const std::uintptr_t last = at(out.rows() - 1) + bytes(out.type) * out.vocab;
    const std::uintptr_t begin = (at(0) + page - 1) / page * page, end = last / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)out;
#endif
}

// z(x) = softcap(x) / temperature. Infinite logits do not go through the cap: -inf is a mask.
struct Transform {
    double rate, cap;

    explicit Transform(const Options& options)
        : rate(1 / options.temperature), cap(options.softcap) {}

    double operator()(double x) const {
        return (cap > 0 && std::isfinite(x) ? cap * std::tanh(x / cap) : x) * rate;
    }
    double slope(double x) const {
        if (cap <= 0 || !std::isfinite(x)) return rate;
        const double t = std::tanh(x / cap);
        return rate * (1 - t * t);
    }
    RowTransform for_rows() const {
        return {static_cast<float>(rate * 1.4426950408889634), static_cast<float>(cap),
                static_cast<float>(cap > 0 ? 1 / cap : 0)};
    }
};

const Kernels* kernels_named(const std::string& name) {
#if defined(__x86_64__) || defined(__i386__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (kernels_avx512 && avx512 && (name.empty() || name == "avx512")) return kernels_avx512;
    if (kernels_avx2 && avx2 && (name.empty() || name == "avx2")) return kernels_avx2;
#elif defined(__aarch64__)
    if (kernels_neon && (name.empty() || name == "neon")) return kernels_neon;
#endif
    if (name.empty() || name == "portable") return kernels_portable;
    return nullptr;
}

const Kernels& kernels_for(const std::string& name) {
    const Kernels* const found = kernels_named(name);
    if (!found) {
        throw std::invalid_argument("isa must be one that this CPU has, got '" + name + "'");
    }
    return *found;
}

RowPartial partial_f64(const double* x, std::int64_t vocab, const Transform& z, bool has_target,
                       std::int64_t target, double target_logit) {
    RowPartial r{-infinity, -infinity, 0, 0, target_logit, 0, 0};
    bool has_nan = false;
    for (std::int64_t j = 0; j < vocab; ++j) {
        has_nan |= std::isnan(x[j]);
        if (x[j] > r.max) {
            r.second = r.max;
            r.max = x[j];
            r.argmax = j;
        } else if (x[j] > r.second) {
            r.second = x[j];
        }
        r.rank += has_target && (x[j] > target_logit || (x[j] == target_logit && j < target));
    }
    if (has_nan || r.max == infinity) {
        r.sum = has_nan ? nan : infinity;
    } else if (r.max > -infinity) {
        const double top = z(r.max);
        for (std::int64_t j = 0; j < vocab; ++j) {
            const double d = z(x[j]) - top, e = std::exp(d);
            r.sum += e;
            if (e > 0) r.weighted += e * d;
        }
    }
    return r;
}

// What one row needs, whatever its type.
class Rows {
  public:
    Rows(const Logits& logits, const Options& options)
        : logits_(logits), z_(options), kernels_(kernels_for(options.isa)) {}

    RowPartial operator()(std::int64_t row, bool has_target, std::int64_t target,
                          double target_logit) const {
        const void* const x = logits_.row(row);
        if (logits_.type == Type::f64) {
            return partial_f64(static_cast<const double*>(x), logits_.vocab, z_, has_target, target,
                               target_logit);
        }
        RowPartial result;
        const RowTask task{x,          logits_.vocab, z_.for_rows(),
                           has_target, target,        static_cast<float>(target_logit)};
        kernels_.partial[static_cast<int>(logits_.type)][z_.cap > 0](task, &result);
        return result;
    }

    double logit(std::int64_t row, std::int64_t column) const {
        const char* const x = static_cast<const char*>(logits_.row(row)) +
                              static_cast<std::size_t>(column) * bytes(logits_.type);
        if (logits_.type == Type::f64) return *reinterpret_cast<const double*>(x);
        return static_cast<double>(kernels_.widen[static_cast<int>(logits_.type)](x));
    }

    // Overwrites an entry of a matrix that is the caller's to change.
    void put(std::int64_t row, std::int64_t column, double value) const {
        char* const x = static_cast<char*>(const_cast<void*>(logits_.row(row))) +
                        static_cast<std::size_t>(column) * bytes(logits_.type);
        if (logits_.type == Type::f64) {
            *reinterpret_cast<double*>(x) = value;
        } else {
            kernels_.narrow[static_cast<int>(logits_.type)](static_cast<float>(value), x);
        }
    }

    const Transform& z() const { return z_; }
    const Kernels& kernels() const { return kernels_; }

  private:
    const Logits& logits_;
    Transform z_;
    const Kernels& kernels_;
};

template <class Body>
void for_rows(const Logits& logits, unsigned given, bool between_products, Body&& body) {
    const unsigned threads = std::max(1U, given);
    // Below about 50 microseconds of work a thread costs more than it saves.
    constexpr std::int64_t worth_a_thread = 1 << 17;
    const std::int64_t rows = logits.rows();
    // Neighbouring rows go to one thread, which prefetches into the next of them.
    const std::int64_t least = (1 << 16) / std::max<std::int64_t>(1, logits.vocab);
    const std::int64_t share =
        std::max<std::int64_t>({1, least, rows / (std::int64_t{16} * threads)});
    const std::int64_t most = 1 + rows * logits.vocab / worth_a_thread;
    const auto tasks = static_cast<std::size_t>((rows + share - 1) / share);
    const auto used = static_cast<unsigned>(std::min<std::int64_t>(threads, most));
    const auto some_rows = [&](std::size_t task, unsigned) {
        const auto first = static_cast<std::int64_t>(task) * share;
        for (std::int64_t row = first; row < std::min(rows, first + share); ++row) body(row);
    };
    Monitor monitor;
    if (between_products) {
        // As many as the products use: a pool of another size would be made anew.
        parallel_for_between_products(tasks, threads, monitor, some_rows);
    } else {
        parallel_for(tasks, used, monitor, some_rows);
    }
}

void check_targets(const Logits& logits, const std::int64_t* targets, const Options& options) {
    for (std::int64_t row = 0; targets && row < logits.rows(); ++row) {
        const std::int64_t t = targets[row];
        if (t != options.ignore_index && (t < 0 || t >= logits.vocab)) {
            throw std::invalid_argument("target_ids must be in [0, " +
                                        std::to_string(logits.vocab) + ") or ignore_index " +
                                        std::to_string(options.ignore_index) + ", got " +
                                        std::to_string(t) + " at position " + std::to_string(row));
        }
    }
}

void check_argmax(const Logits& logits, const std::int64_t* argmax) {
    for (std::int64_t row = 0; row < logits.rows(); ++row) {
        if (argmax[row] < -1 || argmax[row] >= logits.vocab) {
            throw std::invalid_argument("argmax must be in [-1, " + std::to_string(logits.vocab) +
                                        "), got " + std::to_string(argmax[row]) + " at position " +
                                        std::to_string(row));
        }
    }
}

template <class Real>
void finish(const RowPartial& p, const Transform& z, bool has_target, std::int64_t row,
            const Stats<Real>& out) {
    const bool is_nan = std::isnan(p.sum);
    const bool defined = !is_nan && std::isfinite(p.max);
    // The maximum's own share is 1: less is rounding, and would make a log-probability positive.
    const double log_sum = std::max(std::log(p.sum), 0.0), top = z(p.max);
    const auto put = [row](Real* where, double value) { where[row] = static_cast<Real>(value); };
    // Masked columns weigh 2^-125 each, not nothing: what they add is no entropy.
    const double entropy = log_sum - p.weighted / p.sum;
    put(out.entropy, defined ? (entropy < 1e-30 ? 0 : entropy) : nan);
    put(out.logsumexp, defined ? top + log_sum : is_nan ? nan : p.max);
    put(out.max_logprob, defined ? 0.0 - log_sum : nan);
    put(out.margin, defined ? top - z(p.second) : nan);
    put(out.logprob, defined && has_target ? z(p.target) - top - log_sum : nan);
    out.argmax[row] = is_nan ? -1 : p.argmax;
    out.rank[row] = is_nan || !has_target ? -1 : p.rank;
}

// Two partials of one row, `after` holding the later columns, as one.
RowPartial merge(const RowPartial& before, const RowPartial& after, const Transform& z) {
    const double top = std::max(before.max, after.max);
    double sum = 0, weighted = 0;
    for (const RowPartial& part : {before, after}) {
        // exp(-1e4) is zero in double, and finite times zero stays zero.
        const double shift = part.max == top ? 0 : std::max(-1e4, z(part.max) - z(top));
        const double share = std::exp(shift);
        sum += share * part.sum;
        weighted += share * (part.weighted + shift * part.sum);
    }
    const double second = std::max({std::min(before.max, after.max), before.second, after.second});
    return {top,
            second,
            sum,
            weighted,
            after.target,
            after.max > before.max ? after.argmax : before.argmax,
            before.rank + after.rank};
}

}  // namespace

const void* Logits::row(std::int64_t index) const {
    const std::int64_t offset = index / inner * outer_stride + index % inner * inner_stride;
    return static_cast<const char*>(data) + offset * static_cast<std::int64_t>(bytes(type));
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "neon", "portable"}) {
        if (kernels_named(name)) names.emplace_back(name);
    }
    return names;
}

template <class Real>
void compute(const Logits& logits, const std::int64_t* targets, const Options& options,
             const Stats<Real>& out) {
    check_targets(logits, targets, options);
    const Rows rows(logits, options);
    for_rows(logits, options.threads, false, [&](std::int64_t row) {
        const bool has_target = targets && targets[row] != options.ignore_index;
        const std::int64_t target = has_target ? targets[row] : 0;
        const double logit = has_target ? rows.logit(row, target) : nan;
        finish(rows(row, has_target, target, logit), rows.z(), has_target, row, out);
    });
}

template <class Real>
void compute_partials(const Logits& logits, const std::int64_t* targets, const Real* target_logits,
                      const Options& options, const Partials<Real>& out) {
    const Rows rows(logits, options);
    for_rows(logits, options.threads, false, [&](std::int64_t row) {
        const double logit = targets ? static_cast<double>(target_logits[row]) : nan;
        const bool has_target = !std::isnan(logit);
        const RowPartial p = rows(row, has_target, has_target ? targets[row] : 0, logit);
        out.max[row] = static_cast<Real>(p.max);
        out.second[row] = static_cast<Real>(p.second);
        out.sum[row] = static_cast<Real>(p.sum);
        out.weighted[row] = static_cast<Real>(p.weighted);
        out.argmax[row] = p.argmax;
        out.rank[row] = p.rank;
    });
}

template <class Real>
void accumulate(const Logits& tile, const std::int64_t* targets, const Real* target_logits,
                std::int64_t first_column, const Options& options, const Partials<double>& total) {
    const Rows rows(tile, options);
    for_rows(tile, options.threads, true, [&](std::int64_t row) {
        const double logit = targets ? static_cast<double>(target_logits[row]) : nan;
        const bool has_target = !std::isnan(logit);
        const std::int64_t target = has_target ? targets[row] - first_column : 0;
        if (has_target && target >= 0 && target < tile.vocab) rows.put(row, target, logit);
        RowPartial part = rows(row, has_target, target, logit);
        part.argmax += first_column;
        const RowPartial before{
            total.max[row], total.second[row], total.sum[row], total.weighted[row],
            logit,          total.argmax[row], total.rank[row]};
        const RowPartial sum = merge(before, part, rows.z());
        total.max[row] = sum.max;
        total.second[row] = sum.second;
        total.sum[row] = sum.sum;
        total.weighted[row] = sum.weighted;
        total.argmax[row] = sum.argmax;
        total.rank[row] = sum.rank;
    });
}

template <class Real>
void backward(const Logits& logits, const std::int64_t* targets, const Options& options,
              const Gradients<Real>& gradients, const Logits& out) {
    // The forward pass checked them, but the caller may have written to their memory since.
    check_targets(logits, targets, options);
    check_argmax(logits, gradients.forward_argmax);
    const Rows rows(logits, options);
    const Transform& z = rows.z();
    const std::size_t size = bytes(logits.type);
    if (out.data != logits.data) expect_huge_pages(out);
    for_rows(logits, options.threads, false, [&](std::int64_t row) {
        const auto given = [row](const Real* values) {
            return values ? static_cast<double>(values[row]) : 0.0;
        };
        const bool has_target = targets && targets[row] != options.ignore_index;
        const double entropy = given(gradients.entropy);
        const double logprob = has_target ? given(gradients.logprob) : 0;
        const double max_logprob = given(gradients.max_logprob);
        const double logsumexp = given(gradients.logsumexp);
        char* const to = static_cast<char*>(const_cast<void*>(out.row(row)));
        if (entropy == 0 && logprob == 0 && max_logprob == 0 && logsumexp == 0) {
            std::memset(to, 0, static_cast<std::size_t>(logits.vocab) * size);
            return;
        }
        const std::int64_t argmax = gradients.forward_argmax[row];
        const double top = argmax < 0 ? nan : rows.logit(row, argmax);
        const double target = has_target ? rows.logit(row, targets[row]) : nan;
        const double log_top = given(gradients.forward_max_logprob);
        const double p_top = std::exp(log_top);
        // d/dz_j = p_j (a + b (z_j - z_max)) plus the target's and the maximum's own terms.
        const double a = logsumexp - logprob - max_logprob -
                         entropy * (log_top + given(gradients.forward_entropy));
        const double b = -entropy;
        if (logits.type == Type::f64) {
            const auto* const x = static_cast<const double*>(logits.row(row));
            auto* const g = reinterpret_cast<double*>(to);
            for (std::int64_t j = 0; j < logits.vocab; ++j) {
                const double d = z(x[j]) - z(top), p = std::exp(d) * p_top;
                g[j] = p == 0 ? 0 : z.slope(x[j]) * p * (a + b * d);
            }
        } else {
            const BackwardTask task{logits.row(row),
                                    to,
                                    logits.vocab,
                                    z.for_rows(),
                                    static_cast<float>(top),
                                    static_cast<float>(z.rate),
                                    static_cast<float>(a * p_top),
                                    static_cast<float>(b * p_top * 0.69314718055994531)};
            rows.kernels().backward[static_cast<int>(logits.type)][z.cap > 0](task);
        }
        // Columns with a term of their own are done again in double and rounded once.
        const auto redo = [&](std::int64_t column, double x) {
            const double d = z(x) - z(top), p = std::exp(d) * p_top;
            const double own = (column == argmax ? max_logprob : 0) +
                               (has_target && column == targets[row] ? logprob : 0);
            const double spread = p == 0 ? 0 : p * (a + b * d);
            const double value = z.slope(x) * (spread + own);
            char* const where = to + static_cast<std::size_t>(column) * size;
            if (logits.type == Type::f64) {
                *reinterpret_cast<double*>(where) = value;
            } else {
                const int type = static_cast<int>(logits.type);
                rows.kernels().narrow[type](static_cast<float>(value), where);
            }
        };
        if (argmax >= 0) redo(argmax, top);
        if (has_target) redo(targets[row], target);
    });
}

template void compute(const Logits&, const std::int64_t*, const Options&, const Stats<float>&);
template void compute(const Logits&, const std::int64_t*, const Options&, const Stats<double>&);
template void compute_partials(const Logits&, const std::int64_t*, const float*, const Options&,
                               const Partials<float>&);
template void compute_partials(const Logits&, const std::int64_t*, const double*, const Options&,
                               const Partials<double>&);
template void accumulate(const Logits&, const std::int64_t*, const float*, std::int64_t,
                         const Options&, const Partials<double>&);
template void accumulate(const Logits&, const std::int64_t*, const double*, std::int64_t,
                         const Options&, const Partials<double>&);
template void backward(const Logits&, const std::int64_t*, const Options&, const Gradients<float>&,
                       const Logits&);
template void backward(const Logits&, const std::int64_t*, const Options&, const Gradients<double>&,
                       const Logits&);

}  // namespace robustft::token_stats
