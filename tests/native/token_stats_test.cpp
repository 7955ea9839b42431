// Token statistics without Python: every instruction set against sums in long double, for the
// sanitizers and for machines that only run under an emulator.
#include "token_stats.hpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace ts = robustft::token_stats;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
int failures = 0;

void check(bool ok, const std::string& what) {
    if (ok) return;
    std::printf("FAILED: %s\n", what.c_str());
    ++failures;
}

std::uint16_t bf16_bits(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>(bits >> 16);
}
float bf16_value(std::uint16_t bits) {
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

struct Expected {
    double entropy, logprob, logsumexp, max_logprob, margin;
    std::int64_t argmax, rank;
};

Expected reference(const float* x, std::int64_t vocab, std::int64_t target) {
    float top = -inf, second = -inf;
    Expected e{};
    for (std::int64_t j = 0; j < vocab; ++j) {
        if (x[j] > top) {
            second = top;
            top = x[j];
            e.argmax = j;
        } else if (x[j] > second) {
            second = x[j];
        }
        e.rank += x[j] > x[target] || (x[j] == x[target] && j < target);
    }
    long double sum = 0, weighted = 0;
    for (std::int64_t j = 0; j < vocab; ++j) {
        const long double d = static_cast<long double>(x[j]) - top;
        if (x[j] == -inf) continue;
        sum += std::exp(d);
        weighted += std::exp(d) * d;
    }
    const long double log_sum = std::log(sum);
    e.entropy = static_cast<double>(log_sum - weighted / sum);
    e.logsumexp = static_cast<double>(top + log_sum);
    e.max_logprob = static_cast<double>(-log_sum);
    e.logprob = static_cast<double>(static_cast<long double>(x[target]) - top - log_sum);
    e.margin = static_cast<double>(top) - static_cast<double>(second);
    return e;
}

bool close(double a, double b, double limit) { return a == b || std::abs(a - b) <= limit; }

struct Results {
    std::vector<float> real;
    std::vector<std::int64_t> whole;
    explicit Results(std::size_t rows) : real(5 * rows), whole(2 * rows) {}
    ts::Stats<float> view(std::size_t n) {
        float* const r = real.data();
        return {r, r + n, r + 2 * n, r + 3 * n, r + 4 * n, whole.data(), whole.data() + n};
    }
};

void run(const std::string& isa, bool halves, std::int64_t vocab, double offset) {
    constexpr std::int64_t rows = 6;
    std::mt19937 random(static_cast<unsigned>(vocab));
    std::normal_distribution<float> normal(0, 4);
    std::vector<float> x(static_cast<std::size_t>(rows * vocab));
    for (float& v : x) v = bf16_value(bf16_bits(normal(random) + static_cast<float>(offset)));
    for (std::int64_t j = 0; j + 1 < vocab; ++j) x[static_cast<std::size_t>(j)] = -inf;  // row 0
    for (std::int64_t j = 0; j < vocab / 2; ++j) x[static_cast<std::size_t>(vocab + j)] = -inf;
    std::vector<std::uint16_t> narrow;
    for (const float v : x) narrow.push_back(bf16_bits(v));
    const void* const data = halves ? static_cast<const void*>(narrow.data()) : x.data();
    const ts::Logits logits{data, halves ? ts::Type::bf16 : ts::Type::f32, 1, rows, vocab, 0,
                            vocab};
    std::vector<std::int64_t> targets;
    for (std::int64_t row = 0; row < rows; ++row) targets.push_back((row * 37 + vocab - 1) % vocab);
    ts::Options options;
    options.threads = 2;
    options.isa = isa;
    Results out(rows);
    const ts::Stats<float> s = out.view(rows);
    ts::compute(logits, targets.data(), options, s);

    // The same in two pieces, added up.
    std::vector<double> reals(4 * rows, 0.0);
    for (std::int64_t i = 0; i < 2 * rows; ++i) reals[static_cast<std::size_t>(i)] = -inf;
    std::vector<std::int64_t> counts(2 * rows, 0);
    double* const r = reals.data();
    const ts::Partials<double> total{
        r, r + rows, r + 2 * rows, r + 3 * rows, counts.data(), counts.data() + rows};
    std::vector<float> levels;
    for (std::int64_t row = 0; row < rows; ++row) {
        levels.push_back(x[static_cast<std::size_t>(row * vocab + targets[row])]);
    }
    const std::int64_t cut = vocab / 3;
    for (const auto& [first, end] : {std::pair{std::int64_t{0}, cut}, std::pair{cut, vocab}}) {
        if (first == end) continue;
        ts::Logits piece = logits;
        piece.data = static_cast<const char*>(data) + first * (halves ? 2 : 4);
        piece.vocab = end - first;
        ts::accumulate(piece, targets.data(), levels.data(), first, options, total);
    }

    for (std::int64_t row = 0; row < rows; ++row) {
        const Expected e =
            reference(&x[static_cast<std::size_t>(row * vocab)], vocab, targets[row]);
        const std::string where = isa + (halves ? " bf16" : " f32") +
                                  " V=" + std::to_string(vocab) + " offset " +
                                  std::to_string(offset) + " row " + std::to_string(row);
        const double scale = 1e-6 * std::max(1.0, std::abs(e.logsumexp));
        check(close(s.entropy[row], e.entropy, 2e-6), where + " entropy");
        check(close(s.max_logprob[row], e.max_logprob, 2e-6), where + " max_logprob");
        check(close(s.logprob[row], e.logprob, scale), where + " logprob");
        check(close(s.logsumexp[row], e.logsumexp, scale), where + " logsumexp");
        check(close(s.margin[row], e.margin, scale), where + " margin");
        check(s.argmax[row] == e.argmax && s.rank[row] == e.rank, where + " argmax or rank");
        check(
            close(std::log(total.sum[row]) - total.weighted[row] / total.sum[row], e.entropy, 2e-6),
            where + " entropy of the pieces");
        check(total.argmax[row] == e.argmax && total.rank[row] == e.rank, where + " pieces");
    }

    // d(entropy)/dz = -p (log p + H) sums to zero.
    const std::vector<float> ones(rows, 1.0F);
    const ts::Gradients<float> gradients{ones.data(), nullptr,       nullptr, nullptr,
                                         s.entropy,   s.max_logprob, s.argmax};
    std::vector<float> gradient(x.size(), std::nanf(""));
    const ts::Logits wide{x.data(), ts::Type::f32, 1, rows, vocab, 0, vocab};
    ts::Logits to = wide;
    to.data = gradient.data();
    ts::backward(wide, targets.data(), options, gradients, to);
    for (std::int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        for (std::int64_t j = 0; j < vocab; ++j) {
            sum += static_cast<double>(gradient[static_cast<std::size_t>(row * vocab + j)]);
        }
        check(std::abs(sum) < 1e-4, isa + " gradient V=" + std::to_string(vocab));
    }
}

}  // namespace

int main() {
    for (const std::string& isa : ts::available()) {
        for (const bool halves : {false, true}) {
            for (const std::int64_t vocab : {1, 2, 31, 127, 512, 513, 1100, 5003}) {
                for (const double offset : {0.0, 1e3, -1e4, 1e7}) run(isa, halves, vocab, offset);
            }
        }
        std::printf("%s: done\n", isa.c_str());
    }
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
