// The kNN core without Python, for the sanitizers: every instruction set of this machine, every
// tier, several threads, against a brute force with the same arithmetic.
#include "cosine_knn.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace robustft;
using namespace robustft::knn;

namespace {

int failures = 0;

void expect(bool condition, const std::string& what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
}

enum class Kind { gaussian, near_tied, duplicated, scaled };

std::vector<float> make_rows(std::size_t count, std::size_t dim, Kind kind, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> rows(count * dim);
    for (float& x : rows) x = normal(random);
    for (std::size_t i = 0; i < count; ++i) {
        float* row = rows.data() + i * dim;
        if (kind == Kind::near_tied) {
            for (std::size_t j = 0; j < dim; ++j) row[j] = 3 + 0.1F * row[j];
        } else if (kind == Kind::duplicated && i % 2 == 1) {
            std::copy_n(row - dim, dim, row);
        } else if (kind == Kind::scaled) {
            const auto factor = std::pow(10.0F, static_cast<float>(i % 61) - 30);
            for (std::size_t j = 0; j < dim; ++j) row[j] *= factor;
        }
        if (i % 97 == 5) std::fill_n(row, dim, 0.0F);
    }
    return rows;
}

Rows view(const std::vector<float>& rows, std::size_t dim) {
    return {rows.data(), static_cast<std::ptrdiff_t>(dim * sizeof(float)), rows.size() / dim,
            DType::float32};
}

struct Answer {
    std::vector<std::int64_t> ids;
    std::vector<float> cosines;
    bool operator==(const Answer& other) const {
        const auto same = [](float a, float b) { return a == b || (a != a && b != b); };
        return ids == other.ids && std::equal(cosines.begin(), cosines.end(), other.cosines.begin(),
                                              other.cosines.end(), same);
    }
};

Answer search(const CosineIndex& index, const Rows& queries, const SearchOptions& options) {
    Answer out{std::vector<std::int64_t>(queries.count * options.k),
               std::vector<float>(queries.count * options.k)};
    Monitor monitor([](std::uint64_t) {});
    index.search(queries, options, out.ids.data(), out.cosines.data(), monitor);
    return out;
}

Answer brute_force(const Rows& rows, const Rows& queries, std::size_t dim,
                   const SearchOptions& options) {
    Answer out;
    std::vector<double> x(dim), y(dim);
    for (std::size_t q = 0; q < queries.count; ++q) {
        widen_row(queries[q], queries.dtype, dim, x.data());
        std::vector<std::pair<double, std::int64_t>> scored;  // (-cosine, id)
        for (std::size_t i = 0; i < rows.count; ++i) {
            const auto id = static_cast<std::int64_t>(i);
            if (options.exclude != nullptr && options.exclude[q] == id) continue;
            if (options.allowed != nullptr && (options.allowed[i / 64] >> (i % 64) & 1) == 0) {
                continue;
            }
            widen_row(rows[i], rows.dtype, dim, y.data());
            const double dot =
                kPortable.dot[static_cast<int>(DType::float64)](y.data(), x.data(), dim);
            const double cosine = dot * (inverse_norm(x.data(), dim) * inverse_norm(y.data(), dim));
            if (cosine > options.threshold) scored.emplace_back(-cosine, id);
        }
        std::sort(scored.begin(), scored.end());
        for (std::size_t rank = 0; rank < options.k; ++rank) {
            const bool found = rank < scored.size();
            out.ids.push_back(found ? scored[rank].second : -1);
            out.cosines.push_back(found ? static_cast<float>(-scored[rank].first) : std::nanf(""));
        }
    }
    return out;
}

void check_answers() {
    unsigned seed = 0;
    for (const Kind kind : {Kind::gaussian, Kind::near_tied, Kind::duplicated, Kind::scaled}) {
        for (const auto& [count, dim, queries, k] :
             {std::tuple{700U, 33U, 9U, 5U}, {64U, 1U, 3U, 70U}, {1500U, 128U, 70U, 2U}}) {
            const auto rows = make_rows(count, dim, kind, ++seed);
            const auto asked = make_rows(queries, dim, kind, ++seed);
            std::vector<std::int64_t> exclude(queries);
            std::iota(exclude.begin(), exclude.end(), 0);
            std::vector<std::uint64_t> some((count + 63) / 64, 0x8421'0842'1084'2108);
            std::vector<std::uint64_t> most((count + 63) / 64, 0xfffe'ffff'7fff'fff0);
            for (auto* allowed : {&some, &most}) {
                if (count % 64 != 0) allowed->back() &= (std::uint64_t{1} << (count % 64)) - 1;
            }
            for (const std::uint64_t* allowed : {static_cast<const std::uint64_t*>(nullptr),
                                                 static_cast<const std::uint64_t*>(some.data()),
                                                 static_cast<const std::uint64_t*>(most.data())}) {
                SearchOptions options;
                options.k = k;
                options.exclude = exclude.data();
                options.allowed = allowed;
                const Answer wanted = brute_force(view(rows, dim), view(asked, dim), dim, options);
                for (const Kernels* kernels : available_kernels()) {
                    CosineIndex index(dim, DType::float32, *kernels);
                    Monitor monitor;
                    index.append(view(rows, dim), nullptr, 2, monitor);
                    for (const Tier tier :
                         {Tier::automatic, Tier::int8, Tier::float32, Tier::exact}) {
                        for (const unsigned threads : {1U, 2U, 7U}) {
                            options.tier = tier;
                            options.threads = threads;
                            expect(search(index, view(asked, dim), options) == wanted,
                                   std::string(kernels->name) + " kind " +
                                       std::to_string(static_cast<int>(kind)) + " rows " +
                                       std::to_string(count) + " tier " +
                                       std::to_string(static_cast<int>(tier)) + " threads " +
                                       std::to_string(threads));
                        }
                    }
                }
            }
        }
    }
}

// Enough work that every search really starts its threads, several searches at once.
void check_sharing() {
    constexpr std::size_t dim = 96;
    const auto rows = make_rows(6000, dim, Kind::gaussian, 1);
    const auto queries = make_rows(600, dim, Kind::gaussian, 2);
    CosineIndex index(dim, DType::float32, choose_kernels(""));
    Monitor monitor;
    index.append(view(rows, dim), nullptr, 3, monitor);
    for (const std::size_t count : {std::size_t{20}, std::size_t{600}}) {
        Rows asked = view(queries, dim);
        asked.count = count;
        SearchOptions options;
        options.k = 10;
        const Answer wanted = search(index, asked, options);
        options.threads = 3;
        std::vector<std::thread> callers;
        std::vector<Answer> found(3);
        for (Answer& answer : found) {
            callers.emplace_back([&] { answer = search(index, asked, options); });
        }
        for (std::thread& caller : callers) caller.join();
        for (const Answer& answer : found) expect(answer == wanted, "concurrent searches");
    }
}

void check_appending() {
    constexpr std::size_t dim = 20;
    const auto rows = make_rows(3000, dim, Kind::gaussian, 3);
    CosineIndex whole(dim, DType::float32, choose_kernels(""));
    CosineIndex grown(dim, DType::float32, choose_kernels(""));
    Monitor monitor;
    whole.append(view(rows, dim), nullptr, 1, monitor);
    for (std::size_t first = 0, step = 1; first < 3000; first += step, step = step * 3 % 701) {
        Rows part = view(rows, dim);
        part.data = part[first];
        part.count = std::min<std::size_t>(step, 3000 - first);
        grown.append(part, nullptr, 2, monitor);
    }
    SearchOptions options;
    options.k = 7;
    expect(search(whole, view(rows, dim), options) == search(grown, view(rows, dim), options),
           "append in parts");

    std::vector<float> bad(rows.begin(), rows.begin() + 40 * dim);
    bad[33 * dim + 4] = std::nanf("");
    bool refused = false;
    try {
        grown.append(view(bad, dim), nullptr, 2, monitor);
    } catch (const std::invalid_argument& error) {
        refused = std::string(error.what()).find("row 33 ") != std::string::npos;
    }
    expect(refused && grown.size() == 3000, "a row with NaN is refused by number");
}

void check_errors_in_workers() {
    struct Trouble {};
    for (const unsigned threads : {1U, 4U}) {
        Monitor monitor;
        bool reached = false;
        try {
            parallel_for(1000, threads, monitor, [](std::size_t task, unsigned) {
                if (task == 300) throw Trouble();
            });
        } catch (const Trouble&) {
            reached = true;
        }
        expect(reached, "an exception in a worker reaches the caller");
    }
}

}  // namespace

int main() {
    check_answers();
    check_sharing();
    check_appending();
    check_errors_in_workers();
    if (failures == 0) std::puts("cosine_knn: all passed");
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
