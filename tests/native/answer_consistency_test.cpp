// Pairwise agreement and its summary on ragged, empty and absent answers, for every instruction set
// and several threads, against plain dynamic programming.
#include "answer_consistency.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace rc = robustft::consistency;

namespace {

using Tokens = std::vector<std::int32_t>;

void check(bool ok, const std::string& what) {
    if (ok) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}

// The last cell of the alignment table: a longest common subsequence, or an edit distance.
std::size_t aligned(const Tokens& a, const Tokens& b, bool lcs) {
    std::vector<std::size_t> row(b.size() + 1, 0);
    if (!lcs) {
        for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
    }
    for (std::size_t i = 0; i < a.size(); ++i) {
        std::size_t diagonal = row[0];
        row[0] = lcs ? 0 : i + 1;
        for (std::size_t j = 0; j < b.size(); ++j) {
            const std::size_t above = row[j + 1];
            const bool same = a[i] == b[j];
            row[j + 1] = lcs ? (same ? diagonal + 1 : std::max(above, row[j]))
                             : std::min({above + 1, row[j] + 1, diagonal + (same ? 0 : 1)});
            diagonal = above;
        }
    }
    return row.back();
}

std::size_t in_common(const Tokens& a, const Tokens& b) {
    std::map<std::int32_t, std::size_t> left;
    for (const std::int32_t token : a) ++left[token];
    std::size_t found = 0;
    for (const std::int32_t token : b) {
        std::size_t& count = left[token];
        found += count > 0;
        count -= count > 0;
    }
    return found;
}

double expected(const Tokens& a, const Tokens& b, rc::Metric metric) {
    const auto total = static_cast<double>(a.size() + b.size());
    if (total == 0) return 1;
    const auto longer = static_cast<double>(std::max(a.size(), b.size()));
    switch (metric) {
        case rc::Metric::exact:
            return a == b ? 1 : 0;
        case rc::Metric::token_f1:
            return 2.0 * static_cast<double>(in_common(a, b)) / total;
        case rc::Metric::lcs:
            return 2.0 * static_cast<double>(aligned(a, b, true)) / total;
        case rc::Metric::edit:
            return 1 - static_cast<double>(aligned(a, b, false)) / longer;
    }
    return -1;
}

void run(std::size_t questions, std::size_t slots, std::size_t width, std::int32_t vocabulary) {
    std::mt19937 random(static_cast<unsigned>(slots * 1000 + width));
    const auto below = [&](std::size_t end) { return random() % end; };
    std::vector<Tokens> answers;
    std::vector<std::int64_t> start, length;
    Tokens tokens;
    for (std::size_t i = 0; i < questions * slots; ++i) {
        const bool absent = below(8) == 0;
        Tokens answer(absent ? 0 : below(width + 1));
        for (std::size_t j = 0; j < answer.size(); ++j) {
            const bool copied = i % slots != 0 && j < answers[i / slots * slots].size();
            answer[j] = copied && below(4) != 0 ? answers[i / slots * slots][j]
                                                : static_cast<std::int32_t>(random() % vocabulary);
        }
        start.push_back(static_cast<std::int64_t>(tokens.size()));
        length.push_back(absent ? -1 : static_cast<std::int64_t>(answer.size()));
        tokens.insert(tokens.end(), answer.begin(), answer.end());
        answers.push_back(answer);
    }
    const rc::Answers given{tokens.data(), tokens.size(), start.data(),
                            length.data(), questions,     slots};
    for (const auto metric :
         {rc::Metric::exact, rc::Metric::token_f1, rc::Metric::lcs, rc::Metric::edit}) {
        std::vector<float> agreement(questions * slots * slots, -1);
        robustft::Monitor monitor;
        rc::pairwise(given, metric, agreement.data(), 3, monitor);
        for (std::size_t i = 0; i < agreement.size(); ++i) {
            const std::size_t n = i / (slots * slots), a = n * slots + i / slots % slots;
            const std::size_t b = n * slots + i % slots;
            const bool both = length[a] >= 0 && length[b] >= 0;
            const double right = both ? expected(answers[a], answers[b], metric) : 0;
            check(std::abs(static_cast<double>(agreement[i]) - right) < 1e-6,
                  rc::instruction_set() + " metric " + std::to_string(static_cast<int>(metric)) +
                      " slots " + std::to_string(slots) + " width " + std::to_string(width));
        }
        if (slots > rc::kMaxClustered) continue;
        std::vector<std::uint8_t> present;
        for (const std::int64_t n : length) present.push_back(n >= 0);
        std::vector<float> mean(questions * slots), fraction(questions), entropy(questions);
        std::vector<std::int64_t> cluster(questions * slots), majority(questions);
        for (const auto rule : {rc::Clustering::components, rc::Clustering::greedy}) {
            rc::summarise(
                {agreement.data(), present.data(), nullptr, questions, slots, 0.5F, rule},
                {mean.data(), cluster.data(), majority.data(), fraction.data(), entropy.data()}, 3,
                monitor);
            for (std::size_t i = 0; i < cluster.size(); ++i) {
                check((cluster[i] >= 0) == (present[i] != 0), "clusters of those present");
            }
        }
    }
}

}  // namespace

int main() {
    for (const char* name : {"portable", "avx2", "avx512"}) {
        try {
            rc::force_instruction_set(name);
        } catch (const std::invalid_argument&) {
            continue;
        }
        run(0, 3, 10, 5);
        for (const std::size_t slots : {1, 2, 9, 64, 65}) run(2, slots, 70, 30);
        run(100, 5, 12, 4);
        run(3, 4, 200, 40);
        run(1, 3, 4000, 100'000);  // too many masks to hold at once
    }
    rc::force_instruction_set("");
    std::thread other([] { run(200, 6, 40, 20); });  // each call has workers of its own
    run(200, 7, 40, 20);
    other.join();
    std::puts("answer consistency: ok");
}
